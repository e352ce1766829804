"""Reading image files, and what can be wrong with them."""

from __future__ import annotations

import math
import os
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from detr_fast.geometry.segment_ids import rgb2id

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces that it will go; then PIL decodes everything
    decode_jpeg = None

_ORIENTATION = 0x0112  # the EXIF tag
# What makes an image of each orientation upright; 5 to 8 swap width and height.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # grey, with more than 8 bits


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


def load_image(
    path: str | os.PathLike,
    image_id: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    upright: bool = False,
) -> Image.Image:
    """Reads an image file completely, as RGB. Grey, palette and CMYK images are converted, 16-bit and float ones
    scaled.

    EXIF rotation is ignored, as in the original, unless only the turned image has the size that the annotations state.
    (TIFF files are always upright: PIL turns them itself.)

    Args:
        path: the file.
        image_id: for messages.
        size: (width, height) that the annotations state.
        upright: turn the image as its EXIF orientation says, whatever its size.

    Raises:
        MissingImageError: no such file; the message names the one that is probably meant.
        CorruptImageError: truncated, not an image, of more pixels than twice ``PIL.Image.MAX_IMAGE_PIXELS`` (179
            million in all), or float or 32-bit pixels that are no brightness (negative, not finite, above 65535).
    """
    which = f"image {path}" if image_id is None else f"image {path} (image id {image_id})"
    try:
        refuse_pipe(path)
        with open(path, "rb") as file:
            image = Image.open(file)
            orientation = _orientation(image)
            if image.mode in _WIDE_MODES:
                image = _to_8_bits(image)
            if upright or (size is not None and _is_turned(image.size, orientation, size)):
                return _turned(image.convert("RGB"), orientation)
            return image.convert("RGB")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        meant = probable_file(path)
        hint = "" if meant is None else f"; probably {meant} is meant"
        raise MissingImageError(f"{which} does not exist{hint}", str(path), image_id) from error
    except PermissionError as error:
        raise ImageReadError(f"{which} cannot be opened: {error.strerror}", str(path), image_id) from error
    except MemoryError:
        raise
    except Exception as error:  # what a decoder raises on damaged data differs from format to format
        raise CorruptImageError(f"{which} cannot be decoded: {_reason(error)}", str(path), image_id) from error


def refuse_pipe(path: str | os.PathLike) -> None:
    """Raises OSError for a pipe, where opening would wait for somebody who writes."""
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise OSError("it is a pipe, not a file")


