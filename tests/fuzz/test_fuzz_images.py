"""Image files of any format and mode, whole and damaged: RGB comes out, or an ImageReadError."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from fuzzing import fuzz
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from detr_fast.data.images import ImageReadError, load_image, load_image_tensor

FORMATS = ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"]
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]
files = dict(
    seed=st.integers(0, 2**32 - 1),
    format=st.sampled_from(FORMATS),
    mode=st.sampled_from(MODES),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)


def write(path, seed, format, mode, size):
    """Whether PIL can write this mode in this format."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    try:
        image = Image.fromarray(pixels)
        (image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)).save(path, format)
    except (ValueError, OSError, KeyError):
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@fuzz(2000)
@given(**files)
def test_whole_files(seed, format, mode, size):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        assume(write(path, seed, format, mode, size))
        image, tensor = load_image(path), load_image_tensor(path)
    assert image.mode == "RGB" and image.size == size
    # torchvision and PIL may bring their own JPEG decoders.
    assert np.abs(tensor.permute(1, 2, 0).numpy().astype(int) - np.asarray(image)).max() <= 2


@pytest.mark.filterwarnings("ignore")
@fuzz(2000)
@given(
    **files,
    length=st.floats(0, 1),
    places=st.lists(st.floats(0, 1, exclude_max=True), max_size=8),
    value=st.sampled_from([0x00, 0x01, 0x7F, 0x80, 0xFF]),
)
def test_damaged_files(seed, format, mode, size, length, places, value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        assume(write(path, seed, format, mode, size))
        data = bytearray(path.read_bytes())
        data = data[: int(len(data) * length)]
        for place in places if data else ():
            data[int(place * len(data))] = value
        path.write_bytes(data)
        for load in (load_image, load_image_tensor):
            try:
                image = load(path)
            except ImageReadError as error:
                assert str(path) in str(error)
            else:
                assert (image.mode == "RGB") if load is load_image else (image.dim() == 3 and len(image) == 3)
