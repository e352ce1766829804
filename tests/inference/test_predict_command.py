"""`detr-fast predict` is `Detector.predict` with files: the same detections, in order, however they are batched."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import detr_fast
from detr_fast.cli import main
from tests.inference.tiny_models import checkpoint_of

SIZES = [(90, 70), (70, 90), (90, 70), (64, 64), (180, 140)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(2)
    for number, (w, h) in enumerate(SIZES):
        Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def predict(folder, weights, output_dir, *flags):
    argv = ["predict", str(folder), "--weights", str(weights), "--output_dir", str(output_dir), "--device", "cpu"]
    assert main([*argv, "--threshold", "0", *flags]) == 0
    return json.loads((output_dir / "predictions.json").read_text())


def test_files_have_the_objects_detections(folder, run_folder, tmp_path):
    written = predict(folder, run_folder, tmp_path)  # the run's folder
    expected = [
        {"image_id": number, "file_name": f"{number - 1}.png", **entry}
        for number, found in enumerate(detr_fast.load(run_folder, device="cpu").predict(folder, 0), 1)
        for entry in found.to_coco()
    ]
    assert written == expected and {entry["category_name"] for entry in written} <= {"dot", "bar"}
    assert list(written[0]) == ["image_id", "file_name", "category_id", "bbox", "score", "category_name"]


def test_batches_do_not_change_results(folder, run_folder, tmp_path):
    single = predict(folder, run_folder, tmp_path / "1")
    batched = predict(folder, run_folder, tmp_path / "4", "--batch_size", "4")
    assert [entry["file_name"] for entry in batched] == [entry["file_name"] for entry in single]
    for one, other in zip(batched, single, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=2e-3)  # written with three decimals
    for name in ("1", "4"):
        described = json.loads((tmp_path / name / "images.json").read_text())
        assert [(image["width"], image["height"]) for image in described] == SIZES
        assert len(list((tmp_path / name).glob("*.jpg"))) == len(SIZES)


def test_classes_without_a_name_have_none(folder, tmp_path):
    state = checkpoint_of(num_classes=7)
    del state["categories"]
    torch.save(state, tmp_path / "seven.pth")
    assert "category_name" not in predict(folder, tmp_path / "seven.pth", tmp_path / "out")[0]


def test_images_are_upright_unless_told_or_the_annotations_say_otherwise(folder, run_folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.open(folder / "0.png").save(tmp_path / "images" / "0.png", exif=exif)
    for number, (flags, stated, size) in enumerate([
        ([], None, (70, 90)),
        (["--ignore_exif"], None, (90, 70)),
        ([], (90, 70), (90, 70)),  # the annotations are of the pixels as they are stored
        ([], (70, 90), (70, 90)),
    ]):  # fmt: skip
        if stated is not None:
            image = {"id": 7, "file_name": "0.png", "width": stated[0], "height": stated[1]}
            ann = tmp_path / "ann.json"
            ann.write_text(json.dumps({"images": [image], "annotations": [], "categories": []}))
            flags = ["--ann", str(ann)]
        output = tmp_path / str(number)
        written = predict(tmp_path / "images", run_folder, output, *flags)
        (image,) = json.loads((output / "images.json").read_text())
        assert (image["width"], image["height"]) == size and image["id"] == (7 if stated else 1)
        with Image.open(output / "0.jpg") as picture:
            assert (picture.width < picture.height) == (size[0] < size[1])
        if size == (90, 70):  # as without EXIF data
            expected = [e for e in predict(folder, run_folder, tmp_path / "plain") if e["file_name"] == "0.png"]
            assert [e["bbox"] for e in written] == [e["bbox"] for e in expected]
