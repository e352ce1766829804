"""Image files of any format and mode, whole, damaged, and with a header that lies.

RGB comes out, or an ImageReadError that names the file; and all ways in agree on which of the two, and on the pixels.
"""

import json
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import fuzz
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

import detr_fast
from detr_fast.data import CocoDetection, check_coco
from detr_fast.data.images import ImageReadError, load_image, load_image_tensor
from tests.inference.tiny_models import checkpoint_of

# How PIL is asked to write each; of several frames or pages the first counts.
FORMATS = {
    "PNG": {}, "APNG": {"format": "PNG", "save_all": True}, "JPEG": {},
    "progressive JPEG": {"format": "JPEG", "progressive": True, "quality": 95, "subsampling": 0},
    "BMP": {}, "GIF": {}, "animated GIF": {"format": "GIF", "save_all": True},
    "TIFF": {}, "LZW TIFF": {"format": "TIFF", "compression": "tiff_lzw"},
    "TIFF pages": {"format": "TIFF", "save_all": True},
    "WEBP": {}, "animated WEBP": {"format": "WEBP", "save_all": True}, "PPM": {}, "JPEG2000": {},
}  # fmt: skip
LOSSLESS = ("PNG", "APNG", "BMP", "TIFF", "LZW TIFF", "TIFF pages", "PPM")
MODES = "1 L LA P PA RGB RGBA RGBX CMYK YCbCr HSV LAB I I;16 F".split()
files = dict(
    seed=st.integers(0, 2**32 - 1),
    format=st.sampled_from(sorted(FORMATS)),
    mode=st.sampled_from(MODES),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
ORIENTATION = 0x0112
JPEG = b"\xff\xd8"  # torchvision's decoder takes some that PIL does not
# A few pixels more or less, none, megapixels, and more than PIL's limit allows.
SIDES = st.sampled_from([0, 1, 5, 39, 41, 1500, 30000, 65535])
damages = dict(
    length=st.just(1) | st.floats(0, 1),
    places=st.lists(st.floats(0, 1, exclude_max=True), max_size=8),
    value=st.sampled_from([0x00, 0x01, 0x7F, 0x80, 0xFF]),
)


def pixels_of(seed, size):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def in_mode(image, mode):
    if mode == "I;16":
        return image.convert("L").convert("I").convert("I;16")
    return Image.merge("LAB", image.split()) if mode == "LAB" else image.convert(mode)


def write(path, seed, format, mode, size, orientation=1):
    """Whether PIL can write this mode in this format."""
    options = {"format": format, **FORMATS[format]}
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    try:
        if options.get("save_all"):
            options["append_images"] = [in_mode(Image.fromarray(pixels_of(seed + 1, size)), mode)]
        in_mode(Image.fromarray(pixels_of(seed, size)), mode).save(path, **options)
    except (ValueError, OSError, KeyError):
        return False
    return True


def damaged(data, length, places, value):
    data = bytearray(data[: int(len(data) * length)])
    for place in places if data else ():
        data[int(place * len(data))] = value
    return bytes(data)


def with_stated_size(data, width, height):
    """An image file whose header states another size; the data as they are, where the format has none to change."""
    data = bytearray(data)
    if data[:4] == b"\x89PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif data[:2] == b"\xff\xd8":
        place = max(data.find(b"\xff\xc0\0"), data.find(b"\xff\xc2\0"))
        data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    elif data[:2] == b"BM":
        data[18:26] = struct.pack("<ii", width, height)
    elif data[:3] == b"GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif data[:4] == b"II*\0":
        start = struct.unpack_from("<I", data, 4)[0]
        for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
            tag = struct.unpack_from("<H", data, entry)[0]
            if tag in (256, 257):
                struct.pack_into("<HII", data, entry + 2, 4, 1, width if tag == 256 else height)
    elif data[:1] == b"P":
        magic, _, _, rest = data.split(maxsplit=3)
        data = magic + b" %d %d " % (width, height) + rest
    return bytes(data)


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
    if format in LOSSLESS and mode in ("RGB", "L", "1"):
        expected = in_mode(Image.fromarray(pixels_of(seed, size)), mode).convert("RGB")
        assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.filterwarnings("ignore")
@fuzz(2000)
@given(**files, **damages)
def test_damaged_files(seed, format, mode, size, length, places, value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        assume(write(path, seed, format, mode, size))
        data = damaged(path.read_bytes(), length, places, value)
        path.write_bytes(data)
        for load in (load_image, load_image_tensor):
            try:
                image = load(path)
            except ImageReadError as error:
                assert str(path) in str(error)
            else:
                assert (image.mode == "RGB") if load is load_image else (image.dim() == 3 and len(image) == 3)
                if data[:2] != JPEG:
                    with Image.open(path) as own:
                        own.load()  # what PIL does not decode is no image of ours either


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "checkpoint.pth"
    torch.save(checkpoint_of(image_size=32), path)
    return detr_fast.load(path, device="cpu")


@pytest.mark.filterwarnings("ignore")
@fuzz(2000)
@given(
    **files,
    **damages,
    orientation=st.integers(1, 8),
    lie=st.none() | st.tuples(SIDES, SIDES),
    annotated=st.sampled_from(["own", "own", "turned", "other", "none"]),
)
def test_every_way_in_agrees(detector, seed, format, mode, size, length, places, value, orientation, lie, annotated):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, annotations = folder / "image.png", folder / "ann.json"
        assume(write(path, seed, format, mode, size, orientation))
        data = path.read_bytes() if lie is None else with_stated_size(path.read_bytes(), *lie)
        path.write_bytes(damaged(data, length, places, value))
        stated = {"own": size, "turned": size[::-1], "other": (size[0] + 7, size[1]), "none": None}[annotated]
        entry = {"id": 1, "file_name": path.name}
        entry |= {} if stated is None else {"width": stated[0], "height": stated[1]}
        box = {"id": 1, "image_id": 1, "category_id": 5, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0}
        content = {"images": [entry], "annotations": [box], "categories": [{"id": 5, "name": "dot"}]}
        annotations.write_text(json.dumps(content))

        def tried(call):
            """What the call gives; None where it refuses the file."""
            try:
                return call()
            except ImageReadError as error:
                assert str(path) in str(error) and len(str(error)) > len(str(path)) + 20
                return None

        found = {
            "load_image": tried(lambda: load_image(path, size=stated)),
            "load_image_tensor": tried(lambda: load_image_tensor(path, size=stated)),
            "as stored": tried(lambda: load_image(path)),
            "upright": tried(lambda: load_image(path, upright=True)),
            "data set": tried(lambda: CocoDetection(folder, annotations, None)[0]),
            "data set of tensors": tried(lambda: CocoDetection(folder, annotations, None, tensor_images=True)[0]),
            "predict": tried(lambda: detector.predict(path, 0.0, ignore_exif=True)),
        }
        report = check_coco(folder, annotations, num_threads=1)
        refused = {way for way, result in found.items() if result is None}
        assert refused in (set(), set(found)), refused
        assert report.ok == (not refused), str(report)
        if refused:
            assert str(path) in str(report)
            return
        image, tensor = found["load_image"], found["load_image_tensor"]
        assert image.mode == "RGB" and tensor.shape == (3, *image.size[::-1]) and tensor.dtype == torch.uint8
        assert np.array_equal(np.asarray(found["data set"][0]), np.asarray(image))
        assert torch.equal(found["data set of tensors"][0], tensor)
        for way in ("data set", "data set of tensors"):
            assert found[way][1]["orig_size"].tolist() == [*image.size[::-1]]
        if data == path.read_bytes() and lie is None:
            assert np.abs(tensor.permute(1, 2, 0).numpy().astype(int) - np.asarray(image)).max() <= 2
        assert found["predict"].size == found["as stored"].size[::-1]
        # The file and its pixels go into one batch, and give the same detections.
        both = detector.predict([path, found["upright"]], 0.0, batch_size=2)
        assert both[0].size == both[1].size == found["upright"].size[::-1]
        np.testing.assert_allclose(both[0].boxes, both[1].boxes, rtol=0, atol=1e-4 * max(both[0].size))
        np.testing.assert_allclose(both[0].scores, both[1].scores, rtol=0, atol=1e-4)
