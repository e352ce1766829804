"""NaN that is no padding comes out of `attention`, forward and backward; NaN in padding reaches nothing."""

import math
import os
from itertools import product

import pytest
import torch
from pairwise import pairwise

from detr_fast.ops import attention, attention_dropout_mask, attention_reference

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
either = pytest.mark.parametrize(
    (),
    [
        pytest.param(id="cpu", marks=pytest.mark.skipif(INTERPRET, reason="runs without the interpreter")),
        pytest.param(id="interpreted", marks=pytest.mark.interpret),
    ],
)
SEED = torch.tensor([5])
NAMES = ("query", "key", "value", "grad_out")
# A vector of the CPU's holds 4 to 16 keys, a block of its fused attention 512.
LENGTHS = [1, 16, 70] if INTERPRET else [1, 2, 7, 15, 16, 17, 513, 520]
DTYPES = [torch.float32, torch.float16, torch.bfloat16] + ([] if INTERPRET else [torch.float64])
PLACES = ["element", "row", "all"]
# Masks of keys, dropout and head dimensions.
OPTIONS = list(product(["none", "some", "all"], [0.0, 0.25], [(8, 8), (8, 4)]))
if INTERPRET:
    CASES = pairwise(NAMES, LENGTHS, PLACES, DTYPES, [OPTIONS[i] for i in (0, 3, 4, 7, 10)])
else:
    CASES = [(*a, *b) for a, *b in pairwise(list(product(NAMES, LENGTHS)), PLACES, DTYPES, OPTIONS)]


def make_mask(kind, k_len):
    """[2, Lk]: padding in the first image, and with "all" nothing else there."""
    if kind == "none":
        return None
    mask = torch.zeros(2, k_len, dtype=torch.bool)
    mask[0, 0 if kind == "all" else (k_len + 1) // 2 :] = True
    return mask


def plain(query, key, value, padding, keep, p):
    """Softmax, dropout and product as they read, with zeros for what is padding; float64."""
    if padding is None:
        padding = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool)
    rows = padding[:, None, :, None]
    key, value = key.masked_fill(rows, 0), value.masked_fill(rows, 0)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(rows.mT, -math.inf)
    empty = padding.all(dim=1)[:, None, None, None]
    probs = torch.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
    if keep is not None:
        probs = probs * keep / (1 - p)
    return (probs @ value).masked_fill(empty, 0)


def run(function, tensors, *arguments):
    *inputs, grad = (x.detach().clone() for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    out = function(*inputs, *arguments)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@either
@pytest.mark.parametrize(("where", "k_len", "what", "dtype", "options"), CASES, ids=str)
def test_attention_lets_nan_through(where, k_len, what, dtype, options):
    """NaN stands in output and gradients exactly where the formula has it, and nowhere that padding is."""
    kind, p, dims = options
    mask = make_mask(kind, k_len)
    shapes = dict(zip(NAMES, ((3, dims[0]), (k_len, dims[0]), (k_len, dims[1]), (3, dims[1])), strict=True))
    tensors = {name: torch.randn(2, 2, *shape).to(dtype) for name, shape in shapes.items()}
    # In both images: the first has the padding.
    place = {"element": (slice(None), 1, 0, 1), "row": (slice(None), 1, 0), "all": (slice(None), 1)}[what]
    tensors[where][place] = math.nan
    keep = attention_dropout_mask(SEED, 2, 2, 3, k_len, p, key_padding_mask=mask) if p else None
    exact = run(plain, [x.double() for x in tensors.values()], mask, keep, p)
    results = run(lambda *x: attention(*x, mask, p, seed=SEED)[0], tensors.values())
    reference = run(lambda *x: attention_reference(*x, mask, p, keep)[0], tensors.values())
    if mask is not None:  # what padding holds changes nothing
        without_garbage = results
        for x, garbage in ((tensors["key"], math.nan), (tensors["value"], math.inf)):
            x.masked_fill_(mask[:, None, :, None], garbage)
        results = run(lambda *x: attention(*x, mask, p, seed=SEED)[0], tensors.values())
        torch.testing.assert_close(results, without_garbage, rtol=0, atol=0, equal_nan=True)
    assert any(x.isnan().any() for x in exact)
    for result, other, want in zip(results, reference, exact, strict=True):
        assert torch.equal(result.isnan(), want.isnan())
        assert torch.equal(other.isnan(), want.isnan())
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.1)
        torch.testing.assert_close(result.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True)
    if kind == "all":
        assert all((x[0] == 0).all() for x in results)


@either
@pytest.mark.parametrize("k_len", [7, 70])
def test_logsumexp_is_nan_with_its_row(k_len):
    query, key, value = (torch.randn(1, 2, length, 8) for length in (3, k_len, k_len))
    query[0, 1, 2, 3] = math.nan
    _, lse = attention(query, key, value)
    assert lse.isnan().nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.skipif(INTERPRET, reason="PyTorch's fused attention")
@pytest.mark.parametrize("k_len", [1, 7, 8, 15, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finite_numbers_are_the_fused_ones(k_len, dtype):
    """The mask of zeros under which few keys are computed changes no bit."""
    query, key, value = (10 * torch.randn(2, 2, length, 8, dtype=dtype) for length in (5, k_len, k_len))
    out, lse = attention(query, key, value)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    want, want_lse = fused(query, key, value, scale=8**-0.5)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
