"""`Detector.predict`: every kind of image, batches without padding, and what the results give."""

import functools
import http.server
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

import detr_fast
from detr_fast.data.images import ImageReadError
from detr_fast.inference.detector import Detector
from tests.inference.tiny_models import checkpoint_of

SIZES = [(90, 70), (70, 90), (90, 70), (64, 64), (180, 140)]  # the first, third and last are one size once resized


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "inside").mkdir()
    for number, image in enumerate(images):
        image.save(folder / ("inside" if number > 2 else "") / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def model(run_folder) -> Detector:
    return detr_fast.load(run_folder, device="cpu")


@pytest.fixture(scope="module")
def server(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def same(found, expected):
    """To 1e-5 of the image's size."""
    assert found.size == expected.size
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=1e-5 * max(expected.size))
    assert found.class_id.tolist() == expected.class_id.tolist()


def forms(path, image):
    """The image in every form but an address."""
    array, tensor = np.array(image), pil_to_tensor(image)
    return {
        "path": path,
        "text": str(path),
        "PIL": image,
        "array": array,
        "array of another order": np.asfortranarray(array),
        "array of floats": array / 255,
        "uint8 tensor": tensor,
        "float tensor": tensor / 255,
        "floats a little lower": (tensor / 255 - 1e-4).clamp(min=0),
        "double tensor": tensor.double() / 255,
        "tensor of another order": torch.from_numpy(array).permute(2, 0, 1),
        "tensor with a gradient": (tensor / 255).requires_grad_(),
    }


def test_all_forms_of_an_image_agree(model, images, folder, server):
    expected = model.predict(images[0], 0)
    assert len(expected) == 5 and expected.size == (70, 90) and expected.path is None
    given = forms(folder / "0.png", images[0])
    for name, form in given.items():
        found = model.predict(form, 0)
        same(found, expected)
        assert found.path == (str(folder / "0.png") if name in ("path", "text") else None)
    for found in model.predict([*given.values(), f"{server}/0.png"], 0, batch_size=4):
        same(found, expected)
    address = model.predict(f"{server}/0.png", 0)
    same(address, expected)
    assert address.path == f"{server}/0.png"


def test_grey_images_agree(model, images, tmp_path):
    grey = images[0].convert("L")
    grey.save(tmp_path / "grey.png")
    array = np.array(grey)
    expected = model.predict(grey.convert("RGB"), 0)
    tensor = torch.from_numpy(array)[None]
    for form in (grey, tmp_path / "grey.png", array, array[:, :, None], tensor, tensor / 255):
        same(model.predict(form, 0), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_equal_one_by_one(model, images, batch_size):
    found = model.predict(images, 0, batch_size=batch_size)
    assert isinstance(found, list) and len(found) == len(images)
    for one, image in zip(found, images, strict=True):
        same(one, model.predict(image, 0))


def test_only_images_of_one_size_are_computed_together(model, images, monkeypatch):
    shapes = []
    hook = model.model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].tensors.shape)))
    model.predict(images, batch_size=2)
    hook.remove()
    assert shapes == [(2, 3, 64, 82), (1, 3, 82, 64), (1, 3, 64, 64), (1, 3, 64, 82)]


def test_folders_and_lists_keep_their_order(model, images, folder):
    found = model.predict(folder, 0)
    assert [one.path for one in found] == [
        str(folder / name) for name in ("0.png", "1.png", "2.png", "inside/3.png", "inside/4.png")
    ]
    for one, image in zip(found, images, strict=True):
        same(one, model.predict(image, 0))
    mixed = model.predict([images[1], folder / "inside", np.array(images[0])], 0)
    for one, index in zip(mixed, (1, 3, 4, 0), strict=True):
        same(one, found[index])
    assert len(model.predict(folder.glob("*.png"))) == 3
    assert model.predict([]) == [] and len(model.predict([images[0]])) == 1


@pytest.mark.parametrize(
    "image, error, message",
    [
        (np.zeros((3, 40, 50), np.uint8), ValueError, r"array of shape \[3, 40, 50\]; expected \[H, W, 3\]"),
        (torch.zeros(40, 50, 3), ValueError, r"tensor of shape \[40, 50, 3\]; expected \[3, H, W\]"),
        (torch.zeros(2, 3, 40, 50), ValueError, "for several images give a list"),
        (np.zeros((0, 40, 3), np.uint8), ValueError, r"shape \[0, 40, 3\]"),
        (Image.new("RGB", (0, 40)), ValueError, "PIL image of 0x40 pixels; expected one at least"),
        (np.zeros((40, 50, 3), np.int64), TypeError, "dtype int64; expected uint8, or floats in 0..1"),
        (torch.full((3, 40, 50), 200.0), ValueError, "floats is in 200..200; expected 0..1"),
        (torch.randn(3, 40, 50), ValueError, "not normalised"),
        (torch.full((3, 40, 50), float("nan")), ValueError, "nan"),
        (7, TypeError, "images is a int; expected a path, an address, a PIL image"),
        ([None], TypeError, "an image is a NoneType"),
        ("absent.jpg", ImageReadError, "absent.jpg does not exist"),
        ("http://127.0.0.1:9/x.jpg", ImageReadError, "could not get http.*refused.*give the file's path"),
    ],
    ids=lambda value: (
        f"{type(value).__name__}{list(getattr(value, 'shape', None) or getattr(value, 'size', None) or [])}"
        if hasattr(value, "shape") or hasattr(value, "size")
        else str(value)
    ),
)
def test_what_is_no_image_is_refused(model, image, error, message):
    with pytest.raises(error, match=message):
        model.predict(image)


