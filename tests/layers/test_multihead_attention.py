"""MultiheadAttention against torch's own."""

import pytest
import torch
from pairwise import pairwise
from torch import nn

from detr_fast.layers import MultiheadAttention

OPTIONS = {
    "plain": {},
    "kdim-vdim": {"kdim": 12, "vdim": 20},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True, "add_bias_kv": True},
}


def make_pair(dtype=torch.float64, **options):
    """torch's module and ours, made from the same seed."""
    pair = []
    for module in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(3)
        pair.append(module(16, 2, dtype=dtype, **options))
    with torch.no_grad():  # the biases begin as zeros, where their use would not show
        for name, parameter in pair[0].named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
                pair[1].get_parameter(name).copy_(parameter)
    return pair


def make_inputs(kind, batch_first, dtype=torch.float64, kdim=16, vdim=16):
    """Query, key and value: separate or shared, as kind says."""
    q = torch.randn(3, 5, 16, dtype=dtype)
    k, v = torch.randn(3, 7, kdim, dtype=dtype), torch.randn(3, 7, vdim, dtype=dtype)
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    q, k, v = (x.requires_grad_() for x in (q.detach(), k.detach(), v.detach()))
    value_of_query = torch.randn_like(q).requires_grad_()
    return {"qkv": (q, k, v), "qqq": (q, q, q), "qqv": (q, q, value_of_query), "qkk": (q, k, k)}[kind]


