"""The position embedding layers against the original's formulas."""

import math

import pytest
import torch

from detr_fast.layers import PositionEmbeddingLearned, PositionEmbeddingSine
from detr_fast.nested_tensor import NestedTensor
from detr_fast.ops import sine_position_reference


def batch(height=9, width=12):
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    mask[0, height - 2 :] = True
    mask[1, :, width - 5 :] = True
    return NestedTensor(torch.rand(2, 3, height, width), mask)


def test_sine_gives_one_image_by_hand():
    """A 1 x 2 map, one frequency: the counts are 1 along y, and 1, 2 along x."""
    mask = torch.zeros(1, 1, 2, dtype=torch.bool)
    pos = PositionEmbeddingSine(2)(NestedTensor(torch.rand(1, 3, 1, 2), mask))
    want = [
        [math.sin(1), math.sin(1)],
        [math.cos(1), math.cos(1)],
        [math.sin(1), math.sin(2)],
        [math.cos(1), math.cos(2)],
    ]
    torch.testing.assert_close(pos, torch.tensor(want)[None, :, None, :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalize, scale", [(False, None), (True, None), (True, 3.0)])
def test_sine_passes_its_options_on(normalize, scale):
    layer = PositionEmbeddingSine(6, temperature=20, normalize=normalize, scale=scale)
    samples = batch()
    options = dict(num_pos_feats=6, temperature=20, normalize=normalize, scale=scale)
    want, want_mask = sine_position_reference(samples.mask, **options)
    pos = layer(samples)
    assert pos.shape == (2, 12, 9, 12) and pos.dtype == torch.float32
    torch.testing.assert_close(pos, want, rtol=0, atol=1e-6)

    want, want_mask = sine_position_reference(samples.mask, (3, 4), dtype=torch.bfloat16, layout="tokens", **options)
    pos, mask = layer.from_mask(samples.mask, (3, 4), dtype=torch.bfloat16, layout="tokens")
    assert pos.dtype == torch.bfloat16 and torch.equal(mask, want_mask)
    torch.testing.assert_close(pos, want, rtol=0, atol=8e-3)


def test_sine_has_no_state():
    layer = PositionEmbeddingSine(128, normalize=True)
    assert not layer.state_dict()
    assert layer.scale == 2 * math.pi


def test_sine_rejects():
    with pytest.raises(ValueError, match="normalize should be True if scale is passed"):
        PositionEmbeddingSine(64, scale=1.0)
    with pytest.raises(ValueError, match="even and positive"):
        PositionEmbeddingSine(65)
    samples = batch()
    samples.mask = None
    with pytest.raises(ValueError, match="mask is None"):
        PositionEmbeddingSine(64)(samples)


def test_learned_matches_the_original():
    layer = PositionEmbeddingLearned(5)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "row_embed.weight": (50, 5),
        "col_embed.weight": (50, 5),
    }
    for weight in layer.parameters():
        assert weight.min() >= 0 and weight.max() <= 1 and 0.2 < weight.std() < 0.4
    pos = layer(batch())
    assert pos.shape == (2, 10, 9, 12)
    for y, x in ((0, 0), (8, 11), (3, 7)):
        assert torch.equal(pos[1, :, y, x], torch.cat([layer.col_embed.weight[x], layer.row_embed.weight[y]]))


def test_learned_gradient():
    layer = PositionEmbeddingLearned(4)
    cotangent = torch.rand(2, 8, 9, 12)
    layer(batch()).backward(cotangent)
    torch.testing.assert_close(layer.col_embed.weight.grad[:12], cotangent[:, :4].sum((0, 2)).t())
    torch.testing.assert_close(layer.row_embed.weight.grad[:9], cotangent[:, 4:].sum((0, 3)).t())
    assert not layer.row_embed.weight.grad[9:].any()


def test_learned_from_mask():
    layer = PositionEmbeddingLearned(4)
    samples = batch(18, 24)
    pos, mask = layer.from_mask(samples.mask, (9, 12), dtype=torch.float16, layout="tokens")
    assert torch.equal(mask, samples.mask[:, ::2, ::2])
    want = layer(batch()).flatten(2).transpose(1, 2).half()
    assert torch.equal(pos, want)
    with pytest.raises(ValueError, match="'nchw' or 'tokens'"):
        layer.from_mask(samples.mask, layout="nhwc")


@pytest.mark.parametrize("size", [(51, 3), (3, 51)])
def test_learned_rejects_large_maps(size):
    layer = PositionEmbeddingLearned(4)
    layer(batch(50, 50))
    with pytest.raises(ValueError, match="50 rows and 50 columns"):
        layer(batch(*size))
