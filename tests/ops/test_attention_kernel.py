"""The attention kernels through Triton's interpreter, against the float64 reference, element by element."""

import random

import pytest
import torch
from pairwise import pairwise

from detr_fast.ops import applied_dropout, attention, attention_dropout_mask, attention_reference
from detr_fast.ops.attention import attention_of_projections, remember_padding, split_projections

pytestmark = pytest.mark.interpret

HEAD_DIMS = ((16, 16), (32, 32), (64, 64), (128, 128), (8, 8), (20, 24), (64, 32), (1, 3))
LAYOUTS = ("blhd", "lbhd", "packed", "bhld", "bhdl", "gap")
MASKS = ("none", "suffix", "interleaved", "random", "one key", "row all padded", "all padded")
GRADS = ("dense", "bhld", "expanded", "cat")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_cases() -> list[dict]:
    """Every head dimension with every mask of keys and of queries, and so on; sizes are drawn."""
    axes = {
        "dims": HEAD_DIMS,
        "mask": MASKS,
        "rows": MASKS[:-1],  # not those that leave nothing to compute
        "layout": LAYOUTS,
        "grad": GRADS,
        "dropout_p": (0.0, 0.1, 0.5, 0.9),
        "dtype": tuple(DTYPES),
        "scale": (None, 0.3),
    }
    cases, draw = [], random.Random(0)
    for values in pairwise(*axes.values()):
        case = dict(zip(axes, values, strict=True))
        case["q_len"] = draw.choice((1, 2, 16, 43, 63, 64, 65, 100))
        case["k_len"] = draw.choice((1, 2, 16, 43, 63, 64, 65, 100, 130, 200))
        case["batch"], case["heads"] = draw.choice(((1, 1), (2, 1), (1, 2), (2, 2), (3, 1)))
        if case["q_len"] * case["k_len"] > 5000:  # the interpreter's time goes by tiles
            case["batch"] = 2 if "row all padded" in (case["mask"], case["rows"]) else 1
            case["heads"] = 1
        cases.append(case)
    return cases


def case_id(case: dict) -> str:
    mask = f"{case['mask']}-rows_{case['rows']}".replace(" ", "_")
    return (
        f"B{case['batch']}-H{case['heads']}-Q{case['q_len']}-K{case['k_len']}-D{case['dims'][0]}.{case['dims'][1]}-"
        f"{case['layout']}-{mask}-p{case['dropout_p']}-{case['grad']}-{case['dtype']}"
    )


CASES = make_cases()


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


def check(inputs, mask, dropout_p, scale, grad_kind, query_padding_mask=None):
    """The op's output and gradients, against the float64 reference fed with the helper's dropout mask.

    Each element may be off by a few roundings of the terms that were summed for it. (In float16 also by what is lost
    below its smallest normal number, on the way and at the end.)
    """
    query, key, _ = inputs
    batch, heads, q_len, head_dim = query.shape
    inputs = [x.requires_grad_() for x in inputs]
    seed = torch.randint(0, 2**62, (1,))
    options = {"scale": scale, "query_padding_mask": query_padding_mask}
    out, lse = attention(*inputs, mask, dropout_p, seed=seed, **options)
    grad = make_grad(grad_kind, out)
    grads = torch.autograd.grad(out, inputs, grad)
    sizes = batch, heads, q_len, key.shape[2]
    keep = attention_dropout_mask(seed, *sizes, dropout_p, key_padding_mask=mask) if dropout_p else None

    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact_out, exact_lse = attention_reference(*exact, mask, dropout_p, keep, **options)
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
    rows = make_mask(case["rows"], case["batch"], case["q_len"])
    check(inputs, mask, case["dropout_p"], case["scale"], case["grad"], rows)


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


def padded_map(height, width, valid_height, valid_width):
    """[1, height · width]: a padded feature map, row by row."""
    padding = torch.ones(height, width, dtype=torch.bool)
    padding[:valid_height, :valid_width] = False
    return padding.flatten()[None]


