"""The attention kernels through Triton's interpreter, against the float64 reference, element by element."""

import random

import pytest
import torch

from detr_fast.ops import applied_dropout, attention, attention_dropout_mask, attention_reference

pytestmark = pytest.mark.interpret

LENGTHS = (1, 2, 16, 43, 63, 64, 65, 100)
HEAD_DIMS = ((16, 16), (32, 32), (64, 64), (128, 128), (8, 8), (20, 24), (64, 32), (1, 3))
LAYOUTS = ("blhd", "lbhd", "packed", "bhld", "bhdl", "gap")
MASKS = ("none", "suffix", "interleaved", "random", "one key", "row all padded", "all padded")
GRADS = ("dense", "bhld", "expanded", "cat")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_case(number: int) -> dict:
    """Case `number`: the first ones walk through every layout, mask and head dimension, the rest is drawn."""
    draw = random.Random(number)
    batch, heads = draw.choice(((1, 1), (2, 1), (1, 2), (2, 2), (3, 1)))
    case = {
        "batch": batch,
        "heads": heads,
        "q_len": draw.choice(LENGTHS),
        "k_len": draw.choice(LENGTHS + (130, 200)),
        "dims": HEAD_DIMS[number % len(HEAD_DIMS)] if number < 56 else draw.choice(HEAD_DIMS[:2]),
        "layout": LAYOUTS[number % len(LAYOUTS)],
        "mask": MASKS[number % len(MASKS)],
        "dropout_p": draw.choice((0.0, 0.1, 0.1, 0.5, 0.9)),
        "grad": GRADS[number % len(GRADS)],
        "dtype": "bf16" if number % 12 == 11 else "fp16" if number % 4 == 2 else "fp32",
        "scale": draw.choice((None, None, 0.3)),
    }
    if case["q_len"] * case["k_len"] > 5000:  # the interpreter's time goes by tiles
        case["batch"] = case["heads"] = 1 if case["mask"] != "row all padded" else 2
        case["heads"] = 1
    return case


def case_id(case: dict) -> str:
    mask = case["mask"].replace(" ", "_")
    return (
        f"B{case['batch']}-H{case['heads']}-Q{case['q_len']}-K{case['k_len']}-D{case['dims'][0]}.{case['dims'][1]}-"
        f"{case['layout']}-{mask}-p{case['dropout_p']}-{case['grad']}-{case['dtype']}"
    )


CASES = [make_case(number) for number in range(120)]


def make_tensor(batch, heads, length, dim, layout, dtype):
    """[B, H, L, D] of a layout in memory."""
    if layout == "blhd":
        return torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2)
    if layout == "lbhd":
        return torch.randn(length, batch, heads, dim).to(dtype).permute(1, 2, 0, 3)
    if layout == "packed":
        return torch.randn(batch, length, 3, heads, dim).to(dtype)[:, :, 1].transpose(1, 2)
    if layout == "bhdl":
        return torch.randn(batch, heads, dim, length).to(dtype).transpose(2, 3)
    if layout == "gap":
        return torch.randn(batch, heads, 2 * length, dim + 3).to(dtype)[:, :, ::2, 2 : dim + 2]
    return torch.randn(batch, heads, length, dim).to(dtype)


