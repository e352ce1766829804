"""Images to detect in, whatever form they are given in, and batches of them without padding."""

import http.client
import io
import os
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from detr_fast.data.images import (
    CorruptImageError,
    ImageReadError,
    load_image,
    refuse_pipe,
    stored_size,
    to_rgb,
    upright_size,
)
from detr_fast.data.layouts import IMAGE_SUFFIXES
from detr_fast.data.packed import PackedCollate
from detr_fast.data.transforms import Compose
from detr_fast.errors import UsageError
from detr_fast.inference.video import Video, is_video

ImageLike: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | Tensor
_KINDS = "a path, an address, a PIL image, an array [H, W, 3], a tensor [3, H, W], a folder, a video, or a list of them"
_SECONDS = 30  # to wait for a server


class Picture:
    """One image: its size without decoding it, where that is possible, and its pixels when they are needed.

    Args:
        image: a file's path or its http(s) address; a PIL image; an array [H, W], [H, W, 1] or [H, W, 3] (RGB), or a
            tensor [1, H, W] or [3, H, W] on any device, uint8 or floats in 0..1. Floats are rounded to 256 levels, on
            which images are resized, as in training.
        upright: turn a file's or PIL image as its EXIF orientation says.

    Attributes:
        path: the file's path or address; None for an image from memory.

    Raises:
        TypeError: something else, or another dtype.
        ValueError: another shape, no pixels, or floats outside 0..1.
    """

    def __init__(self, image: ImageLike, *, upright: bool = True):
        self.upright = upright
        self.path: str | None = None
        self._image: Image.Image | None = None
        self._error: Exception | None = None  # that `size` met at `_image`
        if isinstance(image, (str, os.PathLike)):
            self.path = os.fspath(image)
        elif isinstance(image, Image.Image):
            if 0 in image.size:
                raise ValueError(
                    f"an image is a PIL image of {image.width}x{image.height} pixels; expected one at least"
                )
            self._image = image
        elif isinstance(image, (np.ndarray, Tensor)):
            self._image = _from_array(image)
        else:
            raise TypeError(f"an image is a {type(image).__name__}; expected {_KINDS}")

    def size(self) -> tuple[int, int] | None:
        """(width, height) of what `read` gives; None where the image cannot be read, which `read` reports."""
        try:
            if self._image is not None:
                return upright_size(self._image) if self.upright else stored_size(self._image)
            assert self.path is not None
            if _is_address(self.path):
                return self.read().size
            refuse_pipe(self.path)
            with Image.open(self.path) as file:
                return upright_size(file) if self.upright else stored_size(file)
        except Exception as error:  # what a decoder raises on damaged data differs from format to format
            if self._image is not None:
                self._error = error
            return None

    def read(self) -> Image.Image:
        """The image as RGB. What has come from an address is kept.

        Raises:
            ImageReadError: it cannot be fetched, read or decoded; the message names it.
        """
        if self._image is not None:
            try:
                if self._error is not None:  # PIL raises it once, and then gives a black image
                    raise self._error
                return to_rgb(self._image, upright=self.upright)
            except MemoryError:
                raise
            except Exception as error:  # of a lazily opened file: what a decoder raises differs from format to format
                name = getattr(self._image, "filename", "") or "from memory"
                raise CorruptImageError(f"the PIL image {name} cannot be decoded: {error}", name) from error
        assert self.path is not None
        if not _is_address(self.path):
            return load_image(self.path, upright=self.upright)
        self._image = _fetch(self.path, self.upright)
        return self._image


class Frame(Picture):
    """One picture of a video; its path is the video's, with the number of the frame."""

    def __init__(self, video: Video, index: int):
        super().__init__(f"{video.path}#{index}", upright=video.upright)
        self._video, self._index = video, index

    def size(self) -> tuple[int, int] | None:
        return self._video.size()

    def read(self) -> Image.Image:
        return self._video.read(self._index)


def pictures(images: ImageLike | Iterable[ImageLike], *, upright: bool = True) -> tuple[list[Picture], bool]:
    """All the images in `images`, and whether that was a single one, which is no list.

    Args:
        images: see `Picture`; a folder, which is searched for image files; a video file, for its frames; or a list of
            images, folders and videos.
        upright: see `Picture`.

    Raises:
        TypeError, ValueError: see `Picture`. UsageError: there is no image in a folder. As `Video`.
    """
    if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray, Tensor)):
        return _expanded(images, upright), not (isinstance(images, (str, os.PathLike)) and _is_several(images))
    if not isinstance(images, Iterable):
        raise TypeError(f"images is a {type(images).__name__}; expected {_KINDS}")
    return [picture for image in images for picture in _expanded(image, upright)], False


def _expanded(image: ImageLike, upright: bool) -> list[Picture]:
    if isinstance(image, (str, os.PathLike)) and _is_folder(image):
        return [Picture(path, upright=upright) for path, _ in find_images([os.fspath(image)])]
    if isinstance(image, (str, os.PathLike)) and _is_several(image):
        video = Video(image, upright=upright)
        return [Frame(video, index) for index in range(len(video))]
    return [Picture(image, upright=upright)]


