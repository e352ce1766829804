"""Image files: upright by EXIF, the limit on pixels, and files outside their folder."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from detr_fast.data.images import (
    CorruptImageError,
    header_size,
    leaves_folder,
    load_image,
    load_image_tensor,
    load_segment_ids,
    to_rgb,
    upright_size,
)

ORIENTATION = 0x0112
# Where a pixel of the upright image is stored, for each orientation (EXIF 2.3, 4.6.4.A): row and column of the upright
# image as a function of those in the file, and its size.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


def save(path, orientation, mode="RGB"):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8))
    image = image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name, mode", [("a.jpg", "RGB"), ("a.png", "L"), ("a.png", "P"), ("a.png", "I;16"),
                                        ("a.webp", "RGB"), ("a.jpg", "CMYK")])  # fmt: skip
def test_upright_by_exif(tmp_path, orientation, name, mode):
    path = save(tmp_path / name, orientation, mode)
    stored, upright = load_image(path), load_image(path, upright=True)
    assert stored.size == (10, 6)
    assert np.array_equal(np.asarray(upright), UPRIGHT[orientation](np.asarray(stored)))
    with Image.open(path) as image:
        assert upright_size(image) == upright.size
        assert np.array_equal(np.asarray(to_rgb(image, upright=True)), np.asarray(upright))
    # Turned once, and not again by whoever gets the image.
    assert orientation == 1 or ImageOps.exif_transpose(upright).size == upright.size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_is_turned_by_pil_and_not_again(tmp_path, orientation):
    path = save(tmp_path / "a.tif", orientation)
    with Image.open(path) as image:
        expected = np.asarray(image)
    for options in ({}, {"upright": True}, {"size": (6, 10)}, {"size": (10, 6)}):
        assert np.array_equal(np.asarray(load_image(path, **options)), expected)
        assert header_size(path, options.get("size")) == expected.shape[1::-1]


def test_damaged_exif_is_none(tmp_path):
    path = save(tmp_path / "a.jpg", 6)
    path.write_bytes(path.read_bytes().replace(b"MM\0*", b"MM\0\xff").replace(b"II*\0", b"II\xff\0"))
    assert load_image(path, upright=True).size == load_image(path).size == header_size(path) == (10, 6)


def jpeg_of(width, height):
    """A small file whose header states another size."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_of(width, height):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"x"), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("load", [load_image, load_image_tensor, load_segment_ids])
@pytest.mark.parametrize("name, data", [("a.jpg", jpeg_of(60000, 60000)), ("a.png", png_of(2**30, 2**30))])
def test_images_beyond_the_limit_are_refused_before_they_are_decoded(tmp_path, monkeypatch, load, name, data):
    def decode(*_):
        raise AssertionError("a decoder was asked")

    monkeypatch.setattr("detr_fast.data.images.decode_jpeg", decode)
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(
        CorruptImageError, match=f"{re.escape(str(path))} cannot be decoded: it has more than 178956970 pixels"
    ):
        load(path)


def test_the_limit_is_pils(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (20, 20)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    for load in (load_image, load_image_tensor):
        with pytest.raises(CorruptImageError, match="more than 398 pixels"):
            load(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image_tensor(path).shape == (3, 20, 20)


LEAVING = ["../a.jpg", "sub/../../a.jpg", "..", "/etc/passwd", "//etc/passwd", "sub\\..\\..\\a.jpg", "..\\a.jpg",
           "\\a.jpg", "./../a.jpg", "../images2/a.jpg", "../imag/../a.jpg"]  # fmt: skip
STAYING = ["a.jpg", "sub/a.jpg", "sub/../a.jpg", "./a.jpg", "..a.jpg", "a..jpg", "sub/..a/b.jpg", "../images/a.jpg",
           "sub\\a.jpg", "a b/c.jpg"]  # fmt: skip


@pytest.mark.parametrize("end", ["", "/", "/."])
def test_leaves_folder(tmp_path, end):
    folder = f"{tmp_path}/images{end}"
    assert [name for name in LEAVING if not leaves_folder(folder, name)] == []
    assert [name for name in (*STAYING, f"{tmp_path}/images/a.jpg") if leaves_folder(folder, name)] == []


def damaged_png(path):
    """A file of which one byte within the compressed pixels is wrong."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (72, 96, 3), dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 0x55
    path.write_bytes(data)
    return path


def test_a_damaged_png_is_refused_and_never_black(tmp_path):
    """Looking for its orientation meets the damage first, and PIL raises that once only."""
    path = damaged_png(tmp_path / "a.png")
    for load in (load_image, load_image_tensor, lambda path: load_image(path, upright=True)):
        with pytest.raises(CorruptImageError, match="a.png cannot be decoded"):
            load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for load in (load_image, load_image_tensor):
        with pytest.raises(CorruptImageError, match="a.png cannot be decoded: it is a pipe"):
            load(tmp_path / "a.png")
    assert header_size(tmp_path / "a.png") is None
