"""`joint_softmax` against a softmax written out, as reference on the CPU and as kernel through the interpreter."""

import os

import pytest
import torch

from detr_fast.ops import joint_softmax, joint_softmax_reference

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
both = [pytest.param(None, id="reference", marks=pytest.mark.skipif(INTERPRET, reason="runs without the interpreter"))]
both += [pytest.param(None, id="interpreted", marks=pytest.mark.interpret)]
either = pytest.mark.parametrize("_implementation", both)

# (B, Q, H, L): DETR's heads and a batch's odd number of cells, more than one tile of keys, single elements, nothing.
SHAPES = [(2, 5, 8, 43), (1, 2, 8, 850), (2, 3, 3, 300), (3, 1, 1, 1), (1, 2, 5, 1), (2, 0, 8, 4), (2, 3, 8, 0)]


def written_out(scores, mask):
    """Weights and nothing else: each query alone, over the keys that are not padded."""
    weights = torch.zeros(scores.shape, dtype=torch.float64)
    for b in range(scores.shape[0]):
        valid = slice(None) if mask is None else ~mask[b]
        for q in range(scores.shape[1]):
            used = scores[b, q].double()[:, valid]
            if used.numel():
                exp = (used - used.max()).exp()
                weights[b, q][:, valid] = exp / exp.sum()
    return weights


def padding(batch, keys):
    """Random padding; the last image of several has nothing else."""
    mask = torch.rand(batch, keys) < 0.3
    if batch > 1:
        mask[-1] = True
    return mask


def layouts(shape):
    """The same size of scores in several memory layouts."""
    b, q, h, n = shape
    yield torch.randn(shape) * 3
    yield (torch.randn(b, h, q, n) * 3).transpose(1, 2)
    yield (torch.randn(b, q, n, h) * 3).transpose(2, 3)
    yield (torch.randn(b, q, h, 2 * n) * 3)[..., ::2]


@either
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_joint_softmax_matches_written_out(shape, masked, _implementation):
    mask = padding(shape[0], shape[3]) if masked else None
    for scores in layouts(shape):
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], float("nan"))  # what is padded is not read
        weights = joint_softmax(scores, mask)
        assert weights.shape == shape and weights.is_contiguous() and weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), written_out(scores, mask), rtol=1e-5, atol=1e-7)


@either
def test_joint_softmax_keeps_large_scores_finite(_implementation):
    scores = torch.randn(1, 2, 8, 600) * 1000
    scores[:, :, :, :300] -= 1e5  # the largest score comes in a later tile
    weights = joint_softmax(scores)
    torch.testing.assert_close(weights.double(), written_out(scores, None), rtol=1e-4, atol=1e-7)
    scores[0, 0, 3, 20] = float("nan")
    weights = joint_softmax(scores)
    assert weights[0, 0].isnan().all() and weights[0, 1].isfinite().all()


@either
@pytest.mark.parametrize("shape", [(2, 3, 8, 43), (2, 2, 3, 700)], ids=str)
def test_joint_softmax_grad_matches_reference(shape, _implementation):
    mask = padding(shape[0], shape[3])
    scores = torch.randn(shape, requires_grad=True)
    exact = scores.detach().double().requires_grad_()
    cotangent = torch.randn(shape[0], shape[1], shape[3], shape[2]).transpose(2, 3)
    joint_softmax(scores, mask).backward(cotangent)
    joint_softmax_reference(exact, mask).backward(cotangent.double())
    torch.testing.assert_close(scores.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    assert (scores.grad[-1] == 0).all() and (scores.grad[0, :, :, ~mask[0]] != 0).any()


@either
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_joint_softmax_low_precision(dtype, _implementation):
    scores = (torch.randn(2, 4, 8, 50) * 2).to(dtype).requires_grad_()
    mask = torch.rand(2, 50) < 0.3
    weights = joint_softmax(scores, mask)
    assert weights.dtype == dtype
    exact = written_out(scores.detach(), mask)
    # Rounded once. The interpreter truncates to bf16 where a GPU rounds.
    allowed = torch.finfo(dtype).eps * exact + 1e-7
    assert ((weights.detach().double() - exact).abs() <= allowed).all()
    cotangent = torch.randn(weights.shape).to(dtype)
    weights.backward(cotangent)
    w, g = weights.detach().double(), cotangent.double()
    expected = w * (g - (w * g).sum(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(scores.grad.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_joint_softmax_gradcheck():
    mask = torch.tensor([[False, True, False], [True, True, True]])
    scores = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: joint_softmax(x, mask), (scores,))


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_joint_softmax_opcheck(dtype, _implementation):
    mask = torch.rand(2, 9) < 0.3
    scores = torch.randn(2, 3, 9, 4).to(dtype).transpose(2, 3).requires_grad_()
    torch.library.opcheck(torch.ops.detr_fast.joint_softmax, (scores, mask))
    torch.library.opcheck(torch.ops.detr_fast.joint_softmax, (scores, None))
    weights = torch.rand(2, 3, 4, 9).to(dtype)
    torch.library.opcheck(torch.ops.detr_fast.joint_softmax_backward, (scores.detach(), weights))


@pytest.mark.skipif(INTERPRET, reason="the interpreter cannot be compiled")
def test_joint_softmax_compiles_dynamic():
    compiled = torch.compile(joint_softmax, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 8, 20), (1, 5, 8, 33)):
        scores = torch.randn(shape, requires_grad=True)
        mask = torch.rand(shape[0], shape[3]) < 0.3
        weights = compiled(scores, mask)
        torch.testing.assert_close(weights, joint_softmax(scores, mask))
        (gradient,) = torch.autograd.grad(weights, scores, torch.ones_like(weights) * torch.randn(shape[3]))
        assert gradient.shape == shape


def test_joint_softmax_rejects_what_does_not_fit():
    scores = torch.randn(2, 3, 4, 5)
    for arguments, error, message in (
        ((scores.long(),), TypeError, "scores is torch.int64"),
        ((scores[0],), ValueError, r"scores has shape \[3, 4, 5\]"),
        ((scores, torch.zeros(2, 5)), TypeError, "key_padding_mask is torch.float32"),
        (
            (scores, torch.zeros(2, 4, dtype=torch.bool)),
            ValueError,
            r"shape \[2, 4\]; expected \[B, L\], here \[2, 5\]",
        ),
        ((scores, torch.zeros(5, dtype=torch.bool)), ValueError, r"shape \[5\]"),
    ):
        for function in (joint_softmax, joint_softmax_reference):
            with pytest.raises(error, match=message):
                function(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_joint_softmax_on_gpu(dtype):
    mask = (torch.rand(3, 1063) < 0.3).cuda()
    mask[2] = True
    scores = torch.randn(3, 8, 100, 1063, device="cuda").to(dtype).transpose(1, 2).requires_grad_()
    weights = joint_softmax(scores, mask)
    cotangent = torch.randn(weights.shape, device="cuda").to(dtype)
    weights.backward(cotangent)
    exact = scores.detach().double().requires_grad_()
    expected = joint_softmax_reference(exact, mask)
    expected.backward(cotangent.double())
    plain = scores.detach().requires_grad_()
    plain_weights = joint_softmax_reference(plain, mask)
    plain_weights.backward(cotangent)
    for ours, reference, truth in (
        (weights, plain_weights, expected),
        (scores.grad, plain.grad, exact.grad),
    ):
        error, allowed = (ours.double() - truth).abs().max(), (reference.double() - truth).abs().max()
        # The exponential and the division of a GPU are good to two roundings of float32 each.
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (weights[2] == 0).all() and (scores.grad[2] == 0).all()