def test_images_that_cannot_be_read_are_named(model, folder, tmp_path, server):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(ImageReadError, match="broken.jpg"):
        model.predict([folder / "0.png", tmp_path / "broken.jpg"])
    with pytest.raises(ImageReadError, match="notes.txt gives cannot be decoded"):
        model.predict(f"{server}/notes.txt")
    with pytest.raises(ImageReadError, match="[Nn]ot found"):
        model.predict(f"{server}/absent.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in"):
        model.predict(tmp_path / "empty")


def test_ranges_are_checked(model, images):
    with pytest.raises(ValueError, match="threshold must be in 0..1, got 50"):
        model.predict(images[0], 50)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.predict(images[0], batch_size=0)


def test_results_as_coco(model, images):
    found = model.predict(images[0], 0)
    entries = found.to_coco(image_id=7)
    assert [entry["image_id"] for entry in entries] == [7] * 5
    corners = found.boxes.astype(float)
    corners[:, 2:] -= corners[:, :2]
    np.testing.assert_allclose([entry["bbox"] for entry in entries], corners, atol=1e-3)
    assert [entry["category_name"] for entry in entries] == found.class_name
    assert "image_id" not in found.to_coco()[0]


def test_selections(model, images):
    found = model.predict(images[0], 0)
    chosen = found[found.scores > found.scores[2]]
    assert len(chosen) == 2 and len(found[1:]) == 4 and len(found[0]) == 1
    np.testing.assert_array_equal(found[[3, 1]].boxes, found.boxes[[3, 1]])
    assert found[2:3].class_name == found.class_name[2:3]
    assert repr(found[:1]) == f"Detections({found.class_name[0]} {found.scores[0]:.2f})"
    assert [len(one) for one in found] == [1] * 5
    none = model.predict(images[0], 1)
    assert len(none) == 0 and none.boxes.shape == (0, 4) and none.to_coco() == [] and repr(none) == "Detections()"


def test_plots(model, images, folder):
    plain = model.predict(images[0], 1).plot()
    drawn = model.predict(folder / "0.png", 0).plot()
    assert drawn.size == plain.size == (540, 420) and drawn.tobytes() != plain.tobytes()
    assert drawn.tobytes() == model.predict(images[0], 0).plot().tobytes()


def test_lines(tmp_path, images):
    state = checkpoint_of(dataset_file="lines", num_classes=1)
    del state["categories"]
    torch.save(state, tmp_path / "lines.pth")
    model = detr_fast.load(tmp_path / "lines.pth", device="cpu")
    found = model.predict(images[0], 0)
    assert found.lines.shape == (5, 4) and found.masks is None and found.class_name == ["class 0"] * 5
    x1, y1, x2, y2 = found.lines.T
    np.testing.assert_array_equal(
        found.boxes.T, [np.minimum(x1, x2), np.minimum(y1, y2), np.maximum(x1, x2), np.maximum(y1, y2)]
    )
    np.testing.assert_allclose(
        [e["line"] for e in found.to_coco()], np.stack([x1, y1, x2 - x1, y2 - y1], -1), atol=2e-3
    )
    assert "category_name" not in found.to_coco()[0]


def test_supervision(model, images, monkeypatch):
    supervision = pytest.importorskip("supervision")
    found = model.predict(images[0], 0)
    converted = found.to_supervision()
    assert isinstance(converted, supervision.Detections)
    np.testing.assert_array_equal(converted.xyxy, found.boxes)
    assert converted.data["class_name"].tolist() == found.class_name


def test_supervision_is_optional(model, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        model.predict(images[0]).to_supervision()


def test_wide_pixels_by_path_and_as_an_image(model, tmp_path):
    """16-bit pixels are scaled in both ways; PIL's own conversion makes them white."""
    pixels = (np.arange(60 * 80).reshape(60, 80) * 13).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    with Image.open(tmp_path / "wide.png") as image:
        assert image.mode.startswith("I")
        same(model.predict(image, 0), model.predict(tmp_path / "wide.png", 0))


def test_a_lazily_opened_file_that_is_cut_off_is_named(model, images, tmp_path):
    images[0].resize((400, 300)).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "cut.jpg") as image, pytest.raises(ImageReadError, match="cut.jpg cannot be decoded"):
        model.predict(image)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_lazily_opened_png_that_is_damaged_is_named(model, images, tmp_path, batch_size):
    """PIL raises that once only, here when the orientation is read, and gives a black image afterwards."""
    images[0].save(tmp_path / "damaged.png")
    data = bytearray((tmp_path / "damaged.png").read_bytes())
    data[data.index(b"IDAT") + 8] ^= 0x55
    (tmp_path / "damaged.png").write_bytes(data)
    with Image.open(tmp_path / "damaged.png") as image, pytest.raises(ImageReadError, match="damaged.png cannot be"):
        model.predict([images[1], image], batch_size=batch_size)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_by_exif(model, images, tmp_path, orientation):
    """A photo that is stored sideways has the detections of the upright one, in its pixels, from wherever it comes."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    images[0].save(path, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    expected = model.predict(upright, 0)
    assert expected.size == ((90, 70) if orientation > 4 else (70, 90))
    with Image.open(path) as opened:
        # In one batch with an image of the upright size: what is grouped by size is the upright size.
        found = [*model.predict([path, opened, upright], 0, batch_size=3), model.predict(path, 0)]
    for one in found:
        same(one, expected)
    assert found[0].plot().size == found[2].plot().size
    for image in (path, Image.open(path)):
        same(model.predict(image, 0, ignore_exif=True), model.predict(images[0], 0))
