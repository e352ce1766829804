"""What of `attention` only a GPU can show."""

import math

import pytest
import torch
import torch.nn.functional as F

from detr_fast.ops import applied_dropout, attention, attention_dropout_mask, attention_reference

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make_inputs(dtype, batch=2, heads=8, q_len=850, k_len=850, dim=32, value_dim=None):
    """Views of one packed projection's kind of memory."""
    widths = ((q_len, dim), (k_len, dim), (k_len, value_dim or dim))
    return [
        torch.randn(batch, length, 2, heads, width, device="cuda").to(dtype)[:, :, 1].transpose(1, 2).requires_grad_()
        for length, width in widths
    ]


def make_mask(batch, k_len):
    """Padding interleaved in rows of 34, and a last block of padding throughout; the last image has no key."""
    mask = (torch.arange(k_len, device="cuda") % 34 >= 22).repeat(batch, 1)
    mask[:, k_len * 2 // 3 :] = True
    mask[-1] = True
    return mask


def plain(inputs, mask, p, keep, grad, dtype):
    """Output and gradients of PyTorch's operations, each in `dtype`."""
    q, k, v = inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :], -math.inf)
    probs = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    if keep is not None:
        probs = probs * keep / (1 - applied_dropout(p))
    out = probs @ v
    return [x.double().nan_to_num(0.0) for x in (out, *torch.autograd.grad(out, inputs, grad.to(dtype)))]


# Each compiles three kernels: DETR's head dimension with and without a mask and dropout, the others with both or none.
COMBINATIONS = [
    (dims, masked, p)
    for dims in ((16, 16), (32, 32), (64, 64), (128, 128), (24, 40))
    for masked in (False, True)
    for p in (0.0, 0.1)
    if dims == (32, 32) or masked == (p > 0)
]


