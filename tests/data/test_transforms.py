import random

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data.seeding import seeded
from detr_fast.data.transforms import (
    CenterCrop,
    Compose,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomPad,
    RandomSizeCrop,
    ToTensor,
    crop,
    hflip,
    make_coco_transforms,
    pad,
    resize,
    resized_size,
)


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


@pytest.fixture
def photograph():
    """A PIL image of smooth and sharp structure, and the same as a uint8 tensor in the decoder's memory order."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((200, 150), Image.BICUBIC)
    pixels = np.array(noise)
    pixels[40:90, 60:61] = 255
    return Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)


def test_tensor_images_give_pils_pixels_and_targets(photograph, sample):
    transforms, equal = make_coco_transforms("train", scales=200, uint8=True), []
    for seed in range(12):
        with seeded(seed):
            expected, target = transforms(photograph[0], sample[1])
        with seeded(seed):
            image, tensor_target = transforms(photograph[1], sample[1])
        assert image.dtype == torch.uint8 and image.shape == expected.shape
        assert target.keys() == tensor_target.keys()
        assert all(torch.equal(target[name], tensor_target[name]) for name in target)
        difference = (image.int() - expected.int()).abs()
        assert difference.max() <= 2
        equal.append((difference == 0).float().mean().item())
    assert np.mean(equal) > 0.98


def test_flip_crop_and_pad_of_tensors_are_exact(photograph, sample):
    image, tensor = photograph
    for function, argument in ((hflip, ()), (crop, ((10, 20, 70, 90),)), (pad, ((3, 5),))):
        expected, target = function(image, sample[1], *argument)
        got, tensor_target = function(tensor, sample[1], *argument)
        assert torch.equal(got, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
        assert all(torch.equal(target[name], tensor_target[name]) for name in target)
    assert torch.equal(ToTensor()(tensor, None)[0], ToTensor()(image, None)[0])


def test_draw_makes_the_draws_of_the_call(photograph):
    transforms = Compose(
        [
            make_coco_transforms("train", scales=150, uint8=True),
            RandomCrop((60, 70)),
            RandomPad(9),
            CenterCrop((40, 50)),
            RandomHorizontalFlip(),
            RandomErasing(p=0.0),
        ]
    )
    for seed in range(6):
        with seeded(seed):
            expected, _ = transforms(photograph[1])
            after = random.random(), torch.rand(1).item()
        with seeded(seed):
            steps, size = transforms.draw((200, 150))
            image = photograph[1]
            for step in steps:
                image, _ = step(image, None)
            assert (random.random(), torch.rand(1).item()) == after
        assert torch.equal(image, expected) and size == (50, 40)
