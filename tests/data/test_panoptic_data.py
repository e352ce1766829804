import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.criterion import id2rgb
from detr_fast.data import (
    CocoDetection,
    CocoPanoptic,
    MissingImageError,
    build_panoptic,
    load_segment_ids,
    make_shapes_dataset,
)

CATEGORIES = [{"id": 1, "name": "dog", "isthing": 1}, {"id": 120, "name": "sky", "isthing": 0}]


@pytest.fixture
def write(tmp_path):
    """Writes 8x6 pictures with the given segment ids and lists; returns CocoPanoptic's three paths."""

    def write(pictures, segments, annotate=True, reverse=False):
        images, annotations = [], []
        for folder in ("images", "png"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for i, (ids, listed) in enumerate(zip(pictures, segments, strict=True), start=1):
            ids = np.asarray(ids)
            Image.fromarray(np.full((*ids.shape, 3), 40 * i, dtype=np.uint8)).save(tmp_path / "images" / f"{i}.jpg")
            Image.fromarray(id2rgb(ids)).save(tmp_path / "png" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.jpg", "height": ids.shape[0], "width": ids.shape[1]})
            annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": listed})
        content = {"images": images, "categories": CATEGORIES}
        if annotate:
            content["annotations"] = annotations[::-1] if reverse else annotations
        (tmp_path / "ann.json").write_text(json.dumps(content))
        return tmp_path / "images", tmp_path / "png", tmp_path / "ann.json"

    return write


def segment(i, category_id, area, iscrowd=0):
    return {"id": i, "category_id": category_id, "area": area, "iscrowd": iscrowd, "bbox": [0, 0, 1, 1]}


def two_segments():
    ids = np.full((6, 8), 70000)
    ids[1:4, 2:7] = 300
    return ids, [segment(300, 1, 15), segment(70000, 120, 33, iscrowd=1)]


@pytest.mark.parametrize("reverse", [False, True])
def test_items_by_hand(write, reverse):
    ids, listed = two_segments()
    dataset = CocoPanoptic(*write([ids, np.zeros((6, 8), dtype=int)], [listed, []], reverse=reverse))
    assert len(dataset) == 2 and dataset.get_height_and_width(0) == (6, 8) and dataset.image_size(0) == (8, 6)
    assert dataset.class_names == {1: "dog", 120: "sky"} and dataset.thing_classes == [1]
    image, target = dataset[0]
    assert image.size == (8, 6) and abs(image.getpixel((0, 0))[0] - 40) < 3
    assert target["masks"].dtype == torch.uint8 and (target["masks"][0].numpy() == (ids == 300)).all()
    assert target["labels"].tolist() == [1, 120] and target["iscrowd"].tolist() == [0, 1]
    assert target["boxes"].tolist() == [[2, 1, 6, 3], [0, 0, 7, 5]] and target["area"].tolist() == [15, 33]
    assert target["image_id"].tolist() == [1]
    assert target["size"].tolist() == target["orig_size"].tolist() == [6, 8]

    _, empty = dataset[1]
    for key, value in empty.items():
        assert value.dtype == target[key].dtype and value.shape[1:] == target[key].shape[1:]
    assert len(empty["labels"]) == 0 and empty["masks"].shape == (0, 6, 8)


def test_without_masks_or_annotations(write):
    ids, listed = two_segments()
    paths = write([ids], [listed])
    target = CocoPanoptic(*paths, return_masks=False)[0][1]
    assert "masks" not in target and target["boxes"].shape == (2, 4)
    target = CocoPanoptic(*write([ids], [listed], annotate=False))[0][1]
    assert sorted(target) == ["image_id", "orig_size", "size"]


def test_transforms_move_masks_along(tmp_path):
    root = make_shapes_dataset(tmp_path, num_train=4, num_val=0, panoptic=True)
    args = SimpleNamespace(coco_path=root, coco_panoptic_path=root, masks=True, image_size=48)
    for tensor_images in (False, True):
        dataset = build_panoptic("train", args, uint8=tensor_images)
        assert dataset.can_plan
        for index in range(4):
            random.seed(index)
            torch.manual_seed(index)
            planned = dataset.planned_size(index)
            random.seed(index)
            torch.manual_seed(index)
            image, target = dataset[index]
            assert tuple(image.shape[-2:]) == planned == tuple(target["masks"].shape[-2:])
            assert len(target["masks"]) == len(target["boxes"]) == len(target["labels"]) == len(target["area"])
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                rows, columns = mask.bool().any(1).nonzero(), mask.bool().any(0).nonzero()
                cx, cy, w, h = (box * torch.tensor([*planned[::-1], *planned[::-1]])).tolist()
                # What a crop leaves of a shape can be narrower than what it leaves of its box.
                assert cx - w / 2 - 3 <= columns[0] and columns[-1] <= cx + w / 2 + 3
                assert cy - h / 2 - 3 <= rows[0] and rows[-1] <= cy + h / 2 + 3
                assert mask.sum() > 0.2 * w * h


def test_panoptic_shapes_agree_with_instances(tmp_path):
    root = make_shapes_dataset(tmp_path, num_train=6, num_val=2, seed=5, panoptic=True)
    args = SimpleNamespace(coco_path=root, coco_panoptic_path=root, masks=True)
    dataset = build_panoptic("val", args)
    assert len(dataset) == 2
    dataset = CocoPanoptic(
        root / "train2017", root / "panoptic_train2017", root / "annotations" / "panoptic_train2017.json"
    )
    instances = CocoDetection(root / "train2017", root / "annotations" / "instances_train2017.json", None, True)
    assert dataset.class_names == {1: "circle", 2: "square", 3: "triangle", 4: "sky", 5: "ground"}
    assert dataset.thing_classes == [1, 2, 3]
    stuff = 0
    for (image, target), (_, objects) in zip(dataset, instances, strict=True):
        assert (target["masks"].sum(0) == 1).all()  # every pixel belongs to one segment
        assert target["area"].tolist() == target["masks"].flatten(1).sum(1).tolist()
        things = target["masks"][target["labels"] <= 3]
        assert sorted(target["labels"][target["labels"] <= 3].tolist()) == sorted(objects["labels"].tolist())
        for mask in things.bool():
            assert max((mask & m).sum() / (mask | m).sum() for m in objects["masks"].bool()) > 0.75
        stuff += int((target["labels"] > 3).sum())
        pixels = np.asarray(image).mean(axis=2)
        sky, ground = (target["masks"][target["labels"] == c].sum(0).bool().numpy() for c in (4, 5))
        if sky.any() and ground.any():
            assert pixels[sky].mean() > 1.5 * pixels[ground].mean()
    assert stuff >= 10


def test_rejects_what_does_not_fit(write, tmp_path):
    ids, listed = two_segments()
    with pytest.raises(ValueError, match="no pixel of segment 9"):
        CocoPanoptic(*write([ids], [[segment(9, 1, 1)]]))[0]
    with pytest.raises(ValueError, match="unknown category 7"):
        CocoPanoptic(*write([ids], [[segment(300, 7, 1)]]))
    paths = write([ids, ids], [listed, listed])
    content = json.loads(paths[2].read_text())
    Image.new("RGB", (3, 3)).save(paths[1] / "1.png")
    with pytest.raises(ValueError, match="3x3 pixels, its image 8x6"):
        CocoPanoptic(*paths)[0]
    (paths[1] / "2.png").unlink()
    with pytest.raises(MissingImageError, match="2.png"):
        CocoPanoptic(*paths)[1]
    (paths[1] / "2.png").write_bytes(b"no png")
    with pytest.raises(OSError, match="cannot be decoded"):
        load_segment_ids(paths[1] / "2.png")
    paths[2].write_text(json.dumps({**content, "annotations": content["annotations"][:1]}))
    with pytest.raises(ValueError, match="one annotation for each image, got 1 for 2 images .see image id 2"):
        CocoPanoptic(*paths)
    paths[2].write_text("{")
    with pytest.raises(ValueError, match="not valid json"):
        CocoPanoptic(*paths)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoPanoptic(paths[0], tmp_path / "nowhere", paths[2])
    args = SimpleNamespace(coco_path=tmp_path, coco_panoptic_path=tmp_path, masks=True)
    with pytest.raises(FileNotFoundError, match="panoptic_val2017.json"):
        build_panoptic("val", args)
    with pytest.raises(ValueError, match="coco_panoptic_path not given"):
        build_panoptic("val", SimpleNamespace(coco_path=tmp_path))