def assert_same(ours, torchs, modules, inputs, tolerance):
    """Outputs, and the gradients of every input and parameter for a random cotangent."""
    torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(torchs)
    results = []
    for out, module in ((ours, modules[1]), (torchs, modules[0])):
        leaves = list(dict.fromkeys(inputs)) + [p for _, p in sorted(module.named_parameters())]
        results.append(torch.autograd.grad(out, leaves, cotangent))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_state_dict_and_initial_values_are_torchs(options):
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(16, 2, **options)
    torch.manual_seed(5)
    ours = MultiheadAttention(16, 2, **options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    ours.load_state_dict(theirs.state_dict(), strict=True)


# What is shared between query, key and value must be of one width.
SHARED = [name for name in OPTIONS if name != "kdim-vdim"]
CASES = pairwise(SHARED, ["qkv", "qqq", "qqv", "qkk"], [True, False], [torch.float32, torch.float64])
CASES += [("kdim-vdim", "qkv", True, torch.float32), ("kdim-vdim", "qkv", False, torch.float64)]


@pytest.mark.parametrize(("options", "kind", "batch_first", "dtype"), CASES, ids=str)
def test_matches_torch(options, kind, batch_first, dtype):
    options = OPTIONS[options]
    modules = make_pair(dtype, batch_first=batch_first, **options)
    widths = {name: options[name] for name in ("kdim", "vdim") if name in options}
    inputs = make_inputs(kind, batch_first, dtype, **widths)
    k_len = inputs[1].shape[1 if batch_first else 0]
    mask = torch.rand(3, k_len) < 0.4
    mask[:, 0] = False
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for padding in (None, mask):
        theirs, _ = modules[0](*inputs, key_padding_mask=padding, need_weights=False)
        ours, weights = modules[1](*inputs, key_padding_mask=padding)
        assert weights is None
        assert_same(ours, theirs, modules, inputs, 4 * tolerance)


@pytest.mark.filterwarnings("ignore:.*mismatched.*")
@pytest.mark.parametrize(
    ("options", "padding", "attn", "average"),
    pairwise(
        ["plain", "zero-attn"], ["none", "bool", "float"], ["none", "bool2", "bool3", "float2", "float3"], [True, False]
    ),
)
def test_weights_and_masks_match_torch(options, padding, attn, average):
    modules = make_pair(batch_first=True, **OPTIONS[options])
    inputs = make_inputs("qkv", True)
    mask = torch.rand(3, 7) < 0.4
    mask[:, 0] = False
    mask = {"none": None, "bool": mask, "float": torch.randn(3, 7, dtype=torch.float64)}[padding]
    shape = (6, 5, 7) if attn.endswith("3") else (5, 7)
    attn_mask = None
    if attn.startswith("bool"):
        attn_mask = torch.rand(shape) < 0.4
        attn_mask[..., 0] = False
    elif attn.startswith("float"):
        attn_mask = torch.randn(shape, dtype=torch.float64)
    for need_weights in (True, False):
        arguments = dict(
            key_padding_mask=mask, attn_mask=attn_mask, need_weights=need_weights, average_attn_weights=average
        )
        theirs, their_weights = modules[0](*inputs, **arguments)
        ours, weights = modules[1](*inputs, **arguments)
        assert_same(ours, theirs, modules, inputs, 1e-12)
        if need_weights:
            torch.testing.assert_close(weights, their_weights, rtol=1e-12, atol=1e-12)
        else:
            assert weights is None


@pytest.mark.parametrize("need_weights", [True, False])
def test_without_a_batch_matches_torch(need_weights):
    modules = make_pair()
    q, k, v = (torch.randn(length, 16, dtype=torch.float64, requires_grad=True) for length in (5, 7, 7))
    mask = torch.tensor([False, True] * 3 + [False])
    theirs = modules[0](q, k, v, key_padding_mask=mask, need_weights=need_weights)
    ours = modules[1](q, k, v, key_padding_mask=mask, need_weights=need_weights)
    assert ours[0].shape == (5, 16)
    assert_same(ours[0], theirs[0], modules, (q, k, v), 1e-12)
    if need_weights:
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
def test_all_padded_rows_give_the_output_bias(need_weights):
    module = make_pair(batch_first=True)[1]
    inputs = make_inputs("qkv", True)
    mask = torch.tensor([[True] * 7, [False] * 7, [True] * 7])
    out, weights = module(*inputs, key_padding_mask=mask, need_weights=need_weights)
    assert torch.equal(out[0], module.out_proj.bias.expand(5, 16)) and torch.equal(out[2], out[0])
    assert (out[1] != out[0]).any()
    for grad in torch.autograd.grad(out, inputs, torch.randn_like(out)):
        assert (grad[0] == 0).all() and (grad[1] != 0).any()
    if need_weights:
        assert (weights[0] == 0).all()


@pytest.mark.parametrize("path", ["fused", "weights", "attn_mask"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["BLE", "LBE"])
def test_skipped_queries(batch_first, path):
    """On every path padded queries give the output bias and no weights; the other rows are torch's, and so are the
    gradients, whatever the padded rows' gradients hold."""
    modules = make_pair(batch_first=batch_first)
    inputs = make_inputs("qqv", batch_first)
    padding = torch.tensor([[False, True, False, False, True], [False] * 4 + [True], [False] * 5])
    options = {"key_padding_mask": padding, "need_weights": path == "weights"}
    if path == "attn_mask":
        options["attn_mask"] = torch.rand(5, 5) < 0.2
        options["attn_mask"].fill_diagonal_(False)
    theirs, their_weights = modules[0](*inputs, **options)
    modules[1].skip_padded_queries = True
    ours, weights = modules[1](*inputs, **options)
    rows = padding if batch_first else padding.t()
    theirs = torch.where(rows[..., None], modules[0].out_proj.bias, theirs)
    assert_same(ours, theirs, modules, inputs, 1e-12)
    if path == "weights":
        torch.testing.assert_close(weights, their_weights.masked_fill(padding[..., None], 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
def test_skipped_queries_without_a_batch(need_weights):
    module = make_pair()[1]
    x = torch.randn(5, 16, dtype=torch.float64)
    padding = torch.tensor([True, False, False, True, False])
    expected = module(x, x, x, padding)[0]
    module.skip_padded_queries = True
    out, weights = module(x, x, x, padding, need_weights=need_weights)
    torch.testing.assert_close(out[~padding], expected[~padding], rtol=1e-12, atol=1e-12)
    assert torch.equal(out[padding], module.out_proj.bias.expand(2, 16))
    assert weights is None or (weights[padding] == 0).all()


def test_skipping_needs_a_bool_mask_of_the_queries():
    module = make_pair(batch_first=True)[1]
    module.skip_padded_queries = True
    q, k = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 7, 16, dtype=torch.float64)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, 4:] = True
    with pytest.raises(ValueError, match="5 queries and 7 keys; expected self-attention"):
        module(q, k, k, mask)
    values = torch.zeros(3, 7, dtype=torch.float64).masked_fill(mask, -torch.inf)
    out = module(k, k, k, values)[0]
    module.skip_padded_queries = False
    torch.testing.assert_close(out, module(k, k, k, mask)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"need_weights": True}, {"attn_mask": torch.zeros(5, 7)}], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_nan_in_padding_reaches_nothing_and_other_nan_is_seen(options, kind):
    """On the fused path and on the one with weights, forward and backward."""
    if kind == "float" and not options:
        options = {"need_weights": False}
    module = MultiheadAttention(16, 2, batch_first=True)
    query, key = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    mask = torch.tensor([[False] * 4 + [True] * 3, [False] * 7, [True] * 7])
    masks = {"key_padding_mask": mask if kind == "bool" else torch.zeros(3, 7).masked_fill(mask, -torch.inf)}
    masks.update(options)
    results = []
    for garbage in (0.0, float("nan")):
        inputs = [query.clone().requires_grad_(), key.masked_fill(mask[..., None], garbage).requires_grad_()]
        out = module(inputs[0], inputs[1], inputs[1], **masks)[0]
        results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    query[0, 1, 3], key[1, 2, 0] = float("nan"), float("nan")
    out = module(query, key, key, **masks)[0]
    seen = torch.zeros(3, 5, dtype=torch.bool)
    seen[0, 1], seen[1] = True, True
    assert torch.equal(out.isnan(), seen[..., None].expand(3, 5, 16))


def test_dropout_acts_in_training_only():
    module = make_pair(batch_first=True, dropout=0.5)[1]
    inputs = make_inputs("qqq", True)
    module.eval()
    assert torch.equal(module(*inputs)[0], module(*inputs)[0])
    assert torch.equal(module(*inputs)[0], make_pair(batch_first=True)[1](*inputs)[0])
    module.train()
    assert (module(*inputs)[0] != module(*inputs)[0]).any()
    outs = []
    for _ in range(2):
        torch.manual_seed(7)
        outs.append(module(*inputs)[0])
    assert torch.equal(*outs)
    _, weights = module(*inputs, need_weights=True, average_attn_weights=False)
    assert 0.2 < (weights == 0).double().mean() < 0.8


def test_dropout_is_the_ops():
    """Training output equals the op's on hand-made projections, for the same seed."""
    from detr_fast.ops import attention

    module = make_pair(batch_first=True, dropout=0.25)[1].train()
    q, k, v = make_inputs("qkv", True)
    torch.manual_seed(11)
    ours, _ = module(q, k, v)
    torch.manual_seed(11)
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    heads = [
        nn.functional.linear(x, w, b).view(3, -1, 2, 8).transpose(1, 2)
        for x, w, b in zip((q, k, v), weights, biases, strict=True)
    ]
    out, _ = attention(*heads, None, 0.25)
    torch.testing.assert_close(ours, module.out_proj(out.transpose(1, 2).reshape(3, 5, 16)), rtol=1e-12, atol=1e-12)


def test_projections_reach_the_op_without_copies(monkeypatch):
    """What the op gets are views of at most as many tensors as there were matrix products."""
    import detr_fast.layers.attention as layer

    seen = []

    def spy(q, k, v, *rest, **options):
        seen.append([x.untyped_storage().data_ptr() for x in (q, k, v)])
        return attention(q, k, v, *rest, **options)

    attention = layer.attention
    monkeypatch.setattr(layer, "attention", spy)
    for batch_first in (True, False):
        module = make_pair(batch_first=batch_first)[1]
        for kind, storages in (("qqq", 1), ("qqv", 2), ("qkk", 2), ("qkv", 3)):
            module(*make_inputs(kind, batch_first))
            assert len(set(seen.pop())) == storages, kind


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(key=(3, 7, 12)), ValueError, "widths of 16"),
        (dict(query=(3, 5, 15)), ValueError, "widths of 16"),
        (dict(query=(5, 16)), ValueError, "3-D"),
        (dict(query=(2, 5, 16)), ValueError, "batch size"),
        (dict(value=(3, 6, 16)), ValueError, "one length"),
        (dict(key_padding_mask=torch.zeros(3, 6, dtype=torch.bool)), ValueError, r"\[3, 6\]; expected \[3, 7\]"),
        (dict(key_padding_mask=torch.zeros(3, 7, dtype=torch.uint8)), TypeError, "uint8"),
        (dict(query=torch.zeros(3, 5, 16).long()), TypeError, "query has dtype torch.int64; expected floating point"),
        (dict(attn_mask=torch.zeros(5, 6)), ValueError, "attn_mask has shape"),
        (dict(attn_mask=torch.zeros(5, 7, dtype=torch.int64)), TypeError, "int64"),
        (dict(is_causal=True), ValueError, "is_causal"),
    ],
)
def test_rejects(arguments, error, match):
    module = MultiheadAttention(16, 2, batch_first=True)
    shapes = {"query": (3, 5, 16), "key": (3, 7, 16), "value": (3, 7, 16)}
    inputs = {name: arguments.get(name, shape) for name, shape in shapes.items()}
    inputs = {name: torch.randn(x) if isinstance(x, tuple) else x for name, x in inputs.items()}
    rest = {name: value for name, value in arguments.items() if name not in shapes}
    with pytest.raises(error, match=match):
        module(**inputs, **rest)


def test_rejects_bad_sizes():
    with pytest.raises(ValueError, match="multiple"):
        MultiheadAttention(16, 3)
    with pytest.raises(ValueError, match="0..1"):
        MultiheadAttention(16, 2, dropout=1.5)


def test_compiles_without_breaks():
    """One graph, and no new one when batch and lengths change."""
    module = MultiheadAttention(16, 2, batch_first=True).eval()
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def self_attention(x, pos, mask):
        q = k = x + pos
        return module(q, k, x, key_padding_mask=mask)[0]

    compiled = torch.compile(self_attention, fullgraph=True, dynamic=True, backend=backend)
    for batch, length in ((2, 5), (3, 9), (4, 30)):
        x, pos = torch.randn(batch, length, 16), torch.randn(batch, length, 16)
        mask = torch.rand(batch, length) < 0.3
        torch.testing.assert_close(compiled(x, pos, mask), self_attention(x, pos, mask))
    assert graphs == 1