def test_attention_of_a_padded_map():
    """Self-attention under one mask: half of the tiles of queries have rows to compute, the last of them some."""
    mask = padded_map(15, 20, 12, 13)
    inputs = [make_tensor(1, 1, 300, 16, "blhd", torch.float32) for _ in range(3)]
    check(inputs, mask, 0.3, None, "dense", mask)


def test_attention_computes_no_tile_of_padding(monkeypatch):
    """Blocks of keys that the forward and the gradient of queries go through: those of tiles with a valid query."""
    from detr_fast.kernels import _configurations, attention_backward
    from detr_fast.kernels import attention as attention_forward

    passes = []

    def counted(block):
        def run(*arguments):
            passes.append(block)
            return block(*arguments)

        return run

    for module, name in ((attention_forward, "_forward_block"), (attention_backward, "_grad_query_block")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    tile = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(_configurations, "configuration", lambda *_, **__: tile)
    inputs = [make_tensor(1, 2, 300, 16, "blhd", torch.float32).requires_grad_() for _ in range(3)]
    rows = padded_map(15, 20, 9, 10)  # 90 of 300: three tiles of ten
    for mask, blocks in ((None, 5), (rows, 2)):
        passes.clear()
        out, _ = attention(*inputs, mask, query_padding_mask=rows)
        assert len(passes) == 2 * 3 * blocks
        torch.autograd.grad(out, inputs, torch.randn_like(out))
        assert len(passes) == 4 * 3 * blocks


@pytest.mark.parametrize("length", [0, 1, 43, 1023, 1024, 1025, 2500])
def test_valid_rows(length):
    """The lists of valid rows, of masks with any strides."""
    drawn = torch.rand(3, length) < 0.5
    drawn[1], drawn[2] = True, False
    for mask in (
        drawn,
        drawn.t().contiguous().t(),
        torch.stack((drawn, ~drawn), dim=2)[..., 0],
        drawn[:1].expand(3, -1),
    ):
        for row, image in zip(torch.ops.detr_fast.valid_rows(mask).tolist(), mask, strict=True):
            valid = (~image).nonzero().flatten().tolist()
            assert row[: 1 + len(valid)] == [len(valid), *valid]
            assert row[1 + len(valid) :] == image.nonzero().flatten().flip(0).tolist()


def test_attention_lists_valid_rows_once(monkeypatch):
    """Forward and backward read one list of a mask, also where it is both the keys' and the queries'."""
    from detr_fast.kernels import attention as kernels

    launched, launch = [], kernels.valid_rows
    monkeypatch.setattr(kernels, "valid_rows", lambda mask, *, out: launched.append(mask) or launch(mask, out=out))
    inputs = [make_tensor(2, 1, 43, 16, "blhd", torch.float32).requires_grad_() for _ in range(3)]
    mask = make_mask("suffix", 2, 43)
    for options, lists in (((), 0), ((mask,), 1), ((mask, mask), 1), ((mask, mask.clone()), 2), ((None, mask), 1)):
        launched.clear()
        key_padding_mask, query_padding_mask = (*options, None, None)[:2]
        out, _ = attention(*inputs, key_padding_mask, 0.1, query_padding_mask=query_padding_mask)
        torch.autograd.grad(out, inputs, torch.randn_like(out))
        assert len(launched) == lists


def test_attentions_under_one_mask_share_its_list_until_it_is_written_to(monkeypatch):
    from detr_fast.kernels import attention as kernels

    launched, launch = [], kernels.valid_rows
    monkeypatch.setattr(kernels, "valid_rows", lambda mask, *, out: launched.append(mask) or launch(mask, out=out))
    inputs = [make_tensor(2, 1, 43, 16, "blhd", torch.float32) for _ in range(3)]
    base = make_mask("suffix", 2, 43)[:, None]
    mask = base.flatten(1)
    assert remember_padding(mask) is mask and len(launched) == 1
    for rows in (None, mask):
        out, _ = attention(*inputs, mask, query_padding_mask=rows)
        assert torch.equal(out, attention(*inputs, mask.clone(), query_padding_mask=rows)[0])
    assert len(launched) == 3  # two of them those of the clones
    base[:, 0, :20] = True  # through another view
    launched.clear()
    out, _ = attention(*inputs, mask)
    assert len(launched) == 1 and torch.equal(out, attention(*inputs, mask.clone())[0])
    with torch.inference_mode():
        made = base.clone().flatten(1)
        launched.clear()
        for first in (0, 25):  # an inference tensor does not tell that it was written to
            made[:, first:30] = True
            remembered = remember_padding(made)
            made[:, 30:35] = True
            assert torch.equal(attention(*inputs, remembered)[0], attention(*inputs, made.clone())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("packing", [(3,), (2, 1), (1, 2)], ids=str)
def test_attention_of_projections(packing, dtype):
    """Bit for bit as from separate tensors, with the gradients in the projections' layout."""
    projections = [torch.randn(2, 43, n, 2, 16).to(dtype).requires_grad_() for n in packing]
    parts = [x.detach().clone().requires_grad_() for x in split_projections(projections)]
    mask = make_mask("row all padded", 2, 43)
    options = {"seed": torch.tensor([7]), "query_padding_mask": mask}
    out, lse = attention_of_projections(projections, mask, 0.1, **options)
    want, want_lse = attention(*parts, mask, 0.1, **options)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    cotangent = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, projections, cotangent)
    assert all(grad.is_contiguous() for grad in grads)
    for grad, expected in zip(split_projections(grads), torch.autograd.grad(want, parts, cotangent), strict=True):
        assert torch.equal(grad, expected)


def test_attention_op_makes_the_lists_it_is_not_given():
    inputs = [make_tensor(2, 1, 43, 16, "blhd", torch.float32).requires_grad_() for _ in range(3)]
    mask, seed = make_mask("suffix", 2, 43), torch.tensor([7])
    want, _ = attention(*inputs, mask, 0.1, seed=seed, query_padding_mask=mask)
    out, _ = torch.ops.detr_fast.attention(*inputs, mask, 0.1, seed, 0.25, mask)
    grad = torch.randn_like(out)
    assert torch.equal(out, want)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        assert torch.equal(a, b)


def test_compiled_layers_share_the_lists_of_a_mask():
    """A compiled graph of two layers under one mask makes one list."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)

    def layers(q, k, v, mask):
        for _ in range(2):
            q, _ = attention(q, k, v, mask, query_padding_mask=mask)
        return q

    inputs = [make_tensor(2, 1, 43, 16, "blhd", torch.float32).requires_grad_() for _ in range(3)]
    mask = make_mask("suffix", 2, 43)
    out = torch.compile(layers, fullgraph=True, backend=backend)(*inputs, mask)
    grad = torch.randn_like(out)
    assert torch.equal(out, layers(*inputs, mask))
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(layers(*inputs, mask), inputs, grad)
    )
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert calls.count("detr_fast.attention.default") == calls.count("detr_fast.attention_backward.default") == 2
    assert calls.count("detr_fast.valid_rows.default") == 1


def test_attention_padded_queries_reach_nothing():
    """NaN in padded queries and in their gradients changes no output and no gradient; what they get is zero."""
    mask = padded_map(10, 15, 7, 9).repeat(2, 1)
    mask[1] = make_mask("random", 1, 150)[0]
    rows = mask[:, None, :, None]
    clean = [make_tensor(2, 1, 150, 16, "blhd", torch.float32) for _ in range(3)]
    grad = torch.randn(2, 1, 150, 16)
    results = []
    for garbage in (0.0, float("nan")):
        inputs = [clean[0].masked_fill(rows, garbage), *clean[1:]]
        inputs = [x.detach().requires_grad_() for x in inputs]
        torch.manual_seed(1)
        out, lse = attention(*inputs, mask, 0.2, query_padding_mask=mask)
        grads = torch.autograd.grad(out, inputs, grad.masked_fill(rows, garbage))
        results.append((out, lse, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    out, lse, grad_query = results[1][:3]
    assert (out.masked_select(rows) == 0).all() and (grad_query.masked_select(rows) == 0).all()
    assert torch.equal(lse == torch.inf, mask[:, None])
    # Nor does what the others' keys and values hold reach them.
    inputs = [x.detach().requires_grad_() for x in (clean[0], clean[1], torch.full_like(clean[2], float("nan")))]
    out, _ = attention(*inputs, mask, 0.2, query_padding_mask=mask)
    (grad_query,) = torch.autograd.grad(out, inputs[0], grad)
    for x in (out, grad_query):
        assert torch.equal(x == 0, rows.expand_as(x))


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
        rows = torch.zeros(batch, q_len, dtype=torch.bool)
        out, lse = attention(*inputs, torch.zeros(batch, k_len, dtype=torch.bool))
        for a, b in zip((out, lse), attention(*inputs, query_padding_mask=rows), strict=True):
            assert torch.equal(a, b)
        assert out.shape == (batch, 2, q_len, 16) and (out == 0).all() and (lse == torch.inf).all()
        for result in (out, attention(*inputs, query_padding_mask=rows)[0]):
            grads = torch.autograd.grad(result, inputs, torch.ones_like(out))
            assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("rows", [None, "suffix", "random", "all padded"])
def test_attention_writes_every_element(rows):
    """Outputs come from `empty`; filled with NaN, none may be left."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        mask = make_mask("suffix", 2, 200)
        inputs = [make_tensor(2, 1, length, 20, "blhd", torch.float32).requires_grad_() for length in (200, 200, 200)]
        padding = None if rows is None else make_mask(rows, 2, 200)
        out, lse = attention(*inputs, mask, query_padding_mask=padding)
        grads = torch.autograd.grad(out, inputs, torch.randn(out.shape))
    finally:
        torch.use_deterministic_algorithms(False)
    if padding is not None:
        assert torch.equal(lse == torch.inf, padding[:, None])
        lse = lse.masked_fill(padding[:, None], 0)
    assert all(x.isfinite().all() for x in (out, lse, *grads))


def test_attention_strides_beyond_int32(tmp_path):
    """Rows 2^30 elements apart, in a file without content but where they lie; forward and backward."""
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**32 + 256, dtype=torch.float16)
    # In the second half of the file: an offset that wraps around reads zeros of the first.
    starts = (2**31 + 64 * i for i in range(3))
    far = [memory.as_strided((1, 1, 3, 16), (0, 0, 2**30, 1), start).normal_().requires_grad_() for start in starts]
    near = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in far]
    grad = torch.randn(1, 1, 3, 16, dtype=torch.float16)
    results = []
    for inputs in (far, near):
        out, _ = attention(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["none", "interleaved", "random"])
