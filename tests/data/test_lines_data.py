"""Lines: the generated data set, the data set class and its augmentation."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data import build_dataset
from detr_fast.data.generate.wireframes import STRUCTURES, make_lines_dataset
from detr_fast.data.lines import LineDetection, make_line_transforms
from detr_fast.data.transforms import crop, hflip, resize, vflip
from detr_fast.geometry.lines import crop_lines, hflip_lines, ordered_ends, vflip_lines


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_lines_dataset(tmp_path_factory.mktemp("lines"), num_train=6, num_val=3, image_size=64)


def dataset(root, transforms=None, split="train", **kwargs):
    return LineDetection(root / f"{split}2017", root / "annotations" / f"lines_{split}2017.json", transforms, **kwargs)


def test_items_hold_the_annotated_lines(root):
    data = dataset(root)
    assert len(data) == 6 and data.categories.num_classes == 1 and data.class_names == {0: "line"}
    content = json.loads((root / "annotations" / "lines_train2017.json").read_text())
    for index in range(6):
        image, target = data[index]
        expected = [entry["line"] for entry in content["annotations"] if entry["image_id"] == index]
        lines = torch.tensor([[x, y, x + dx, y + dy] for x, y, dx, dy in expected])
        torch.testing.assert_close(target["lines"], lines)
        assert target["labels"].tolist() == [0] * len(lines) and target["image_id"].tolist() == [index]
        assert target["orig_size"].tolist() == target["size"].tolist() == [image.height, image.width]
        assert torch.equal(ordered_ends(target["lines"]), target["lines"])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_generated_lines_are_where_the_picture_is_bright(tmp_path, structure):
    make_lines_dataset(tmp_path, num_train=4, num_val=0, image_size=96, max_structures=1, structures=[structure])
    data = dataset(tmp_path)
    for image, target in data:
        pixels = np.asarray(image).mean(axis=2)
        assert len(target["lines"]) == {"segment": 1, "box": 4, "grid": 5, "cuboid": 9}[structure]
        for x1, y1, x2, y2 in target["lines"].tolist():
            for t in np.linspace(0.1, 0.9, 9):
                assert pixels[int(y1 + t * (y2 - y1)), int(x1 + t * (x2 - x1))] > 150
        assert (pixels > 150).mean() < 0.3


def test_generation_is_reproducible_and_guards_its_folder(tmp_path, root):
    again = make_lines_dataset(tmp_path / "again", num_train=2, num_val=1, image_size=64)
    for path in ("train2017/00000001.jpg", "val2017/00000000.jpg"):
        assert (again / path).read_bytes() == (root / path).read_bytes()
    make_lines_dataset(again, num_train=1, num_val=1)  # its own files may go
    (again / "annotations" / "lines_val2017.json").write_text("{}")
    with pytest.raises(FileExistsError, match="not generated here"):
        make_lines_dataset(again, num_train=1, num_val=1)
    with pytest.raises(ValueError, match="structures must be"):
        make_lines_dataset(tmp_path / "x", structures=["circle"])
    with pytest.raises(ValueError, match="image_size"):
        make_lines_dataset(tmp_path / "x", image_size=4)


def write(root, annotations, categories=({"id": 0, "name": "line"},)):
    for folder in ("train2017", "annotations"):
        (root / folder).mkdir(exist_ok=True)
    Image.new("RGB", (40, 20)).save(root / "train2017" / "a.jpg")
    content = {
        "images": [{"id": 0, "file_name": "a.jpg", "width": 40, "height": 20}],
        "annotations": annotations, "categories": list(categories),
    }  # fmt: skip
    (root / "annotations" / "lines_train2017.json").write_text(json.dumps(content))
    return root


def test_letrs_own_files_lines_outside_and_images_without(tmp_path):
    entry = {"id": 0, "image_id": 0, "category_id": 0, "line": [-5, 10, 60, 15], "area": 1}
    _, target = dataset(write(tmp_path, [entry], [{"supercategory": "line", "id": "0", "name": "line"}]))[0]
    assert target["lines"].tolist() == [[0, 10, 40, 20]] and target["iscrowd"].tolist() == [0]
    _, target = dataset(write(tmp_path, []))[0]
    assert target["lines"].shape == (0, 4) and target["lines"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64


@pytest.mark.parametrize("line", [None, [1, 2, 3], [1, 2, 3, "4"], {"x": 1}])
def test_malformed_lines_are_refused(tmp_path, line):
    with pytest.raises(ValueError, match=r"annotation 5 \(image 0\) has line"):
        dataset(write(tmp_path, [{"id": 5, "image_id": 0, "category_id": 0, "line": line}]))


def test_flips_keep_the_left_end_first():
    lines = torch.tensor([[1.0, 2.0, 8.0, 3.0], [4.0, 1.0, 4.0, 6.0]])
    assert hflip_lines(lines, 10).tolist() == [[2, 3, 9, 2], [6, 1, 6, 6]]
    assert vflip_lines(lines, 10).tolist() == [[1, 8, 8, 7], [4, 4, 4, 9]]
    assert torch.equal(hflip_lines(hflip_lines(lines, 10), 10), lines)


def test_crop_cuts_lines_at_the_border():
    lines = torch.tensor([
        [0.0, 0.0, 20.0, 20.0],  # through both corners
        [6.0, 7.0, 9.0, 8.0],  # inside
        [0.0, 8.0, 30.0, 8.0],  # level
        [7.0, 0.0, 7.0, 9.0],  # upright, one end inside
        [0.0, 12.0, 12.0, 0.0],  # touches nothing of it but passes near
        [0.0, 0.0, 3.0, 30.0],  # left of it
        [0.0, 30.0, 30.0, 30.0],  # below
    ])  # fmt: skip
    left, keep = crop_lines(lines, top=5, left=5, height=10, width=10)
    assert keep.tolist() == [True, True, True, True, True, False, False]
    expected = [[0, 0, 10, 10], [1, 2, 4, 3], [0, 3, 10, 3], [2, 0, 2, 4], [0, 2, 2, 0]]
    torch.testing.assert_close(left[keep], torch.tensor(expected, dtype=torch.float32))
    # The end that is cut stays on the line, whatever its slope: points of random lines before and after.
    generator = torch.Generator().manual_seed(0)
    lines = ordered_ends(torch.rand(500, 4, generator=generator) * 30)
    left, keep = crop_lines(lines, 5, 5, 10, 10)
    t = torch.linspace(0, 1, 2001)[:, None]
    for before, after, kept in zip(lines - 5, left, keep.tolist(), strict=True):
        points = before[:2] + t * (before[2:] - before[:2])
        inside = points[((points >= 0) & (points <= 10)).all(dim=1)]
        assert kept == bool(len(inside)) or len(inside) <= 1
        if kept and len(inside) > 1:
            torch.testing.assert_close(after, torch.cat((inside[0], inside[-1])), rtol=0, atol=0.05)


def test_image_and_lines_move_together():
    """Every augmentation moves the ends as it moves the pixels."""
    image = Image.new("RGB", (60, 40))
    ends = [(10, 8), (50, 30)]
    for x, y in ends:
        for dx, dy in np.ndindex(5, 5):
            image.putpixel((x + dx - 2, y + dy - 2), (255, 255, 255))
    target = {"lines": torch.tensor([[10.5, 8.5, 50.5, 30.5]]), "labels": torch.zeros(1, dtype=torch.int64)}
    for step in (hflip, vflip, lambda *a: resize(*a, 80), lambda *a: crop(*a, (2, 4, 36, 52))):
        moved, result = step(image, target)
        pixels = np.asarray(moved)[..., 0]
        for x, y in result["lines"].reshape(-1, 2).tolist():
            assert pixels[int(y), int(x)] > 200
    with pytest.raises(ValueError, match="vflip takes targets with lines"):
        vflip(image, {"boxes": torch.zeros(0, 4)})


def test_transforms_normalise_and_plan(root):
    args = argparse.Namespace(dataset_file="lines", coco_path=str(root), image_size=48)
    for split, uint8 in (("train", True), ("val", False)):
        data = build_dataset(split, args, uint8=uint8)
        assert isinstance(data, LineDetection) and data.can_plan
        for index in range(len(data)):
            image, target = data[index]
            assert image.dtype == (torch.uint8 if uint8 else torch.float32)
            assert ((target["lines"] >= 0) & (target["lines"] <= 1)).all()
            assert len(target["lines"]) == len(target["labels"]) == len(target["area"])
            assert target["size"].tolist() == list(image.shape[-2:])
    assert image.shape[-2:].numel() and min(image.shape[-2:]) == 48
    before = dataset(root, split="val")[2][1]
    expected = before["lines"] / before["orig_size"].flip(0).repeat(2)
    torch.testing.assert_close(target["lines"], expected)


def test_original_sizes_and_bad_arguments():
    train, val = (make_line_transforms(name) for name in ("train", "val"))
    assert val.transforms[0].sizes == [1100] and val.transforms[0].max_size == 1333
    assert max(train.transforms[1].transforms1.sizes) == 800 and math.isclose(train.transforms[-1].mean[0], 0.538)
    with pytest.raises(ValueError, match="image_set"):
        make_line_transforms("test")
    with pytest.raises(ValueError, match="max_size"):
        make_line_transforms("val", scale=100, max_size=50)