def to_rgb(image: Image.Image, *, upright: bool = False) -> Image.Image:
    """As `load_image` gives it: 16-bit and float pixels are scaled, where PIL itself would clip them to white."""
    orientation = _orientation(image) if upright else 1
    return _turned((_to_8_bits(image) if image.mode in _WIDE_MODES else image).convert("RGB"), orientation)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image that is turned as its EXIF orientation says, from the header."""
    size = stored_size(image)
    return size[::-1] if _orientation(image) >= 5 else size


def is_turned_in_place(image: Image.Image) -> bool:
    """Whether the EXIF orientation turns or mirrors an image but leaves its size, so that `load_image` ignores it."""
    orientation = _orientation(image)
    return orientation in (2, 3, 4) or (orientation >= 5 and image.width == image.height)


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) that decoding gives. Of a TIFF file that PIL will turn, older versions state the other one."""
    if image.format == "TIFF" and image.getexif().get(_ORIENTATION, 1) >= 5:
        image.load()
    return image.size


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none or it cannot be read.

    Of a TIFF file 1: PIL turns it when it decodes it, and gives the turned size.

    Raises:
        Exception: what PIL raises at a PNG file's damaged pixels.
    """
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and "exif" not in image.info:
        # `getexif` does that, as EXIF data may follow the pixels. PIL raises once only: whoever swallowed it there
        # would get a black image afterwards.
        image.load()
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF data can be damaged in as many ways as an image
        return 1
    return value if value in _UPRIGHT else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    # Not ImageOps.exif_transpose: it also writes the EXIF data anew, and fails where they are damaged.
    image = image.transpose(_UPRIGHT[orientation])
    image.info = {}  # the orientation is among them, in more than one form; nobody shall turn it again
    return image


def _is_turned(own: tuple[int, int], orientation: int, size: tuple[int, int]) -> bool:
    """Whether the EXIF orientation, and nothing else, gives an image of that size the other one."""
    return own != size and own == size[::-1] and orientation >= 5


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "the file is no image"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {_most_pixels()} pixels, the limit against files that would fill the memory"
    return str(error) or type(error).__name__


def _most_pixels() -> float:
    """PIL warns of images above its limit and reads none above twice that."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey 8-bit pixels of an image of 16 or 32 bits, which PIL itself would clip to white.

    16-bit pixels are divided by 257. Of 32 bits and of floats the file does not say what is white: the smallest of 1
    (floats), 255 and 65535 that no pixel exceeds.
    """
    pixels = np.asarray(image)
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"its pixels range from {low:g} to {high:g}; expected 0 to 1, to 255 or to 65535")
    if image.mode.startswith("I;16") or image.format == "PNG":
        white = 65535.0
    elif image.mode == "F" and high <= 1:
        white = 1.0
    else:
        white = 255.0 if high <= 255 else 65535.0
    return Image.fromarray(np.rint(pixels * (255.0 / white)).astype(np.uint8))


def probable_file(path: str | os.PathLike) -> str | None:
    """The file that is probably meant by a path at which there is none, or None.

    Tried are: ``/`` for a backslash, a leading folder less, another case, accents written otherwise (Unicode's NFC and
    NFD), another extension.
    """
    text = os.fspath(path).replace("\\", "/")
    folder, parts = text, []
    while not os.path.isdir(folder):
        folder, _, part = folder.rpartition("/")
        parts.insert(0, part)
        if not folder:
            folder = "/" if text.startswith("/") else "."
    for first in range(len(parts)):
        found = _alike(folder, parts[first:])
        if found is not None:
            return found
    return None


def _alike(folder: str, parts: list[str]) -> str | None:
    """The path below a folder whose parts are the same but for case, the last one's extension too."""
    for position, part in enumerate(parts):
        try:
            names, stems = _listed(folder)
        except OSError:
            return None
        found = part if os.path.exists(os.path.join(folder, part)) else names.get(_folded(part))
        if found is None and position == len(parts) - 1:
            found = stems.get(_folded(os.path.splitext(part)[0]))
        if found is None:
            return None
        folder = os.path.join(folder, found)
    return folder if os.path.isfile(folder) else None