def test_dropout_mask_of_the_kernel_is_the_helpers(kind):
    """Bit for bit: with v the identity and equal scores, the output shows the mask itself."""
    q_len, k_len = 70, 128
    seed, mask = torch.tensor([2**61 + 12345678901]), make_mask(kind, 2, k_len)
    out, _ = attention(
        torch.zeros(2, 2, q_len, 16), torch.zeros(2, 2, k_len, 16), torch.eye(k_len).expand(2, 2, -1, -1), mask, 0.3,
        seed=seed,
    )  # fmt: skip
    assert torch.equal(out != 0, attention_dropout_mask(seed, 2, 2, q_len, k_len, 0.3, key_padding_mask=mask))


def test_dropout_mask_does_not_depend_on_the_rows():
    """The rows that are left, gathered from anywhere, are dropped where they are without the mask of queries."""
    q_len, k_len, seed = 150, 64, torch.tensor([2**40 + 17])
    inputs = torch.zeros(1, 2, q_len, 16), torch.zeros(1, 2, k_len, 16), torch.eye(k_len).expand(1, 2, -1, -1)
    rows = make_mask("random", 1, q_len)
    out, _ = attention(*inputs, None, 0.3, seed=seed, query_padding_mask=rows)
    keep = attention_dropout_mask(seed, 1, 2, q_len, k_len, 0.3)
    assert torch.equal(out != 0, keep & ~rows[:, None, :, None])
