import json

import pytest
from PIL import Image

from detr_fast.data import CocoDetection, check_coco, make_shapes_dataset


def test_shapes_are_valid_deterministic_and_in_several_aspect_ratios(shapes, tmp_path):
    report = check_coco(shapes / "train2017", shapes / "annotations" / "instances_train2017.json")
    assert report.ok and report.num_images == 12 and report.num_without_annotations == 0
    again = make_shapes_dataset(tmp_path, num_train=3, num_val=1, seed=3)
    for name in ("000000000001.jpg", "000000000003.jpg"):
        assert (again / "train2017" / name).read_bytes() == (shapes / "train2017" / name).read_bytes()
    sizes = {Image.open(path).size for path in (shapes / "train2017").iterdir()}
    assert len(sizes) >= 3 and all(min(size) == 64 for size in sizes)


def test_masks_fill_their_boxes(shapes):
    dataset = CocoDetection(shapes / "train2017", shapes / "annotations" / "instances_train2017.json", None, True)
    fill = {1: 0.78, 2: 1.0, 3: 0.5}
    for _, target in (dataset[i] for i in range(len(dataset))):
        for box, label, mask in zip(target["boxes"], target["labels"].tolist(), target["masks"], strict=True):
            extent = (box[2] - box[0]) * (box[3] - box[1])
            assert abs(mask.sum() / extent - fill[label]) < 0.12


def test_refuses_to_overwrite_other_annotations(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps({"info": {}}))
    with pytest.raises(FileExistsError, match="was not generated here"):
        make_shapes_dataset(tmp_path, num_train=1, num_val=1)
