import random

import pytest
import torch
from PIL import Image

from detr_fast.data.transforms import RandomSizeCrop, crop, hflip, make_coco_transforms, resize, resized_size


@pytest.mark.parametrize(
    "image_size, size, max_size, expected",
    [((640, 480), 800, 1333, (800, 1066)), ((640, 360), 800, 1333, (750, 1333)), ((500, 281), 800, 1333, (749, 1332)),
     ((480, 640), 480, 1333, (640, 480)), ((1000, 2), 800, 1333, (3, 1500))],
)  # fmt: skip
def test_resized_size_truncates_the_long_side(image_size, size, max_size, expected):
    assert resized_size(image_size, size, max_size) == expected


@pytest.fixture
def sample():
    target = {
        "boxes": torch.tensor([[10.0, 5, 30, 25], [0, 0, 8, 4]]),
        "labels": torch.tensor([1, 2]),
        "area": torch.tensor([400.0, 32]),
        "iscrowd": torch.tensor([0, 0]),
        "masks": torch.zeros(2, 40, 60, dtype=torch.uint8),
    }
    target["masks"][0, 5:25, 10:30] = 1
    target["masks"][1, :4, :8] = 1
    return Image.new("RGB", (60, 40)), target


def test_flip_resize_and_crop_move_boxes_masks_and_area_together(sample):
    _, flipped = hflip(*sample)
    assert flipped["boxes"].tolist() == [[30, 5, 50, 25], [52, 0, 60, 4]] and flipped["masks"][0, 5:25, 30:50].all()
    image, resized = resize(*sample, 80)
    assert image.size == (120, 80) and resized["boxes"][0].tolist() == [20, 10, 60, 50]
    assert resized["area"].tolist() == [1600, 128] and resized["masks"][0].sum() == 1600
    _, cropped = crop(*sample, (10, 20, 20, 20))
    assert cropped["boxes"].tolist() == [[0, 0, 10, 15]] and cropped["labels"].tolist() == [1]
    assert cropped["area"].tolist() == [150] and cropped["masks"].sum() == 150 and cropped["size"].tolist() == [20, 20]


def test_crop_keeps_whole_what_is_smaller_than_the_minimum(sample):
    image, _ = RandomSizeCrop(50, 55)(*sample)
    assert image.height == 40 and 50 <= image.width <= 55


def test_uint8_images_have_the_same_boxes_and_pixels(sample):
    outputs = []
    for uint8 in (False, True):
        random.seed(4)
        torch.manual_seed(4)
        outputs.append(make_coco_transforms("train", scales=64, uint8=uint8)(*sample))
    (image, target), (raw, raw_target) = outputs
    assert raw.dtype == torch.uint8 and raw.shape == image.shape and torch.equal(target["boxes"], raw_target["boxes"])


@pytest.mark.parametrize("arguments", [{"image_set": "test"}, {"image_set": "val", "scales": [0]}])
def test_make_coco_transforms_rejects(arguments):
    with pytest.raises(ValueError, match="must be"):
        make_coco_transforms(**arguments)