def make_mask(kind, batch, k_len):
    if kind == "none":
        return None
    mask = torch.zeros(batch, k_len, dtype=torch.bool)
    if kind == "suffix":
        for row in range(batch):
            mask[row, max(1, k_len * (row + 1) // (batch + 1)) :] = True
    elif kind == "interleaved":  # a padded map of 10 columns, the last 3 padding, flattened
        mask = (torch.arange(k_len) % 10 >= 7).expand(batch, k_len)
    elif kind == "random":
        mask = torch.rand(k_len, batch).t() < 0.6  # a strided mask
    elif kind == "one key":  # in the last block; those before are padding throughout
        mask[:, :-1] = True
    elif kind == "row all padded":
        mask[0] = True
    else:
        mask[:] = True
    return mask


def make_grad(kind, out):
    batch, heads, length, dim = out.shape
    if kind == "expanded":
        return torch.randn(batch, 1, 1, dim).to(out.dtype).expand_as(out)
    if kind == "cat":
        return torch.randn(batch, heads, length, 2 * dim).to(out.dtype)[..., dim:]
    if kind == "bhld":
        return torch.randn(batch, heads, length, dim).to(out.dtype)
    return torch.randn(batch, length, heads, dim).to(out.dtype).transpose(1, 2)


def magnitudes(inputs, mask, grad, keep, dropout_p, scale, lse, unit):
    """For out, dq, dk, dv: the same sums over absolute values, to which rounding errors are proportional."""
    q, k, v = (x.detach().double().abs() for x in inputs)
    grad = grad.double().abs()
    scores = (inputs[0].detach().double() @ inputs[1].detach().double().transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :], -torch.inf)
    # Probabilities, with the float32 error of the exponent counted in units of the dtype's rounding.
    probs = torch.exp(scores - lse[..., None]) * (1 + (q @ k.transpose(-2, -1)) * scale * 2.0**-24 / unit)
    kept = 1.0 if keep is None or dropout_p == 1 else keep / (1 - applied_dropout(dropout_p))
    out = (probs * kept) @ v
    grad_scores = probs * ((grad @ v.transpose(-2, -1)) * kept + (grad * out).sum(-1, keepdim=True)) * scale
    return out, grad_scores @ k, grad_scores.transpose(-2, -1) @ q, (probs * kept).transpose(-2, -1) @ grad


def check(inputs, mask, dropout_p, scale, grad_kind):
    """The op's output and gradients, against the float64 reference fed with the helper's dropout mask.

    Each element may be off by a few roundings of the terms that were summed for it. (In float16 also by what is lost
    below its smallest normal number, on the way and at the end.)
    """
    query, key, _ = inputs
    batch, heads, q_len, head_dim = query.shape
    inputs = [x.requires_grad_() for x in inputs]
    seed = torch.randint(0, 2**62, (1,))
    out, lse = attention(*inputs, mask, dropout_p, seed=seed, scale=scale)
    grad = make_grad(grad_kind, out)
    grads = torch.autograd.grad(out, inputs, grad)
    keep = attention_dropout_mask(seed, batch, heads, q_len, key.shape[2], dropout_p) if dropout_p else None

    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact_out, exact_lse = attention_reference(*exact, mask, dropout_p, keep, scale=scale)
    exact_grads = torch.autograd.grad(exact_out, exact, grad.double())
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    has_key = exact_lse.isfinite()
    assert torch.allclose(lse.double()[has_key], exact_lse[has_key], rtol=1e-6, atol=2e-6)

    # The interpreter's bfloat16 rounds towards zero.
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[query.dtype]
    scale = head_dim**-0.5 if scale is None else scale
    sizes = magnitudes(inputs, mask, grad, keep, dropout_p, scale, exact_lse, unit)
    tiny = 2.0**-20 if query.dtype == torch.float16 else 0.0
    results = zip("out dq dk dv".split(), (out, *grads), (exact_out, *exact_grads), sizes, strict=True)
    for name, result, want, size in results:
        error = (result.double() - want).abs()
        assert (error <= 8 * unit * size + tiny).all(), (
            f"{name} off by {(error / (unit * size)).nan_to_num().max():.3g} units"
        )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_attention_matches_reference(case):
    torch.manual_seed(CASES.index(case))
    dtype = DTYPES[case["dtype"]]
    shapes = [(case["q_len"], case["dims"][0]), (case["k_len"], case["dims"][0]), (case["k_len"], case["dims"][1])]
    inputs = [make_tensor(case["batch"], case["heads"], length, dim, case["layout"], dtype) for length, dim in shapes]
    mask = make_mask(case["mask"], case["batch"], case["k_len"])
    check(inputs, mask, case["dropout_p"], case["scale"], case["grad"])


def test_attention_of_a_whole_head_850():
    """DETR's shape: 850 keys in 14 blocks, 25 x 34 pixels of which the right and lower third is padding."""
    padding = torch.ones(25, 34, dtype=torch.bool)
    padding[:16, :22] = False
    inputs = [make_tensor(1, 1, length, 32, "blhd", torch.float32) for length in (100, 850, 850)]
    check(inputs, padding.flatten()[None], 0.1, None, "dense")


def test_attention_long_queries():
    """More than one tile of queries, more than one step of the second pass."""
    inputs = [make_tensor(1, 1, length, 16, "blhd", torch.float16) for length in (300, 70, 70)]
    check(inputs, None, 0.3, None, "cat")


def test_attention_padding_reaches_nothing():
    """NaN and infinity in padded keys and values change no output and no gradient; theirs are zero."""
    mask = make_mask("random", 2, 150)
    mask[0, 64:128] = True  # a block of padding throughout
    clean = [make_tensor(2, 1, length, 16, "blhd", torch.float32) for length in (20, 150, 150)]
    dirty = [clean[0].clone(), *(x.clone() for x in clean[1:])]
    for x, garbage in zip(dirty[1:], (float("nan"), float("inf")), strict=True):
        x.masked_fill_(mask[:, None, :, None], garbage)
    results = []
    for inputs in (clean, dirty):
        inputs = [x.requires_grad_() for x in inputs]
        torch.manual_seed(1)
        out, lse = attention(*inputs, mask, 0.2)
        results.append((out, lse, *torch.autograd.grad(out, inputs, torch.randn(out.shape))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for grad in results[1][3:]:
        assert (grad.masked_select(mask[:, None, :, None]) == 0).all()


def test_attention_rows_without_keys_are_zero():
    mask = torch.tensor([[True] * 70, [False] * 70])
    inputs = [make_tensor(2, 2, length, 16, "blhd", torch.float32).requires_grad_() for length in (5, 70, 70)]
    out, lse = attention(*inputs, mask, 0.1)
    grads = torch.autograd.grad(out, inputs, torch.randn(out.shape))
    assert (lse[0] == torch.inf).all() and lse[1].isfinite().all()
    for x in (out, *grads):
        assert (x[0] == 0).all() and (x[1] != 0).any()


def test_attention_drops_everything_at_one():
    inputs = [make_tensor(1, 1, length, 16, "blhd", torch.float32).requires_grad_() for length in (5, 9, 9)]
    out, _ = attention(*inputs, None, 1.0)
    for x in (out, *torch.autograd.grad(out, inputs, torch.randn(out.shape))):
        assert (x == 0).all()


def test_attention_empty():
    for batch, q_len, k_len in ((0, 3, 4), (1, 0, 4), (1, 3, 0)):
        inputs = [torch.randn(batch, 2, length, 16, requires_grad=True) for length in (q_len, k_len, k_len)]
        out, lse = attention(*inputs, torch.zeros(batch, k_len, dtype=torch.bool))
        assert out.shape == (batch, 2, q_len, 16) and (out == 0).all() and (lse == torch.inf).all()
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
        assert all((grad == 0).all() for grad in grads)


def test_attention_writes_every_element():
    """Outputs come from `empty`; filled with NaN, none may be left."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        mask = make_mask("suffix", 2, 200)
        inputs = [make_tensor(2, 1, length, 20, "blhd", torch.float32).requires_grad_() for length in (70, 200, 200)]
        out, lse = attention(*inputs, mask)
        grads = torch.autograd.grad(out, inputs, torch.randn(out.shape))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (out, lse, *grads))


def test_dropout_mask_of_the_kernel_is_the_helpers():
    """Bit for bit: with v the identity and equal scores, the output shows the mask itself."""
    q_len, k_len = 70, 128
    seed = torch.tensor([2**61 + 12345678901])
    out, _ = attention(
        torch.zeros(2, 2, q_len, 16), torch.zeros(2, 2, k_len, 16), torch.eye(k_len).expand(2, 2, -1, -1), None, 0.3,
        seed=seed,
    )  # fmt: skip
    assert torch.equal(out != 0, attention_dropout_mask(seed, 2, 2, q_len, k_len, 0.3))