def _is_folder(path: str | os.PathLike) -> bool:
    return not _is_address(path) and Path(path).is_dir()


def _is_several(path: str | os.PathLike) -> bool:
    return _is_folder(path) or (is_video(path) and not _is_address(path))


def _is_address(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(("http://", "https://"))


def find_images(inputs: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """(path, name) of each image: files as given, and of folders all image files inside, sorted.

    The name is the file's, or its path within the folder.

    Raises:
        UsageError: nothing at an input, a video, or no image anywhere.
    """
    found = False
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir())
            for file in inside:
                found = True
                yield file, file.relative_to(path).as_posix()
        elif path.exists() and is_video(path):
            raise UsageError(f"{given!r} is a video; in Python, detr_fast.load(…).predict({given!r}) takes its frames")
        elif path.exists():
            found = True
            yield path, path.name
        else:
            raise UsageError(f"there is no file or folder {given!r}")
    if not found:
        raise UsageError(f"no image in {', '.join(map(repr, inputs))}; looked for {', '.join(IMAGE_SUFFIXES)}")


def batches_of_one_size(images: Sequence[Picture], transforms: Compose, batch_size: int) -> list[list[int]]:
    """Indices in batches of at most `batch_size` images that have one size once they are resized.

    Without padding a result does not depend on the images beside it. Batches stand in the order of their first images.

    Args:
        images: any sizes.
        transforms: those of the images; what they do to a size is asked of them.
        batch_size: at least 1.
    """
    groups: dict[Any, list[int]] = {}
    if batch_size == 1:  # no header need be read
        return [[index] for index in range(len(images))]
    for index, picture in enumerate(images):
        size = picture.size()
        # What cannot be read stands alone: nothing comes of it but a message.
        key = ("unread", index) if size is None else transforms.draw(size)[1]
        groups.setdefault(key, []).append(index)
    batches = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
    return sorted(batches)


class ResizedImages(Dataset):
    """Images for a model; an item is (uint8 image [3, h, w], what is known of it) or (index, the error of reading it).

    Args:
        images: the images.
        transforms: called as ``transforms(image, None)``.
    """

    def __init__(self, images: Sequence[Picture], transforms: Compose):
        self.images = images
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]] | tuple[int, ImageReadError]:
        try:
            image = self.images[index].read()
        except ImageReadError as error:
            return index, error
        tensor = self.transforms(image, None)[0]
        known = {"index": index, "image": image, "orig_size": (image.height, image.width)}
        return tensor, {**known, "size": tuple(tensor.shape[-2:])}


class CollateRead:
    """(batch or None, list of what is known of its images, list of (index, error))."""

    def __init__(self, collate: PackedCollate):
        self.collate = collate

    def __call__(self, items: Sequence) -> tuple:
        errors = [item for item in items if isinstance(item[1], ImageReadError)]
        read = [item for item in items if not isinstance(item[1], ImageReadError)]
        samples, known = self.collate(read) if read else (None, ())
        return samples, list(known), errors


def _from_array(image: np.ndarray | Tensor) -> Image.Image:
    """RGB from an array [H, W], [H, W, 1 or 3] or a tensor [1 or 3, H, W]; see `Picture`."""
    is_tensor, shape = isinstance(image, Tensor), tuple(image.shape)
    channels = shape[0 if is_tensor else -1] if len(shape) == 3 else 1
    if channels not in (1, 3) or 0 in shape or (len(shape) != 3 and (is_tensor or len(shape) != 2)):
        kind, expected = ("a tensor", "[3, H, W]") if is_tensor else ("an array", "[H, W, 3] or [H, W]")
        more = "; for several images give a list of them" if len(shape) == 4 else ""
        raise ValueError(f"an image is {kind} of shape {list(shape)}; expected {expected}{more}")
    # From here on [H, W, C] in numpy.
    if isinstance(image, Tensor):
        tensor = image.detach().cpu().permute(1, 2, 0)
        pixels = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    else:
        pixels = image if image.ndim == 3 else image[:, :, None]
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # NaN, too
            raise ValueError(
                f"an image of floats is in {low:.3g}..{high:.3g}; expected 0..1, not normalised with mean and standard "
                "deviation (0..255 as uint8)"
            )
        pixels = np.round(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise TypeError(f"an image has dtype {image.dtype}; expected uint8, or floats in 0..1")
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))


def _fetch(address: str, upright: bool) -> Image.Image:
    request = urllib.request.Request(address, headers={"User-Agent": "detr_fast"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            data = response.read()
    except (OSError, http.client.HTTPException, ValueError) as error:  # a bad address is a ValueError
        reason = getattr(error, "reason", error)
        raise ImageReadError(
            f"could not get {address}: {reason}. Download it elsewhere and give the file's path", address
        ) from error
    try:
        return to_rgb(Image.open(io.BytesIO(data)), upright=upright)
    except MemoryError:
        raise
    except Exception as error:  # what a decoder raises on damaged data differs from format to format
        raise CorruptImageError(f"what {address} gives cannot be decoded as an image", address) from error
