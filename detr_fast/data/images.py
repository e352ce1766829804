"""Reading image files, and what can be wrong with them."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from detr_fast.geometry.segment_ids import rgb2id

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces that it will go; then PIL decodes everything
    decode_jpeg = None

_JPEG_MAGIC = [0xFF, 0xD8]


class ImageReadError(OSError):
    """An image could not be read. ``path`` and ``image_id`` say which one.

    Both are None when the error comes out of a loader's worker, which carries the message alone.
    """

    def __init__(self, message: str, path: str | None = None, image_id: int | None = None):
        super().__init__(message)
        self.path = path
        self.image_id = image_id

    def __reduce__(self):
        return type(self), (str(self), self.path, self.image_id)


class MissingImageError(ImageReadError, FileNotFoundError):
    """The annotations name an image file that does not exist."""


class CorruptImageError(ImageReadError):
    """An image file is truncated, or is not an image."""


def load_image(path: str | os.PathLike, image_id: int | None = None) -> Image.Image:
    """Reads an image file completely, as RGB. Grey, palette and CMYK images are converted; EXIF rotation is ignored,
    as in the original.

    Raises:
        MissingImageError: no such file.
        CorruptImageError: truncated, not an image, or too large for PIL's limit on decompressed size.
    """
    which = f"image {path}" if image_id is None else f"image {path} (image id {image_id})"
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MissingImageError(f"{which} does not exist", str(path), image_id) from error
    except PermissionError as error:
        raise ImageReadError(f"{which} cannot be opened: {error.strerror}", str(path), image_id) from error
    except MemoryError:
        raise
    except Exception as error:  # what a decoder raises on damaged data differs from format to format
        why = "the file is no image" if isinstance(error, UnidentifiedImageError) else error
        raise CorruptImageError(f"{which} cannot be decoded: {why}", str(path), image_id) from error


def load_image_tensor(path: str | os.PathLike, image_id: int | None = None) -> torch.Tensor:
    """As ``load_image``, the same pixels as a uint8 tensor [3, H, W] whose memory is [H, W, 3].

    JPEG files are decoded by torchvision, which gives PIL's pixels in less time; what it does not take, and every other
    format, PIL decodes.

    Raises:
        MissingImageError, CorruptImageError: as ``load_image``.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
        if decode_jpeg is not None and data[:2].tolist() == _JPEG_MAGIC:
            image = decode_jpeg(torch.from_numpy(data), ImageReadMode.UNCHANGED)
            if len(image) in (1, 3):  # grey or RGB; CMYK is converted as PIL does it
                return image.expand(3, -1, -1)
    except (OSError, RuntimeError):
        pass  # PIL has the last word on what cannot be read, and names it
    return torch.from_numpy(np.array(load_image(path, image_id))).permute(2, 0, 1)


def load_segment_ids(path: str | os.PathLike) -> np.ndarray:
    """int64 [H, W]: the segment id of every pixel of a panoptic PNG.

    Raises:
        MissingImageError: no such file. CorruptImageError: it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            return rgb2id(np.asarray(file.convert("RGB")))
    except FileNotFoundError as error:
        raise MissingImageError(f"segments {path} do not exist", str(path)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise CorruptImageError(f"segments {path} cannot be decoded: {error}", str(path)) from error
