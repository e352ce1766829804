import json
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data import (
    Categories,
    CocoDetection,
    CorruptImageError,
    MissingImageError,
    build_dataset,
    check_coco,
    get_coco_api_from_dataset,
    load_image,
    load_image_tensor,
    make_coco_transforms,
)
from detr_fast.data.seeding import seeded

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def annotation(i, bbox, category_id=3, image_id=1, **more):
    return {"id": i, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


@pytest.fixture
def write(tmp_path):
    """Writes two 60x40 images and a json with the given annotations; returns (folder, json)."""

    def write(annotations, categories=CATEGORIES, mode="RGB"):
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        images = []
        for i in (1, 2):
            Image.new(mode, (60, 40)).save(folder / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40})
        ann_file = tmp_path / "ann.json"
        ann_file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        return folder, ann_file

    return write


def test_target_drops_crowds_and_degenerate_boxes_and_clamps(write):
    polygon = [[10, 10, 30, 10, 30, 30, 10, 30]]
    paths = write(
        [
            annotation(1, [10, 10, 20, 20], area=400, iscrowd=0, segmentation=polygon),
            annotation(2, [0, 0, 60, 40], area=1, iscrowd=1, segmentation={"counts": [2400], "size": [40, 60]}),
            annotation(3, [50, 30, 100, 100], category_id=7, area=9, iscrowd=0, segmentation=[]),
            annotation(4, [70, 10, 5, 5], area=25, iscrowd=0, segmentation=polygon),
            annotation(5, [5, 5, 0, 5], area=0, iscrowd=0, segmentation=polygon),
        ]
    )
    _, target = CocoDetection(*paths, None, True)[0]
    assert target["boxes"].tolist() == [[10, 10, 30, 30], [50, 30, 60, 40]]
    assert target["labels"].tolist() == [3, 7] and target["area"].tolist() == [400, 9]
    assert target["orig_size"].tolist() == target["size"].tolist() == [40, 60] and target["image_id"].tolist() == [1]
    assert target["masks"][0].sum() == 400 and target["masks"][0, 10:30, 10:30].all() and not target["masks"][1].any()


def test_masks_are_of_the_objects_that_are_kept(write):
    pytest.importorskip("pycocotools")
    rows = [
        annotation(i, [x, 10, 10, 10], area=100, iscrowd=0, segmentation=[[x, 10, x + 10, 10, x + 10, 20, x, 20]])
        for i, x in ((1, 70), (2, 0), (3, 65), (4, 40))
    ]
    target = CocoDetection(*write(rows), None, True)[0][1]
    expected = torch.zeros((2, 40, 60), dtype=torch.uint8)
    expected[0, 10:20, 0:10] = expected[1, 10:20, 40:50] = 1
    assert torch.equal(target["masks"], expected) and target["masks"].is_contiguous()


def test_image_without_objects_has_empty_target_of_the_same_dtypes(write):
    paths = write([annotation(1, [10, 10, 20, 20], area=400, segmentation=[[10, 10, 30, 10, 30, 30]])])
    dataset = CocoDetection(*paths, make_coco_transforms("train", scales=64), True)
    full, empty = CocoDetection(*paths, None, True)[0][1], dataset[1][1]
    assert {k: v.shape[1:] for k, v in empty.items() if k != "masks"} == {
        k: v.shape[1:] for k, v in full.items() if k != "masks"
    }
    assert len(empty["boxes"]) == len(empty["labels"]) == len(empty["area"]) == len(empty["masks"]) == 0
    assert all(empty[k].dtype == full[k].dtype for k in empty if k != "masks")


def test_contiguous_labels_and_way_back(write):
    paths = write([annotation(1, [1, 1, 9, 9], category_id=7), annotation(2, [1, 1, 9, 9], category_id=3)])
    categories = Categories.from_coco(CATEGORIES, contiguous=True)
    dataset = CocoDetection(*paths, None, False, categories=categories)
    labels = dataset[0][1]["labels"]
    assert labels.tolist() == [1, 0] and categories.to_id(labels).tolist() == [7, 3] and categories.to_id(1) == 7
    assert dataset.class_names == {0: "cat", 1: "dog"} and categories.num_classes == 2
    assert Categories.from_dict(json.loads(json.dumps(categories.to_dict()))) == categories
    assert Categories.from_coco(CATEGORIES).num_classes == 8


@pytest.mark.parametrize("bad", [{"category_id": 99}, {"category_id": None}, {"bbox": [1, 2, 3]}])
def test_rejects_bad_annotation(write, bad):
    with pytest.raises(ValueError, match=r"annotation 5 .*(99.*\[3, 7\]|None.*\[3, 7\]|expected \[x, y)"):
        CocoDetection(*write([{**annotation(5, [1, 1, 9, 9]), **bad}]), None)


def test_rejects_renamed_category(write):
    with pytest.raises(ValueError, match="category 3 is 'cat' here, but 'cow'"):
        CocoDetection(*write([]), None, categories=Categories((3, 7), ("cow", "dog")))


