"""`attention` without a GPU: the reference, the op around it, and dropout's random numbers."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from detr_fast.ops import (
    _attention_chunked,
    _dropout_bits,
    applied_dropout,
    attention,
    attention_dropout_mask,
    attention_reference,
)
from detr_fast.ops.attention import attention_of_projections, remember_padding, split_projections

SEED = torch.tensor([12345678901234567])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_inputs(dtype=torch.float64, batch=2, heads=3, q_len=5, k_len=70, dim=4, value_dim=6):
    """Strided, as views of [B, L, H, D]."""
    shapes = ((q_len, dim), (k_len, dim), (k_len, value_dim))
    return [
        torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2).requires_grad_() for length, width in shapes
    ]


def make_rows(q_len=5):
    """Padded queries: some of the first image, none of the second."""
    rows = torch.zeros(2, q_len, dtype=torch.bool)
    rows[0, 1::2] = True
    return rows


def make_mask(k_len=70, all_padded=True):
    mask = torch.rand(2, k_len) < 0.5
    mask[:, 0] = False
    if all_padded:
        mask[1] = True
    return mask


def saved(tensor):
    """The tensor from a file."""
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


@pytest.fixture(params=["one_image", "batch", "batch_elsewhere"])
def grouping(request, monkeypatch):
    """Images with padding one at a time or the whole batch together, as on a CPU, or as on other devices."""
    monkeypatch.setattr(_attention_chunked, "_may_read_masks", lambda device: request.param != "batch_elsewhere")
    monkeypatch.setattr(_attention_chunked, "_ONE_IMAGE", 0 if request.param == "one_image" else math.inf)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attention_matches_sdpa(dtype):
    """Output and gradients against torch's own attention in float64."""
    inputs = make_inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = make_mask(all_padded=False)
    for padding in (None, mask):
        out, lse = attention(*inputs, padding, scale=0.4)
        keep = None if padding is None else ~padding[:, None, None, :]
        want = F.scaled_dot_product_attention(*exact, attn_mask=keep, scale=0.4)
        grad = torch.randn(out.shape).to(dtype)
        results = (out, *torch.autograd.grad(out, inputs, grad))
        wants = (want, *torch.autograd.grad(want, exact, grad.double()))
        unit = torch.finfo(dtype).eps
        for result, exact_result in zip(results, wants, strict=True):
            assert result.dtype == dtype
            torch.testing.assert_close(result.double(), exact_result, rtol=2 * unit, atol=8 * min(unit, 1e-6))
        scores = (exact[0] @ exact[1].transpose(-2, -1)) * 0.4
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=4e-7, atol=4e-7)


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_attention_of_a_scale_that_is_not_positive(scale):
    inputs, mask = make_inputs(), make_mask(all_padded=False)
    out, lse = attention(*inputs, mask, scale=scale)
    want = F.scaled_dot_product_attention(*inputs, attn_mask=~mask[:, None, None, :], scale=scale)
    scores = ((inputs[0] @ inputs[1].transpose(-2, -1)) * scale).masked_fill(mask[:, None, None, :], -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    grad = torch.randn_like(want)
    results = (out, *torch.autograd.grad(out, inputs, grad))
    for a, b in zip(results, (want, *torch.autograd.grad(want, inputs, grad)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_attention_output_memory():
    """out and the gradients are [B, L, H, D] in memory, also where a size is one; logsumexp is contiguous."""
    for batch, heads in ((2, 3), (1, 1), (2, 1)):
        inputs = [x.detach().contiguous().requires_grad_() for x in make_inputs(torch.float32, batch, heads)]
        out, lse = attention(*inputs)
        grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
        for x in (out, *grads):
            assert x.stride() == torch.empty(x.transpose(1, 2).shape).transpose(1, 2).stride()
        assert lse.is_contiguous() and lse.dtype == torch.float32 and not lse.requires_grad


@pytest.mark.parametrize(("p", "masked"), [(0.0, False), (0.0, True), (0.3, True)])
def test_attention_gradcheck(p, masked):
    inputs = make_inputs(k_len=11)
    mask = make_mask(11) if masked else None
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask, p, seed=SEED)[0], inputs)
    assert torch.autograd.gradcheck(lambda *x: attention_reference(*x, mask)[0], inputs)
    for function in (attention, attention_reference):
        assert torch.autograd.gradcheck(lambda *x, f=function: f(*x, mask, query_padding_mask=make_rows())[0], inputs)


@pytest.mark.parametrize(("dtype", "masked", "rows"), pairwise(DTYPES, [False, True], ["absent", "none", "rows"]))
def test_attention_opcheck(dtype, masked, rows):
    rows = {"absent": (), "none": (None,), "rows": (make_rows(),)}[rows]
    inputs = make_inputs(dtype, k_len=11)
    args = (*inputs, make_mask(11) if masked else None, 0.3 * masked, SEED if masked else None, 0.5, *rows)
    torch.library.opcheck(torch.ops.detr_fast.attention.default, args)
    with torch.no_grad():
        out, lse = torch.ops.detr_fast.attention(*args)
        grad = torch.randn(out.shape).to(dtype)
        args = (grad, *(x.detach() for x in inputs), out, lse, *args[3:])
        torch.library.opcheck(torch.ops.detr_fast.attention_backward.default, args)


def test_attention_dropout_is_the_helpers_mask():
    """The helper's mask in the reference gives the op's output and gradients."""
    inputs = make_inputs()
    for p in (0.1, 0.5, 1.0):
        for mask in (None, make_mask()):
            keep = attention_dropout_mask(SEED, 2, 3, 5, 70, p, key_padding_mask=mask)
            out, _ = attention(*inputs, mask, p, seed=SEED)
            want, _ = attention_reference(*inputs, mask, p, keep)
            grad = torch.randn_like(out)
            results = (out, *torch.autograd.grad(out, inputs, grad))
            wants = (want, *torch.autograd.grad(want, inputs, grad))
            for a, b in zip(results, wants, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert (p == 1) == bool((out == 0).all())


@pytest.mark.parametrize(
    ("dtype", "masked", "p", "dims"), pairwise(DTYPES, [False, True], [0.0, 0.3], [(4, 6), (8, 8)]), ids=str
)
def test_attention_padded_queries(dtype, masked, p, dims, grouping):
    """Zeros and +inf in their rows, whatever they hold; the rest is what it is without a mask of queries."""
    inputs, mask = make_inputs(dtype, dim=dims[0], value_dim=dims[1]), make_mask() if masked else None
    for rows in (make_rows(), torch.tensor([[True], [False]]).expand(2, 5), torch.ones(5, 2, dtype=torch.bool).t()):
        padding = rows[:, None, :, None]
        want, want_lse = attention(*inputs, mask, p, seed=SEED)
        grad = torch.randn(want.shape).to(dtype)
        wants = torch.autograd.grad(want, inputs, grad.masked_fill(padding, 0))
        for garbage in (0.0, math.nan, math.inf):
            dirty = [inputs[0].detach().masked_fill(padding, garbage).requires_grad_(), *inputs[1:]]
            out, lse = attention(*dirty, mask, p, seed=SEED, query_padding_mask=rows)
            grads = torch.autograd.grad(out, dirty, grad.masked_fill(padding, garbage))
            assert (out.masked_select(padding) == 0).all() and (grads[0].masked_select(padding) == 0).all()
            assert (lse.masked_select(rows[:, None]) == math.inf).all()
            unit = torch.finfo(dtype).eps
            close = {"rtol": 4 * unit, "atol": 4 * min(unit, 1e-6)}
            torch.testing.assert_close(out, want.masked_fill(padding, 0), **close)
            torch.testing.assert_close(lse, want_lse.masked_fill(rows[:, None], math.inf))
            torch.testing.assert_close(grads, wants, **close)
            keep = attention_dropout_mask(SEED, 2, 3, 5, 70, p, key_padding_mask=mask) if p else None
            reference, reference_lse = attention_reference(*dirty, mask, p, keep, query_padding_mask=rows)
            torch.testing.assert_close(lse, reference_lse)
            grads = torch.autograd.grad(reference, dirty, grad.masked_fill(padding, garbage))
            for a, b in zip((reference, *grads), (out, *wants), strict=True):
                torch.testing.assert_close(a, b, **close)
        # Nor does what valid values hold reach padded rows.
        values = inputs[2].detach().masked_fill(torch.ones_like(inputs[2], dtype=torch.bool), math.nan)
        out, _ = attention(*inputs[:2], values, mask, p, seed=SEED, query_padding_mask=rows)
        (grad_query,) = torch.autograd.grad(out, inputs[0], grad)
        assert (out.masked_select(padding) == 0).all() and (grad_query.masked_select(padding) == 0).all()


def padding_masks(length):
    """[3, length] masks by name: padding at the end, anywhere, of whole images, of none of a mask's images."""
    valid = {
        "suffix": (length, length // 2, 1),
        "anywhere": (length // 3, length, length // 2),
        "image": (0, length, 2),
    }
    masks = {"none": None, "unused": torch.zeros(3, length, dtype=torch.bool)}
    for name, counts in valid.items():
        masks[name] = torch.arange(length) >= torch.tensor(counts)[:, None]
        if name != "suffix":
            masks[name] = masks[name][:, torch.randperm(length)]
    masks["everything"] = torch.ones(length, 3, dtype=torch.bool).t()
    return masks


KINDS = ["none", "unused", "suffix", "anywhere", "image", "everything"]


# Without dropout, one head dimension and two make the difference between PyTorch's fused attention and ours.
NUMBERS = {
    "fp64-dropout": (torch.float64, (4, 6), 0.3),
    "fp32-fused": (torch.float32, (8, 8), 0.0),
    "fp32": (torch.float32, (4, 6), 0.0),
    "bf16-dropout": (torch.bfloat16, (8, 8), 0.3),
}


@pytest.mark.parametrize(("keys", "queries", "numbers"), pairwise(KINDS, KINDS, list(NUMBERS)))
def test_attention_without_padding(keys, queries, numbers, grouping):
    """Whatever the padding holds: output and gradients are the reference's in float64 of inputs with zeros there."""
    q_len, k_len, (dtype, dims, p) = 13, 70, NUMBERS[numbers]
    mask, rows = padding_masks(k_len)[keys], padding_masks(q_len)[queries]
    clean = [x.detach() for x in make_inputs(dtype, 3, 2, q_len, k_len, *dims)]
    grad = torch.randn(3, 2, q_len, dims[1]).to(dtype)

    def filled(value):
        return [
            x if padding is None else x.masked_fill(padding[:, None, :, None], value)
            for x, padding in zip((*clean, grad), (rows, mask, mask, rows), strict=True)
        ]

    *inputs, grad_out = filled(math.nan)
    inputs = [x.requires_grad_() for x in inputs]
    out, lse = attention(*inputs, mask, p, seed=SEED, query_padding_mask=rows)
    results = (out, lse, *torch.autograd.grad(out, inputs, grad_out))

    *exact, exact_grad = (x.double() for x in filled(0.0))
    exact = [x.requires_grad_() for x in exact]
    keep = attention_dropout_mask(SEED, 3, 2, q_len, k_len, p, key_padding_mask=mask) if p else None
    want, want_lse = attention_reference(*exact, mask, p, keep, query_padding_mask=rows)
    wants = (want, want_lse, *torch.autograd.grad(want, exact, exact_grad))
    unit = torch.finfo(dtype).eps
    for result, exact_result in zip(results, wants, strict=True):
        tolerance = {"rtol": 4e-7, "atol": 4e-7} if result is lse else {"rtol": 4 * unit, "atol": 16 * unit}
        torch.testing.assert_close(result.double(), exact_result, **tolerance)


@pytest.mark.parametrize("dims", [(4, 6), (8, 8)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_computes_the_valid_pairs_alone(p, dims, monkeypatch):
    """On a CPU an image's scores in either pass are its valid queries times its valid keys, if there are many."""
    monkeypatch.setattr(_attention_chunked, "_ONE_IMAGE", 2 * 13 * 70)
    computed, has_fused = [], _attention_chunked._has_fused

    def count(q, k, v, seed):
        computed.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return has_fused(q, k, v, seed)

    monkeypatch.setattr(_attention_chunked, "_has_fused", count)
    inputs = make_inputs(torch.float32, 3, 2, 13, 70, *dims)
    for keys in KINDS:
        for queries in KINDS:
            mask, rows = padding_masks(70)[keys], padding_masks(13)[queries]
            key_counts = torch.full((3,), 70) if mask is None else (~mask).sum(dim=1)
            query_counts = torch.full((3,), 13) if rows is None else (~rows).sum(dim=1)
            computed.clear()
            out, _ = attention(*inputs, mask, p, seed=SEED, query_padding_mask=rows)
            assert sum(computed) == 2 * (query_counts * key_counts).sum()
            assert len(computed) == (1 if {keys, queries} <= {"none", "unused"} else 3)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            assert sum(computed) == 4 * (query_counts * key_counts).sum()
    computed.clear()
    attention(*(x[:, :, :12] if x is inputs[0] else x for x in inputs), padding_masks(70)["suffix"], p, seed=SEED)
    assert computed == [3 * 2 * 12 * 70]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_in_chunks_reads_no_mask_on_a_gpu(p):
    """Reading one would wait for the GPU; a fake tensor raises when it is read, and has every other property."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        inputs = [x.detach().to("cuda") for x in make_inputs(torch.float64, 2, 8, 300, 300)]
        mask = torch.zeros(2, 300, dtype=torch.bool, device="cuda")
        settings = (mask, mask, torch.zeros(1, dtype=torch.int64, device="cuda") if p else None, 77, 1.4, 0.5)
        out, logsumexp = torch.empty_like(inputs[2]), inputs[0].new_empty(2, 8, 300)
        _attention_chunked.chunked_forward(*inputs, *settings, out=out, logsumexp=logsumexp)
        grads = {f"grad_{name}": x.clone() for name, x in zip(("query", "key", "value"), inputs, strict=True)}
        _attention_chunked.chunked_backward(out, *inputs, out, logsumexp, *settings, **grads)


@pytest.mark.parametrize("scores", [1, 70, 150, 350, 700])
def test_attention_in_chunks(scores, grouping, monkeypatch):
    """Whatever number of scores is computed at once: single rows, some rows, whole heads, several heads."""
    monkeypatch.setattr(_attention_chunked, "_CPU_CHUNK", scores)
    inputs = make_inputs()
    for mask in (make_mask(), make_mask(all_padded=False)):
        keep = attention_dropout_mask(SEED, 2, 3, 5, 70, 0.3, key_padding_mask=mask)
        for rows in (None, make_rows()):
            out, lse = attention(*inputs, mask, 0.3, seed=SEED, query_padding_mask=rows)
            want, want_lse = attention_reference(*inputs, mask, 0.3, keep, query_padding_mask=rows)
            grad = torch.randn_like(out)
            torch.testing.assert_close((out, lse), (want, want_lse))
            torch.testing.assert_close(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(want, inputs, grad))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (2, 1)])
def test_no_chunk_is_larger_than_the_limit(batch, heads, monkeypatch):
    """Nor that of a single head."""
    computed, scores = [], _attention_chunked._scores
    monkeypatch.setattr(_attention_chunked, "_CPU_CHUNK", 150)
    monkeypatch.setattr(_attention_chunked, "_scores", lambda *x: (computed.append(scores(*x)), computed[-1])[1])
    inputs = make_inputs(batch=batch, heads=heads)
    out, _ = attention(*inputs, None, 0.3)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert sum(x.numel() for x in computed) == 2 * batch * heads * 5 * 70
    assert max(x.numel() for x in computed) <= 150


@pytest.mark.parametrize("length", [0, 1, 43, 1025])
def test_valid_rows(length):
    """In plain PyTorch, for tensors that no kernel takes."""
    mask = torch.rand(3, length) < 0.5
    mask[1], mask[2] = True, False
    torch.library.opcheck(torch.ops.detr_fast.valid_rows.default, (mask,))
    for row, image in zip(torch.ops.detr_fast.valid_rows(mask).tolist(), mask, strict=True):
        valid, padding = (x.nonzero().flatten().tolist() for x in (~image, image))
        assert row == [len(valid), *valid, *padding[::-1]]


def test_dropout_words_are_philox():
    """Four words of the seed's first counter, from a scalar implementation of the published rounds."""
    from detr_fast.ops._dropout_bits import philox, round_keys

    mask, multipliers, bumps = 0xFFFFFFFF, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)

    def scalar(counter, key, rounds):
        c, k = list(counter), list(key)
        for _ in range(rounds):
            a, b = c[0] * multipliers[0], c[2] * multipliers[1]
            c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
            k = [(k[i] + bumps[i]) & mask for i in (0, 1)]
        return c

    # The known answer of Random123 for ten rounds, counter and key of ones: the scalar one is Philox.
    assert scalar([mask] * 4, [mask] * 2, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter = [3, 2**31 + 5, 2**32 - 1, 0]
    for seed in (0, 2**62 - 1, -5):
        words = philox(round_keys(torch.tensor([seed])), *(torch.tensor([c]) for c in counter))
        key = [seed & mask, (seed >> 32) & mask]
        assert [int(word) & mask for word in words] == scalar(counter, key, 7)


def test_dropout_rate():
    """Over 1.3e7 draws within four standard errors of the rate that is said to be applied."""
    for p in (0.1, 0.5, 0.002):
        kept = attention_dropout_mask(torch.randint(0, 2**62, (1,)), 4, 8, 640, 640, p)
        rate, applied = 1 - kept.double().mean().item(), applied_dropout(p)
        assert abs(rate - applied) < 4 * math.sqrt(applied * (1 - applied) / kept.numel())


def test_dropout_is_uncorrelated():
    """Neighbours in every direction, heads, images and layers (seeds) within four and a half standard errors of 0."""
    p = 0.3
    masks = [attention_dropout_mask(torch.tensor([seed]), 2, 4, 300, 512, p) for seed in (1, 2, 1 + 2**32)]
    x = (masks[0].double() - 1 + applied_dropout(p)) / math.sqrt(applied_dropout(p) * (1 - applied_dropout(p)))
    others = [(m.double() - m.double().mean()) / m.double().std() for m in masks[1:]]
    pairs = {f"layer {i}": (x, other) for i, other in enumerate(others)}
    for shift in (1, 2, 4, 8, 16, 64):
        pairs[f"column {shift}"] = (x[..., shift:], x[..., :-shift])
        pairs[f"row {shift}"] = (x[..., shift:, :], x[..., :-shift, :])
    pairs["head"] = (x[:, 1:], x[:, :-1])
    pairs["image"] = (x[1:], x[:-1])
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 4.5 / math.sqrt(a.numel()), name


def test_dropout_mask_does_not_depend_on_the_lengths():
    whole = attention_dropout_mask(SEED, 2, 3, 70, 200, 0.4)
    assert torch.equal(attention_dropout_mask(SEED, 2, 3, 43, 65, 0.4), whole[:, :, :43, :65])
    assert torch.equal(attention_dropout_mask(SEED, 1, 3, 70, 200, 0.4), whole[:1])


def test_dropout_mask_of_padding():
    """A key's column is its place among its image's keys without padding; padded ones are not kept."""
    mask = padding_masks(70)["anywhere"]
    plain = attention_dropout_mask(SEED, 3, 2, 5, 70, 0.3)
    keep = attention_dropout_mask(SEED, 3, 2, 5, 70, 0.3, key_padding_mask=mask)
    for image, valid in enumerate(~mask):
        assert torch.equal(keep[image][..., valid], plain[image, ..., : valid.sum()])
        assert not keep[image][..., ~valid].any()
    for shape in ((3, 69), (2, 70), (70,), (3, 1)):
        with pytest.raises(ValueError, match=r"expected \[3, 70\]"):
            attention_dropout_mask(SEED, 3, 2, 5, 70, 0.3, key_padding_mask=torch.zeros(shape, dtype=torch.bool))


def test_applied_dropout():
    assert [applied_dropout(p) for p in (0, 1, 0.1, 1e-6, 0.9999)] == [0, 1, 26 / 256, 1 / 256, 255 / 256]


def test_attention_manual_seed_reproduces():
    inputs = make_inputs()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attention(*inputs, None, 0.5)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_checkpoint_reproduces(reentrant):
    inputs = make_inputs()
    grad = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    results = []
    for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=reentrant)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        torch.manual_seed(3)
        run(lambda q, k, v: attention(q, k, v, None, 0.5)[0], *leaves).backward(grad)
        results.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_autocast(dtype):
    q, k, v = make_inputs(torch.float32)
    with torch.autocast("cpu", dtype):
        out, lse = attention(q, k.to(dtype), v)
        assert attention(*make_inputs(torch.float64))[0].dtype == torch.float64
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, attention(q.to(dtype), k.to(dtype), v.to(dtype))[0])
    grads = torch.autograd.grad(out, (q, v), torch.randn(out.shape).to(dtype))
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_attention_compiles_dynamic(p):
    """One graph whatever the sizes, with the same numbers forward and backward."""
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def run(q, k, v, mask, rows):
        return attention(q, k, v, mask, p, query_padding_mask=rows)[0] * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for batch, q_len, k_len in ((2, 5, 70), (3, 6, 71), (4, 9, 33)):
        inputs = make_inputs(torch.float32, batch, 3, q_len, k_len)
        mask, rows = torch.rand(batch, k_len) < 0.3, torch.rand(batch, q_len) < 0.3
        grad = torch.randn(batch, 3, q_len, 6)
        results = []
        for function in (compiled, run):
            torch.manual_seed(0)
            out = function(*inputs, mask, rows)
            results.append((out, *torch.autograd.grad(out, inputs, grad)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert graphs == 1


def test_attention_compiles_through_aot():
    mask = make_mask()
    for options in ({}, {"query_padding_mask": make_rows()}):
        compiled = torch.compile(lambda *x, o=options: attention(*x, mask, **o)[0], fullgraph=True, backend="aot_eager")
        inputs = make_inputs(torch.float32)
        out = compiled(*inputs)
        want, _ = attention(*inputs, mask, **options)
        grad = torch.randn_like(out)
        assert torch.equal(out, want)
        for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
            assert torch.equal(a, b)


def test_attention_padding_reaches_nothing():
    mask = make_mask()
    clean = make_inputs()
    dirty = [clean[0].detach(), *(x.detach().masked_fill(mask[:, None, :, None], math.nan) for x in clean[1:])]
    results = []
    for inputs in (clean, dirty):
        inputs = [x.detach().requires_grad_() for x in inputs]
        torch.manual_seed(0)
        out, lse = attention(*inputs, mask, 0.3)
        assert (out[1] == 0).all() and (lse[1] == math.inf).all()
        results.append((out, lse, *torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=out.dtype))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert all((grad[1] == 0).all() for grad in results[1][2:])


def test_attention_refuses_double_backward_and_vmap():
    inputs = make_inputs()
    (grad,) = torch.autograd.grad(attention(*inputs)[0].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda q: attention(q, *inputs[1:])[0])(inputs[0][None])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": torch.zeros(2, 3, 5, 4, dtype=torch.int64)}, TypeError, "int64"),
        ({"query": torch.zeros(2, 3, 5, 4, dtype=torch.float64)}, TypeError, "expected one"),
        ({"query": torch.zeros(2, 3, 5)}, ValueError, r"\[2, 3, 5\]"),
        ({"query": torch.zeros(2, 3, 5, 8)}, ValueError, r"\[B, H, Lk, D\]"),
        ({"key": torch.zeros(2, 3, 8, 4)}, ValueError, r"\[B, H, Lk, Dv\]"),
        ({"value": torch.zeros(2, 1, 7, 4)}, ValueError, r"\[B, H, Lk, Dv\]"),
        ({"value": torch.zeros(2, 3, 7, 0)}, ValueError, "at least 1"),
        ({"key_padding_mask": torch.zeros(2, 7)}, TypeError, "float32; expected bool"),
        ({"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}, ValueError, r"\[2, 5\]"),
        ({"query_padding_mask": [True]}, TypeError, "query_padding_mask is a list"),
        (
            {"query_padding_mask": torch.zeros(2, 5)},
            TypeError,
            "query_padding_mask has dtype torch.float32; expected bool",
        ),
        (
            {"query_padding_mask": torch.zeros(2, 7, dtype=torch.bool)},
            ValueError,
            r"query_padding_mask has shape \[2, 7\]; expected \[B, Lq\], here \[2, 5\]",
        ),
        (
            {"query_padding_mask": torch.zeros(2, 5, dtype=torch.bool, device="meta")},
            ValueError,
            "on meta, query on cpu",
        ),
        ({"dropout_p": 1.5}, ValueError, "0..1"),
        ({"seed": 5}, TypeError, "int64 tensor"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"\[1\]"),
        ({"scale": math.inf}, ValueError, "finite"),
        ({"value": torch.zeros(2, 3, 7, 4, device="meta")}, ValueError, "one device"),
    ],
)
def test_attention_rejects(change, error, match):
    arguments = {"query": torch.zeros(2, 3, 5, 4), "key": torch.zeros(2, 3, 7, 4), "value": torch.zeros(2, 3, 7, 4)}
    with pytest.raises(error, match=match):
        attention(**(arguments | change))


PACKINGS = [(3,), (2, 1), (1, 2)]


def make_projections(packing, dtype=torch.float64, q_len=7, k_len=7, length_first=False):
    """Tensors [B, L, n, H, D]; with `length_first` the memory is [L, B, n, H, D]."""
    lengths = {(1, 2): (q_len, k_len), (2, 1): (k_len, k_len), (3,): (k_len,)}[packing]
    projections = [torch.randn(2, length, n, 3, 8).to(dtype) for length, n in zip(lengths, packing, strict=True)]
    if length_first:
        projections = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in projections]
    return [x.requires_grad_() for x in projections]


@pytest.mark.parametrize(
    ("packing", "dtype", "masked", "length_first"),
    pairwise(PACKINGS, DTYPES, [False, True], [False, True]),
)
def test_attention_of_projections_is_attention(packing, dtype, masked, length_first, grouping):
    """Outputs and gradients bit for bit, and the gradients in the projections' own layout."""
    projections = make_projections(packing, dtype, q_len=5, length_first=length_first)
    parts = [x.detach().clone().requires_grad_() for x in split_projections(projections)]
    mask = make_mask(7) if masked else None
    rows = mask if packing != (1, 2) else None
    options = {"seed": SEED, "query_padding_mask": rows}
    out, lse = attention_of_projections(projections, mask, 0.3, **options)
    want, want_lse = attention(*parts, mask, 0.3, **options)
    cotangent = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, projections, cotangent)
    assert torch.equal(out, want) and torch.equal(lse, want_lse) and not lse.requires_grad
    assert all(grad.stride() == x.stride() for grad, x in zip(grads, projections, strict=True))
    for grad, expected in zip(split_projections(grads), torch.autograd.grad(want, parts, cotangent), strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("packing", PACKINGS)
def test_attention_of_projections_gradcheck(packing):
    mask = make_mask(7)
    for masks in ((None, 0.0), (mask, 0.3)):
        function = lambda *x, masks=masks: attention_of_projections(x, *masks, seed=SEED)[0]  # noqa: E731
        assert torch.autograd.gradcheck(function, make_projections(packing))


@pytest.mark.parametrize(
    ("packing", "dtype", "masked"),
    [((2, 1), torch.bfloat16, True), ((3,), torch.float32, False), ((1, 2), torch.float64, True)],
)
def test_attention_of_projections_opcheck(packing, dtype, masked):
    projections = make_projections(packing, dtype, q_len=5)
    options = (make_mask(7) if masked else None, 0.3 * masked, SEED if masked else None, 0.5, None, None, None)
    torch.library.opcheck(torch.ops.detr_fast.packed_attention.default, (projections, *options))
    with torch.no_grad():
        out, lse = torch.ops.detr_fast.packed_attention(projections, *options)
        grad = torch.randn(out.shape).to(dtype)
        args = (grad, [x.detach() for x in projections], out, lse, *options)
        torch.library.opcheck(torch.ops.detr_fast.packed_attention_backward.default, args)


def test_attention_of_projections_compiles_dynamic():
    torch._dynamo.reset()
    compiled = torch.compile(attention_of_projections, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 12):
        projections = make_projections((2, 1), k_len=length)
        mask = make_mask(length)
        results = [f(projections, mask, 0.3, seed=SEED)[0] for f in (compiled, attention_of_projections)]
        cotangent = torch.randn_like(results[0])
        grads = [torch.autograd.grad(out, projections, cotangent) for out in results]
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(grads[0], grads[1])


def test_attention_of_projections_rejects():
    with pytest.raises(ValueError, match="key_padding_mask has shape"):
        attention_of_projections(make_projections((3,)), torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match="float32"):
        attention_of_projections([make_projections((2, 1))[0], make_projections((2, 1), torch.float32)[1]])


@pytest.mark.parametrize("chunk", [2**20, 2**8])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("packing", PACKINGS)
def test_eager_attention_on_a_cpu_is_the_ops_without_the_library(packing, dropout_p, chunk, grouping, monkeypatch):
    """Bit for bit; with dropout the backward draws again only where the forward's chunks were too many to keep."""
    monkeypatch.setattr(_attention_chunked, "_CPU_CHUNK", chunk)
    draws = []

    def drawn(*args):
        draws.append(args)
        return dropout_bytes(*args)

    dropout_bytes = _attention_chunked.dropout_bytes
    monkeypatch.setattr(_attention_chunked, "dropout_bytes", drawn)
    projections = make_projections(packing, torch.float32)
    mask = make_mask(7)
    out, lse = attention_of_projections(projections, mask, dropout_p, seed=SEED, query_padding_mask=mask)
    assert type(out.grad_fn).__name__ == "_PlainAttentionBackward"
    in_forward = len(draws)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, projections, cotangent)
    assert (in_forward > 0) == (dropout_p > 0)
    assert len(draws) == in_forward * (1 if chunk == 2**20 else 2)

    options = (mask, dropout_p, SEED if dropout_p else None, projections[0].shape[-1] ** -0.5, mask, None, None)
    want, want_lse = torch.ops.detr_fast.packed_attention(projections, *options)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    for grad, expected in zip(grads, torch.autograd.grad(want, projections, cotangent), strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_log_sum_exp_may_be_left_out(packing, dropout_p, grouping):
    projections, mask = make_projections(packing), make_mask(7)
    results = []
    for needed in (True, False):
        out, lse = attention_of_projections(
            projections, mask, dropout_p, seed=SEED, query_padding_mask=mask, need_logsumexp=needed
        )
        assert (lse is not None) == needed
        cotangent = torch.ones(2, *out.shape, dtype=out.dtype)
        together = torch.autograd.grad(out, projections, cotangent, is_grads_batched=True, retain_graph=True)
        results.append([out, *torch.autograd.grad(out, projections, cotangent[0]), *(x[1] for x in together)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_computed_from_a_mask_is_kept_for_all_attentions_under_it(grouping, monkeypatch):
    made, fact = [], _attention_chunked.fact
    monkeypatch.setattr(_attention_chunked, "fact", lambda mask, name, make: fact(mask, name, counted(name, make)))

    def counted(name, make):
        return lambda mask: (made.append(name), make(mask))[1]

    inputs, base = make_inputs(k_len=12, q_len=12), make_mask(12, all_padded=False)[:, None]
    mask = remember_padding(base.flatten(1))

    def check(kept):
        made.clear()
        found = []
        for padding in (mask, mask, mask.clone()):
            out, lse = attention(*inputs, padding, 0.3, seed=SEED, query_padding_mask=padding)
            found.append([out, lse, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
            if padding is mask:
                assert not kept or len(made) == len(set(made)) > 0
        assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))

    check(kept=True)
    base[0, 0, 3:] = True  # through another view
    check(kept=False)
    with torch.inference_mode():
        mask = remember_padding(base.clone().flatten(1))
        mask[:, 2:5] = True
        out, _ = attention(*inputs, mask, query_padding_mask=mask)
        assert torch.equal(out, attention(*inputs, mask.clone(), query_padding_mask=mask.clone())[0])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask)), saved])
def test_a_copy_of_a_mask_has_none_of_what_is_kept_with_it(copied, grouping):
    inputs, mask = make_inputs(k_len=12, q_len=12), make_mask(12, all_padded=False)
    remember_padding(mask)
    version = mask._version
    attention(*inputs, mask, query_padding_mask=mask)
    mask[:, 3:] = True
    other = copied(mask)
    while other._version < version:  # up to that for which something was kept with the original
        other |= mask
    out, _ = attention(*inputs, other, query_padding_mask=other)
    assert torch.equal(out, attention(*inputs, mask.clone(), query_padding_mask=mask.clone())[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("many", [0, math.inf], ids=["one_image", "batch"])
def test_the_backward_goes_by_the_forwards_masks(dropout_p, many, monkeypatch):
    """Hooks that save copies allow to write to the originals."""
    monkeypatch.setattr(_attention_chunked, "_ONE_IMAGE", many)
    inputs, original = make_inputs(k_len=12, q_len=12), make_mask(12)
    grads = []
    for written in (False, True):
        mask = original.clone()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
            out, _ = attention(*inputs, mask, dropout_p, seed=SEED, query_padding_mask=mask)
        if written:
            mask.logical_not_()
        grads.append(torch.autograd.grad(out, inputs, torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_attention_under_a_dispatch_mode_is_one_op():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names = []
    inputs = make_inputs()
    with Names():
        attention(*inputs)
    assert "detr_fast.attention.default" in names


@pytest.mark.parametrize("rows", [range(7), range(3, 20), torch.tensor([0, 5, 6, 2**31])])
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
@pytest.mark.parametrize("k_len", [1, 64, 70, 200])
def test_dropout_bytes_of_numpy_are_those_of_torch(k_len, seed, rows, monkeypatch):
    arguments = (torch.tensor([seed]), range(3, 9), rows, k_len)
    in_numpy = _dropout_bits.dropout_bytes(*arguments)
    monkeypatch.setattr(_dropout_bits, "_SMALL", 0)
    assert torch.equal(in_numpy, _dropout_bits.dropout_bytes(*arguments))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("packing", [(3,), (1, 2), None])
def test_many_gradients_at_a_time_are_those_one_by_one(packing, dropout_p):
    inputs = make_inputs() if packing is None else make_projections(packing)
    function = (
        (lambda: attention(*inputs, None, dropout_p, seed=SEED))
        if packing is None
        else (lambda: attention_of_projections(inputs, None, dropout_p, seed=SEED))
    )
    out = function()[0]
    cotangents = torch.randn(3, *out.shape, dtype=out.dtype)
    together = torch.autograd.grad(out, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        for batched, single in zip(
            together, torch.autograd.grad(out, inputs, cotangent, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(batched[i], single)


def test_many_gradients_at_a_time_of_the_packed_op():
    projections = make_projections((3,))
    options = (make_mask(7), 0.3, SEED, 0.5, None, None, None)
    out, _ = torch.ops.detr_fast.packed_attention(projections, *options)
    cotangents = torch.randn(2, *out.shape, dtype=out.dtype)
    together = torch.autograd.grad(out, projections, cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        (single,) = torch.autograd.grad(out, projections, cotangent, retain_graph=True)
        torch.testing.assert_close(together[0][i], single)


def test_an_attentions_result_may_be_changed_in_place():
    inputs = [x.detach() for x in make_inputs()]
    summand = torch.ones(6, dtype=torch.float64, requires_grad=True)
    out, _ = attention(*inputs)
    out += summand
    out.sum().backward()
    assert torch.equal(summand.grad, torch.full_like(summand, out[..., 0].numel()))