@pytest.mark.parametrize(("dims", "masked", "p"), COMBINATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_attention_matches_reference(dtype, dims, masked, p):
    """Error against float64 at most twice that of plain PyTorch in the same dtype, and some roundings."""
    eps, eps_32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    for q_len, k_len in ((1, 1), (43, 100), (100, 850), (1063, 850)):
        inputs = make_inputs(dtype, 2, 2, q_len, k_len, *dims)
        mask = make_mask(2, k_len) if masked else None
        seed = torch.randint(0, 2**62, (1,), device="cuda")
        keep = attention_dropout_mask(seed, 2, 2, q_len, k_len, p, key_padding_mask=mask) if p else None
        out, _ = attention(*inputs, mask, p, seed=seed)
        grad = torch.randn(2, 2, q_len, 2 * out.shape[3], device="cuda").to(dtype)[..., ::2]
        results = (out, *torch.autograd.grad(out, inputs, grad))
        exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
        exact_out, _ = attention_reference(*exact_inputs, mask, p, keep)
        exact = (exact_out, *torch.autograd.grad(exact_out, exact_inputs, grad.double()))
        same_dtype = plain(inputs, mask, p, keep, grad, dtype)
        # With one key dq and dk are zero, and the peer's exactly; ours are differences of equal sums.
        floor = (32 * eps if k_len == 1 else 8 * eps_32) * grad.double().abs().mean()
        for name, result, want, peer in zip("out dq dk dv".split(), results, exact, same_dtype, strict=True):
            error = (result.double() - want).abs().amax(dim=(2, 3))  # per image and head
            allowed = 2 * (peer - want).abs().amax(dim=(2, 3)) + 2 * eps * want.abs().amax(dim=(2, 3)) + floor
            assert (error <= allowed).all(), f"{name} {q_len}x{k_len}: {error.max():.3g}"


@pytest.mark.parametrize(
    ("dims", "masked"), [((32, 32), False), ((32, 32), True), ((24, 40), True), ((128, 128), True)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_attention_skips_padded_queries(dtype, dims, masked):
    """The rows that are left and all gradients are those without the mask of queries; NaN in the others is not read."""
    p = 0.1 if masked else 0.0
    for q_len, k_len in ((1, 1), (43, 100), (850, 850), (1063, 850)):
        inputs = make_inputs(dtype, 2, 2, q_len, k_len, *dims)
        mask, rows = make_mask(2, k_len) if masked else None, make_mask(2, q_len)
        if not masked:
            rows[-1] = torch.rand(q_len, device="cuda") < 0.5
        padding = rows[:, None, :, None]
        seed = torch.randint(0, 2**62, (1,), device="cuda")
        grad = torch.randn(2, 2, q_len, dims[1], device="cuda").to(dtype)
        want, want_lse = attention(*inputs, mask, p, seed=seed)
        wants = torch.autograd.grad(want, inputs, grad.masked_fill(padding, 0))
        dirty = [inputs[0].detach().masked_fill(padding, math.nan).requires_grad_(), *inputs[1:]]
        out, lse = attention(*dirty, mask, p, seed=seed, query_padding_mask=rows)
        grads = torch.autograd.grad(out, dirty, grad.masked_fill(padding, math.nan))
        assert (out.masked_select(padding) == 0).all() and (grads[0].masked_select(padding) == 0).all()
        torch.testing.assert_close(lse, want_lse.masked_fill(rows[:, None], math.inf))
        pairs = zip("out dq dk dv".split(), (out, *grads), (want.masked_fill(padding, 0), *wants), strict=True)
        for name, result, other in pairs:
            error = (result.double() - other.double()).abs().amax(dim=(2, 3))
            allowed = 4 * torch.finfo(dtype).eps * other.double().abs().amax(dim=(2, 3)) + 1e-5  # sums in another order
            assert (error <= allowed).all(), f"{name} {q_len}x{k_len}: {error.max():.3g}"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_attention_is_deterministic(dtype):
    inputs, mask = make_inputs(dtype), make_mask(2, 850)
    seed = torch.tensor([5], device="cuda")
    grad = torch.randn(2, 8, 850, 32, device="cuda").to(dtype)
    first = None
    for _ in range(100):
        out, lse = attention(*inputs, mask, 0.1, seed=seed)
        results = (out, lse, *torch.autograd.grad(out, inputs, grad))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_attention_tf32_follows_torch():
    """TF32 where torch's matrix products use it, and only there."""
    inputs = make_inputs(torch.float32)
    exact, _ = attention_reference(*(x.double() for x in inputs))
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = (attention(*inputs)[0] - exact).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 3e-6 < errors["tf32"] < 1e-2


def test_attention_in_a_cuda_graph_changes_seeds():
    """Replays draw new seeds from the generator, and forward and backward use the same one."""
    inputs = [x.detach().requires_grad_() for x in make_inputs(torch.bfloat16)]
    mask = make_mask(2, 850)
    grad = torch.randn(2, 8, 850, 32, device="cuda", dtype=torch.bfloat16)

    def step():
        seed = torch.randint(0, 2**62, (1,), device="cuda")
        out, _ = attention(*inputs, mask, 0.1, seed=seed)
        return seed, out, torch.autograd.grad(out, inputs, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed, out, grads = step()
    seeds = set()
    for _ in range(3):
        graph.replay()
        seeds.add(seed.item())
        want, _ = attention(*inputs, mask, 0.1, seed=seed.clone())
        want_grads = torch.autograd.grad(want, inputs, grad)
        assert torch.equal(out, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))
    assert len(seeds) == 3


def test_attention_on_another_stream():
    inputs = make_inputs(torch.bfloat16)
    want, _ = attention(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out, _ = attention(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, want)


def test_attention_dropout_mask_is_the_same_on_every_device():
    for seed in (0, 2**62 - 1):
        on_gpu = attention_dropout_mask(torch.tensor([seed], device="cuda"), 2, 3, 70, 200, 0.3)
        assert torch.equal(on_gpu.cpu(), attention_dropout_mask(torch.tensor([seed]), 2, 3, 70, 200, 0.3))


def test_attention_int64_offsets():
    """Elements further than 2**31 from the first, by stride and by number."""
    batch, length, heads, dim = 3, 9, 2, 32
    storage = torch.empty(batch, 2**30 + 2**20, device="cuda", dtype=torch.bfloat16)
    views = [storage[:, i * 2**20 :][:, : length * heads * dim] for i in range(3)]
    views = [x.normal_().view(batch, length, heads, dim).transpose(1, 2) for x in views]
    torch.testing.assert_close(attention(*views)[0], attention(*(x.clone() for x in views))[0], rtol=0, atol=0)
    rows = [storage.as_strided((1, 1, length, dim), (0, 0, 2**28, 1), i * 64).normal_() for i in range(3)]
    torch.testing.assert_close(attention(*rows)[0], attention(*(x.clone() for x in rows))[0], rtol=0, atol=0)


def test_attention_compiles_dynamic():
    """Through Inductor, with no new graph when sizes change, and torch's attention's numbers."""
    compiled = torch.compile(
        lambda q, k, v, mask, rows: attention(q, k, v, mask, query_padding_mask=rows)[0] * 2,
        fullgraph=True, dynamic=True,
    )  # fmt: skip
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, q_len, k_len in ((2, 100, 850), (3, 43, 700), (4, 100, 333)):
            inputs = make_inputs(torch.bfloat16, batch, 8, q_len, k_len)
            mask = torch.rand(batch, k_len, device="cuda") < 0.3
            rows = torch.rand(batch, q_len, device="cuda") < 0.3
            out = compiled(*inputs, mask, rows)
            want = F.scaled_dot_product_attention(*inputs, attn_mask=~mask[:, None, None, :]) * 2
            torch.testing.assert_close(out, want.masked_fill(rows[:, None, :, None], 0), rtol=2e-2, atol=2e-2)
            out.backward(torch.randn_like(out))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_attention_opcheck(dtype):
    inputs, mask = make_inputs(dtype, q_len=43, k_len=100), make_mask(2, 100)
    arguments = (*inputs, mask, 0.1, torch.tensor([3], device="cuda"), 0.2)
    for rows in ((), (make_mask(2, 43),)):
        torch.library.opcheck(torch.ops.detr_fast.attention.default, (*arguments, *rows))


def test_attention_under_autocast():
    inputs = make_inputs(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out, lse = attention(*inputs)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(grad.dtype == torch.float32 for grad in grads)