@lru_cache(maxsize=8)  # a data set of which every name is wrong asks for every image
def _listed(folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """A folder's names as `_folded` has them, and so without the extension; of several the first."""
    names, stems = {}, {}
    for name in sorted(os.listdir(folder), reverse=True):
        names[_folded(name)] = name
        stem = _folded(os.path.splitext(name)[0])
        if stem != _folded(name):
            stems[stem] = name
    return names, stems


def _folded(name: str) -> str:
    """Without what differs between systems: case, and how accents are written (macOS takes letters apart)."""
    return unicodedata.normalize("NFC", name.lower())


def header_size(path: str | os.PathLike, stated: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """(width, height) of ``load_image(path, size=stated)``, from the file's header; None if it cannot be read."""
    try:
        refuse_pipe(path)
        with Image.open(path) as image:
            size = stored_size(image)
            if stated is None or size == stated:  # reading the orientation decodes a whole PNG file
                return size
            return size[::-1] if _is_turned(size, _orientation(image), stated) else size
    except Exception:  # reading the whole file says what is wrong
        return None


def header_sizes(
    paths: Mapping[int, str], stated: Mapping[int, tuple[int, int] | None], *, num_threads: int = 8
) -> dict[int, tuple[int, int]]:
    """Image id → (width, height), of those files whose header can be read."""
    ids = list(paths)
    with ThreadPoolExecutor(num_threads) as pool:
        sizes = pool.map(lambda i: header_size(paths[i], stated.get(i)), ids)
    return {i: size for i, size in zip(ids, sizes, strict=True) if size is not None}


def is_turned(path: str | os.PathLike, stated: tuple[int, int]) -> bool:
    """Whether ``load_image(path, size=stated)`` turns the image."""
    return header_size(path, stated) != header_size(path)


def leaves_folder(folder: str | os.PathLike, name: str) -> bool:
    """Whether a file name leads out of the folder that it is relative to, by ``..`` or by being absolute.

    Judged as text, with ``\\`` for ``/`` as well: links are not followed, as data sets are often made of links to files
    elsewhere.
    """
    name = name.replace("\\", "/")
    if ".." not in name and not os.path.isabs(name):
        return False
    folder = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(folder, name))
    return path != folder and not path.startswith(os.path.join(folder, ""))


def missing_files(paths: Iterable[str]) -> list[str]:
    """Those paths at which there is no file. Every folder is listed once, which takes less than to ask for each."""
    present: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in present:
            try:
                present[folder] = {entry.name for entry in os.scandir(folder)}
            except OSError:
                present[folder] = set()
        if name not in present[folder]:
            missing.append(path)
    return missing


def load_image_tensor(
    path: str | os.PathLike, image_id: int | None = None, *, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """As ``load_image``, the same pixels as a uint8 tensor [3, H, W] whose memory is [H, W, 3].

    JPEG files are decoded by torchvision, which gives PIL's pixels in less time; what it does not take, and every other
    format, PIL decodes.

    Raises:
        MissingImageError, CorruptImageError: as ``load_image``.
    """
    try:
        refuse_pipe(path)
        data = np.fromfile(path, dtype=np.uint8)
        if decode_jpeg is not None and 0 < _jpeg_pixels(data) <= _most_pixels():
            image = decode_jpeg(torch.from_numpy(data), ImageReadMode.UNCHANGED)
            # Grey or RGB; CMYK is converted as PIL does it. What may have to be turned is PIL's, too.
            may_turn = size is not None and image.shape[-2:] == size and size[0] != size[1]
            if len(image) in (1, 3) and not may_turn:
                return image.expand(3, -1, -1)
    except (OSError, RuntimeError):
        pass  # PIL has the last word on what cannot be read, and names it
    return torch.from_numpy(np.array(load_image(path, image_id, size=size))).permute(2, 0, 1)


def _jpeg_pixels(data: np.ndarray) -> int:
    """Number of pixels that a JPEG file's header states, before anything is allocated for them; 0 if it is no JPEG.

    Args:
        data: uint8, the file.
    """
    place = 2
    if bytes(data[:2]) != b"\xff\xd8":
        return 0
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = int(data[place + 1])
        # Start of a frame: the length's two bytes, one for the precision, height, width.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (256 * int(data[place + i]) + int(data[place + i + 1]) for i in (5, 7))
            return height * width
        place += 1 if marker == 0xFF else 2 + 256 * int(data[place + 2]) + int(data[place + 3])
    return 0


def load_segment_ids(path: str | os.PathLike) -> np.ndarray:
    """int64 [H, W]: the segment id of every pixel of a panoptic PNG.

    Raises:
        MissingImageError: no such file. CorruptImageError: it cannot be decoded.
    """
    try:
        refuse_pipe(path)
        with Image.open(path) as file:
            return rgb2id(np.asarray(file.convert("RGB")))
    except FileNotFoundError as error:
        raise MissingImageError(f"segments {path} do not exist", str(path)) from error
    except MemoryError:
        raise
    except Exception as error:  # see load_image
        raise CorruptImageError(f"segments {path} cannot be decoded: {_reason(error)}", str(path)) from error
