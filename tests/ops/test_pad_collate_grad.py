"""`pad_collate`, backward: every image's crop of the gradient, as reference on the CPU and in the interpreter."""

import random

import pytest
import torch
from pad_collate_cases import FLOATS, INTERPRET, assert_as_exact, either, guarded_empty, image, small_tiles

from detr_fast.ops import pad_collate, pad_collate_reference

COTANGENTS = ("contiguous", "channels_last", "expanded", "expanded_pixels", "transposed", "steps", "cat")


def cotangent(shape, dtype, layout, generator):
    """A random gradient [B, C, H, W] of one of COTANGENTS; never constant over what a wrong crop would mix up."""
    B, C, H, W = shape
    if layout == "expanded":
        return torch.randn((1, C, 1, W), generator=generator, dtype=torch.float64).to(dtype).expand(shape)
    if layout == "expanded_pixels":
        return torch.randn((B, C, 1, 1), generator=generator, dtype=torch.float64).to(dtype).expand(shape)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        return grad.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return grad.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "steps":
        return torch.full((B, 2 * C, H, 3 * W), float("nan"), dtype=dtype)[:, ::2, :, ::3].copy_(grad)
    if layout == "cat":
        return torch.cat((grad, torch.full_like(grad, float("nan"))), dim=3)[..., :W]
    return grad


@either
@pytest.mark.parametrize("seed", range(28))
def test_pad_collate_grad_matches_crops(seed, _implementation, monkeypatch):
    """The backward op against slicing, element by element; nothing is written beside the gradients."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    # bfloat16 on a GPU: the interpreter truncates where it should round.
    dtype, grad_dtype = (rng.choice((torch.float16, torch.float32, torch.float64)) for _ in range(2))
    shapes = [(rng.randint(0, 4), rng.choice((0, 1, 3, 33)), rng.choice((0, 1, 7, 31))) for _ in range(3)]
    shapes.append((3, 2, 70))
    C, H, W = (max(shape[axis] for shape in shapes) for axis in range(3))
    std = [rng.uniform(0.1, 2) for _ in range(C)] if seed % 2 else None
    # As after a size divisor: the gradient reaches beyond the largest image.
    grad = cotangent((4, C, H + 3, W + 1), grad_dtype, COTANGENTS[seed % len(COTANGENTS)], generator)
    if INTERPRET:
        small_tiles(monkeypatch)
    with monkeypatch.context() as patch:
        intact = guarded_empty(patch) if INTERPRET else None
        crops = torch.ops.detr_fast.pad_collate_backward(grad, [size for shape in shapes for size in shape], std, dtype)
    if intact:
        intact()
    for index, (crop, (c, h, w)) in enumerate(zip(crops, shapes, strict=True)):
        exact = grad[index, :c, :h, :w].double()
        assert crop.shape == (c, h, w) and crop.dtype == dtype and crop.is_contiguous()
        if std is None:
            assert torch.equal(crop, exact.to(dtype))
        else:
            exact = exact / torch.tensor(std[:c], dtype=torch.float64)[:, None, None]
            plain = (exact.to(torch.promote_types(dtype, torch.float32))).to(dtype)
            assert_as_exact(crop, exact, plain)


@either
@pytest.mark.parametrize("normalise", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_pad_collate_grad_matches_reference(channels_last, normalise, _implementation):
    """Through autograd, with images of several layouts and channels, one of which needs no gradient."""
    generator = torch.Generator().manual_seed(6)
    shapes = ((3, 9, 14), (2, 12, 5), (3, 0, 4), (3, 4, 4))
    layouts = ("hwc", "crop", "chw", "transposed")
    images = [image(shape, torch.float32, layout, generator) for shape, layout in zip(shapes, layouts, strict=True)]
    leaves = [img.requires_grad_() for img in images[:3]]
    options = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 2.0, 0.7]} if normalise else {}
    options.update(channels_last=channels_last, size_divisor=8)
    grads = []
    for function in (pad_collate, pad_collate_reference):
        batch, mask = function(images, **options)
        assert not mask.requires_grad
        grads.append(torch.autograd.grad(batch, leaves, torch.randn(batch.shape, generator=generator.manual_seed(7))))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@either
def test_pad_collate_grad_of_a_cast(_implementation):
    """The gradient comes back in the images' dtype."""
    leaf = torch.rand(3, 4, 5, requires_grad=True)
    batch, _ = pad_collate([leaf, torch.rand(3, 6, 6)], dtype=torch.float16)
    weight = torch.randn(batch.shape)
    (grad,) = torch.autograd.grad((batch.float() * weight).sum(), leaf)
    assert torch.equal(grad, weight[0, :, :4, :5].half().float())


@pytest.mark.parametrize("normalise", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_pad_collate_gradcheck(channels_last, normalise):
    images = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 4), (2, 3, 2), (3, 0, 1))]
    options = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 2.0, 0.7]} if normalise else {}

    def batch(*images):
        return pad_collate(list(images), channels_last=channels_last, size_divisor=2, **options)[0]

    assert torch.autograd.gradcheck(batch, images)


def test_pad_collate_double_backward_is_refused():
    leaf = torch.rand(3, 4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(pad_collate([leaf])[0].square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="pad_collate_backward.*no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("std", [None, [0.5, 0.6, 0.7]], ids=["plain", "normalised"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pad_collate_backward_opcheck(dtype, std):
    layout = "channels_last" if std else "expanded"
    grad = cotangent((2, 3, 6, 8), dtype, layout, torch.Generator().manual_seed(8))
    for images_dtype in {dtype, torch.float32}:
        arguments = (grad, [3, 6, 4, 2, 5, 8], std, images_dtype)
        torch.library.opcheck(torch.ops.detr_fast.pad_collate_backward.default, arguments)
