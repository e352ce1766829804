"""The sizes that are measured are those of real COCO batches."""

import json
import random
import statistics

import pytest
import torch

from detr_fast.benchmarks.shapes import (
    BatchShape,
    coco_sizes,
    draw_size,
    nominal_batch,
    real_batch,
    shrunk_batch,
    typical_real_batch,
)


def test_size_table_is_coco():
    sizes = coco_sizes()
    assert len(sizes) == 160
    assert max(max(size) for size in sizes) == 640 and (640, 480) in sizes and (480, 640) in sizes


def test_size_table_matches_the_annotations(coco_mini):
    annotated = []
    for split in ("train", "val"):
        record = json.loads((coco_mini / "annotations" / f"instances_{split}2017.json").read_text())
        annotated += [(i["width"], i["height"]) for i in sorted(record["images"], key=lambda i: i["id"])]
    assert coco_sizes() == annotated


@pytest.mark.parametrize(
    ("batch", "pixels", "tokens", "pairs"), [(2, 0.81, 0.82, 0.71), (8, 0.56, 0.58, 0.37), (16, 0.49, 0.51, 0.29)]
)
def test_shares_of_real_batches(batch, pixels, tokens, pairs):
    """What 482 real sizes gave; the mean of 60 batches has a standard error of about 0.01 (0.02 at batch 2)."""
    shares = [real_batch("R50", batch, seed).valid_shares() for seed in range(60)]
    for name, expected in (("pixels", pixels), ("tokens", tokens), ("pairs", pairs)):
        assert statistics.mean(s[name] for s in shares) == pytest.approx(expected, abs=0.06 if batch == 2 else 0.04)


def test_draws_follow_the_augmentation():
    rng = random.Random(0)
    sizes = [draw_size(640, 480, rng) for _ in range(2000)]
    # 480..800 on the short side, 1333 at most on the long one (and one more by rounding).
    assert {min(size) for size in sizes} <= set(range(350, 801)) and max(max(size) for size in sizes) <= 1334
    # The uncropped half keeps 4:3, with each of the eleven scales.
    whole = [size for size in sizes if abs(size[1] / size[0] - 4 / 3) < 0.003]
    assert 0.45 < len(whole) / len(sizes) < 0.6 and len({h for h, _ in whole}) >= 11


def test_same_seed_same_batch():
    assert real_batch("R50", 4, 3) == real_batch("R50", 4, 3) != real_batch("R50", 4, 4)


def test_nominal_batch_has_the_papers_tokens():
    assert [nominal_batch(model, 2).tokens for model in ("R50", "DC5")] == [950, 3800]
    assert not nominal_batch("R50", 2).has_padding
    assert nominal_batch("R50", 2).valid_shares() == {"pixels": 1.0, "tokens": 1.0, "pairs": 1.0}


def test_masks():
    shape = BatchShape("x", 32, ((64, 96), (33, 40)))
    mask = shape.mask()
    assert mask.shape == (2, 64, 96) and not mask[0].any()
    assert (~mask[1]).sum() == 33 * 40 and not mask[1, :33, :40].any()
    # Cells (y, x) of 2 x 3 are read at pixels (0, 32) x (0, 32, 64).
    expected = torch.tensor([[False] * 6, [False, False, True, False, False, True]])
    assert torch.equal(shape.key_padding_mask(), expected)
    assert shape.without_padding().sizes == ((64, 96),) * 2


@pytest.mark.parametrize("model", ["R50", "DC5"])
def test_feature_mask_is_the_resized_mask(model):
    for seed in range(5):
        shape = real_batch(model, 4, seed)
        resized = torch.nn.functional.interpolate(shape.mask()[None].float(), size=shape.feature)[0].bool()
        assert torch.equal(shape.key_padding_mask(), resized.flatten(1))


@pytest.mark.parametrize("valid", [0.8, 0.5, 0.3])
def test_shrunk_batch_keeps_the_size_and_meets_the_share(valid):
    shape = shrunk_batch("DC5", 16, valid)
    assert shape.padded == (800, 1216)
    assert shape.valid_shares()["tokens"] == pytest.approx(valid, abs=0.03)


def test_typical_batch_is_typical():
    assert typical_real_batch("R50", 16).valid_shares()["pairs"] == pytest.approx(0.29, abs=0.05)