@pytest.mark.parametrize("tensor_images", [False, True])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_image_is_an_error_and_reported(write, progressive, tensor_images):
    folder, ann_file = write([annotation(1, [1, 1, 9, 9])])
    noise = Image.effect_noise((60, 40), 80).convert("RGB")
    noise.save(folder / "1.jpg", progressive=progressive)
    data = (folder / "1.jpg").read_bytes()
    dataset = CocoDetection(folder, ann_file, None, tensor_images=tensor_images)
    for share in (0.0, 0.2, 0.5, 0.9):
        (folder / "1.jpg").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CorruptImageError, match=r"1\.jpg \(image id 1\)") as caught:
            dataset[0]
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (copy.image_id, str(copy)) == (1, str(caught.value))
    report = check_coco(folder, ann_file)
    assert list(report.errors) == ["corrupt image"] and report.exit_code == 1 and "1.jpg" in str(report)


def test_missing_image_is_an_error_and_reported(write):
    folder, ann_file = write([])
    (folder / "2.jpg").unlink()
    for tensor_images in (False, True):
        with pytest.raises(MissingImageError, match="image id 2"):
            CocoDetection(folder, ann_file, None, tensor_images=tensor_images)[1]
    assert "2.jpg" in check_coco(folder, ann_file).errors["missing image"][0]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_modes_become_rgb(write, mode):
    assert CocoDetection(*write([], mode=mode), None)[0][0].mode == "RGB"


@pytest.mark.parametrize("mode, suffix", [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png")])
@pytest.mark.parametrize("progressive", [False, True])
def test_tensor_images_have_pils_pixels(tmp_path, mode, suffix, progressive, monkeypatch):
    noise = Image.effect_noise((61, 43), 80)
    image = Image.merge("RGB", [noise, noise.rotate(180), noise.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    image.convert(mode).save(tmp_path / f"image.{suffix}", progressive=progressive)
    expected = np.array(load_image(tmp_path / f"image.{suffix}"))
    got = load_image_tensor(tmp_path / f"image.{suffix}")
    assert got.dtype == torch.uint8 and got.shape == (3, 43, 61)
    assert np.array_equal(got.permute(1, 2, 0).numpy(), expected)
    monkeypatch.setattr("detr_fast.data.images.decode_jpeg", None)
    assert torch.equal(load_image_tensor(tmp_path / f"image.{suffix}"), got)


def test_check_coco_finds_each_problem(write):
    folder, ann_file = write(
        [
            annotation(1, [1, 1, 9, 9], category_id=99),
            annotation(2, [1, 1, 9, 9], image_id=77),
            annotation(3, [1, 1, float("nan"), 9]),
            annotation(4, [1, 1, 0, 9]),
            annotation(4, [100, 1, 5, 9]),
            annotation(0, [30, 1, 50, 9]),
            {"id": 6, "image_id": 1, "category_id": 3},
        ]
    )
    Image.new("RGB", (50, 40)).save(folder / "1.jpg")
    report = check_coco(folder, ann_file)
    assert set(report.errors) == {
        "unknown category",
        "unknown image",
        "box not finite",
        "repeated id",
        "malformed annotation",
    }
    assert {kind.split(" (")[0] for kind in report.warnings} == {
        "box without extent",
        "box wholly outside its image",
        "box partly outside its image",
        "annotation id 0",
        "category without annotations",
        "image size",  # the file's counts, in training as well
    }
    assert not report.ok and report.num_images == 2 and report.num_annotations == 7
    ann_file.write_text("{")
    assert not check_coco(folder, ann_file).ok


def test_build_dataset_from_both_layouts(shapes):
    coco = build_dataset("train", SimpleNamespace(coco_path=str(shapes), image_size=64))
    assert len(coco) == 12 and coco.categories.num_classes == 4 and get_coco_api_from_dataset(coco) is coco.coco
    paths = {
        f"{split}_{kind}": shapes / path.format(split)
        for split in ("train", "val")
        for kind, path in (("images", "{}2017"), ("ann", "annotations/instances_{}2017.json"))
    }
    own = build_dataset("val", SimpleNamespace(**paths, image_size=64))
    assert len(own) == 5 and own.categories.num_classes == 3 and own.class_names[0] == "circle"


def test_build_dataset_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="train2017.*instances_train2017.json"):
        build_dataset("train", SimpleNamespace(coco_path=tmp_path))
    with pytest.raises(ValueError, match="val_ann and val_images"):
        build_dataset("val", SimpleNamespace())


def assert_same_pixels(dataset, index):
    """Tensor images and PIL's, with the training augmentation at full size."""
    images = []
    for load in (load_image, load_image_tensor):
        dataset._load = load
        with seeded(3, index):
            images.append(dataset[index][0].int())
    difference = (images[0] - images[1]).abs()
    assert difference.max() <= 2 and (difference == 0).float().mean() > 0.95


def test_real_images_train_and_validate(coco_mini):
    assert check_coco(coco_mini / "val2017", coco_mini / "annotations" / "instances_val2017.json").ok
    random.seed(0)
    for i in range(3):
        assert_same_pixels(build_dataset("train", SimpleNamespace(coco_path=coco_mini), uint8=True), i)
    dataset = build_dataset("train", SimpleNamespace(coco_path=coco_mini, image_size=256))
    assert len(dataset) == 80 and dataset.categories.num_classes == 91
    for i in range(4):
        image, target = dataset[i]
        assert image.dtype == torch.float32 and list(image.shape[1:]) == target["size"].tolist()
        assert max(image.shape[1:]) <= 428 and (target["boxes"] >= 0).all() and (target["boxes"] <= 1).all()
