"""Whatever shapes, masks and options come: the numbers are those of a formula written out here, or of PyTorch."""

import math

import numpy as np
import pytest
import torch
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import nn

from detr_fast import HungarianMatcher, MultiheadAttention, NestedTensor, SetCriterion, nested_tensor_from_tensor_list
from detr_fast.ops import assign, attention, attention_dropout_mask, matching_cost, sine_position

seeds = st.integers(0, 2**32 - 1)
lengths = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 33, 64, 65, 130])


def draw_mask(kind, batch, length):
    """[B, L] bool."""
    masks = {
        "none": lambda: None,
        "random": lambda: torch.rand(length, batch).t() < 0.5,
        "end": lambda: torch.arange(length) >= torch.randint(0, length + 1, (batch, 1)),
        "all": lambda: torch.ones(batch, length, dtype=torch.bool),
    }
    return masks[kind]()


kinds = st.sampled_from(["none", "random", "end", "all"])


@fuzz(3000)
@given(
    seed=seeds,
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), lengths, lengths, st.integers(1, 20), st.integers(1, 20)),
    keys=kinds,
    queries=kinds,
    p=st.sampled_from([0.0, 0.0, 0.1, 0.7]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    garbage=st.sampled_from([0.0, math.nan, math.inf, -math.inf]),
    same_dim=st.booleans(),
)
def test_attention(seed, sizes, keys, queries, p, dtype, garbage, same_dim):
    torch.manual_seed(seed)
    batch, heads, q_len, k_len, dim, value_dim = sizes
    value_dim = dim if same_dim else value_dim
    padding, rows = draw_mask(keys, batch, k_len), draw_mask(queries, batch, q_len)
    clean = [
        torch.randn(batch, heads, *s) for s in ((q_len, dim), (k_len, dim), (k_len, value_dim), (q_len, value_dim))
    ]
    masks = [rows, padding, padding, rows]
    filled = [
        (x if mask is None else x.masked_fill(mask[:, None, :, None], garbage)).to(dtype)
        for x, mask in zip(clean, masks, strict=True)
    ]
    *inputs, grad = filled
    inputs = [x.requires_grad_() for x in inputs]
    dropout_seed = torch.tensor([seed])
    out, _ = attention(*inputs, padding, p, seed=dropout_seed, query_padding_mask=rows)
    results = [out, *torch.autograd.grad(out, inputs, grad)]

    *exact, grad = (
        (x.to(dtype).double() if mask is None else x.to(dtype).double().masked_fill(mask[:, None, :, None], 0))
        for x, mask in zip(clean, masks, strict=True)
    )
    q, k, v = exact = [x.requires_grad_() for x in exact]
    scores = q @ k.mT * dim**-0.5
    if padding is not None:
        no_key = padding.all(dim=1)[:, None, None, None]
        scores = scores.masked_fill(padding[:, None, None] & ~no_key, -math.inf)
    probs = torch.softmax(scores, dim=-1)
    if padding is not None:
        probs = probs.masked_fill(no_key, 0)
    if p:
        keep = attention_dropout_mask(dropout_seed, batch, heads, q_len, k_len, p, key_padding_mask=padding)
        probs = probs * keep / (1 - round(256 * p) / 256)
    want = probs @ v
    if rows is not None:
        want = want.masked_fill(rows[:, None, :, None], 0)
    wants = [want, *torch.autograd.grad(want, exact, grad)]
    unit = torch.finfo(dtype).eps
    for result, want in zip(results, wants, strict=True):
        size = want.abs().max().item() if want.numel() else 0
        torch.testing.assert_close(result.double(), want, rtol=8 * unit, atol=32 * unit * (1 + size))


@pytest.mark.filterwarnings("ignore:.*mismatched.*")
@fuzz(2000)
@given(
    seed=seeds,
    sizes=st.tuples(st.integers(1, 3), lengths, lengths, st.integers(1, 4), st.integers(1, 6)),
    options=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("bias", "add_bias_kv", "add_zero_attn", "batch_first"), st.booleans())
    ),
    mask=st.sampled_from(["none", "bool", "float"]),
    attn_mask=st.sampled_from(["none", "bool", "float"]),
    need_weights=st.sampled_from([None, False, True]),
    average=st.booleans(),
    hooked=st.booleans(),
    shared=st.booleans(),
)
def test_multihead_attention_is_torchs(seed, sizes, options, mask, attn_mask, need_weights, average, hooked, shared):
    torch.manual_seed(seed)
    batch, q_len, k_len, heads, head_dim = sizes
    k_len = q_len if shared else k_len
    theirs = nn.MultiheadAttention(heads * head_dim, heads, dtype=torch.float64, **options)
    ours = MultiheadAttention(heads * head_dim, heads, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    if hooked:
        ours.register_forward_hook(lambda module, args, out: None)
    q = torch.randn(batch, q_len, heads * head_dim, dtype=torch.float64)
    k = q if shared else torch.randn(batch, k_len, heads * head_dim, dtype=torch.float64)
    if not options.get("batch_first"):
        q, k = (q.transpose(0, 1),) * 2 if shared else (q.transpose(0, 1), k.transpose(0, 1))
    padding, forbidden = torch.rand(batch, k_len) < 0.4, torch.rand(q_len, k_len) < 0.3
    padding[:, 0], forbidden[:, 0] = False, False
    as_float = [torch.zeros(x.shape, dtype=torch.float64).masked_fill(x, -math.inf) for x in (padding, forbidden)]
    masks = dict(
        key_padding_mask={"none": None, "bool": padding, "float": as_float[0]}[mask],
        attn_mask={"none": None, "bool": forbidden, "float": as_float[1] + torch.randn(q_len, k_len)}[attn_mask],
    )
    has_weights = hooked if need_weights is None else need_weights
    want, want_weights = theirs(q, k, k, need_weights=has_weights, average_attn_weights=average, **masks)
    told = {} if need_weights is None else dict(need_weights=need_weights)
    out, weights = ours(q, k, k, average_attn_weights=average, **told, **masks)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(weights, want_weights, rtol=1e-9, atol=1e-10)


@fuzz(2000)
@given(
    seed=seeds,
    shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int64]),
    divisor=st.integers(1, 8),
    layout=st.sampled_from(["chw", "hwc", "reversed"]),
)
def test_nested_tensor_from_tensor_list(seed, shapes, dtype, divisor, layout):
    torch.manual_seed(seed)
    images = []
    for channels, height, width in shapes:
        image = torch.randint(0, 2, (channels, height, width)).to(dtype)
        if layout == "hwc":
            image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        elif layout == "reversed":
            image = image.mT.contiguous().mT
        images.append(image)
    batch, mask = nested_tensor_from_tensor_list(images, size_divisor=divisor).decompose()
    largest = np.max([x.shape for x in images], axis=0)
    height, width = (-(-int(n) // divisor) * divisor for n in largest[1:])
    assert batch.shape == (len(images), largest[0], height, width) and batch.dtype == dtype
    for i, image in enumerate(images):
        want, padding = torch.zeros_like(batch[i]), torch.ones(height, width, dtype=torch.bool)
        want[: image.shape[0], : image.shape[1], : image.shape[2]] = image
        padding[: image.shape[1], : image.shape[2]] = False
        assert torch.equal(batch[i], want) and torch.equal(mask[i], padding)
    nested = NestedTensor(batch, mask).to("cpu")
    assert nested.tensors is batch and nested.mask is mask


@fuzz(1000)
@given(
    seed=seeds,
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 12, 12, 12, 12, 4)]),
    normalize=st.booleans(),
    kind=kinds,
    tokens=st.booleans(),
)
def test_sine_position(seed, sizes, normalize, kind, tokens):
    torch.manual_seed(seed)
    batch, height, width, h, w, half = sizes
    mask = draw_mask(kind, batch, height * width)
    mask = torch.zeros(batch, height, width, dtype=torch.bool) if mask is None else mask.reshape(batch, height, width)
    position, small = sine_position(
        mask, (h, w), 2 * half, normalize=normalize, layout="tokens" if tokens else "nchw", dtype=torch.float64
    )
    want = torch.nn.functional.interpolate(mask[None].float(), size=(h, w))[0].bool()
    assert torch.equal(small, want)
    if tokens:
        position = position.mT.unflatten(2, (h, w))
    for axis, part in ((1, position[:, : 2 * half]), (2, position[:, 2 * half :])):
        count = (~want).double().cumsum(axis)
        if normalize:
            count = count / (count.narrow(axis, count.shape[axis] - 1, 1) + 1e-6) * 2 * math.pi
        for i in range(2 * half):
            angle = count / 10000 ** (2 * (i // 2) / (2 * half))
            torch.testing.assert_close(part[:, i], angle.cos() if i % 2 else angle.sin(), rtol=1e-6, atol=1e-6)


@fuzz(1000)
@given(
    seed=seeds,
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    layers=st.integers(1, 3),
    queries=st.integers(1, 9),
    classes=st.integers(2, 6),
    ties=st.booleans(),
)
def test_matching(seed, counts, layers, queries, classes, ties):
    """Costs are the formula's, pair by pair, and the assignment costs what SciPy's does."""
    torch.manual_seed(seed)
    total = sum(counts)
    logits = torch.randn(layers, len(counts), queries, classes)
    boxes, targets = torch.rand(layers, len(counts), queries, 4), torch.rand(total, 4)
    labels = torch.randint(0, classes, (total,))
    offsets = torch.tensor([0, *np.cumsum(counts)])
    cost = matching_cost(logits, boxes, labels, targets, offsets, 1, 5, 2)
    assert cost.shape == (layers, total, queries)
    if ties:
        cost = cost.round()
    found, status = assign(cost, offsets, max(counts))
    assert (status == 0).all()
    for image, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for layer in range(layers):
            for t in range(start, stop) if not ties else ():
                (x, y, w, h), want_class = targets[t].double(), labels[t]
                for q in range(queries):
                    a, b, c, d = box = boxes[layer, image, q].double()
                    sides = []  # overlap and hull, along x and y
                    for m, o, n, p in ((a, c, x, w), (b, d, y, h)):
                        ends = (max(m - o / 2, n - p / 2), min(m + o / 2, n + p / 2))
                        sides.append((ends[1] - ends[0], max(m + o / 2, n + p / 2) - min(m - o / 2, n - p / 2)))
                    inside = max(sides[0][0], 0) * max(sides[1][0], 0)
                    hull, union = sides[0][1] * sides[1][1], c * d + w * h - inside
                    want = 5 * (box - targets[t].double()).abs().sum() - 2 * (inside / union - (hull - union) / hull)
                    want -= logits[layer, image, q].double().softmax(-1)[want_class]
                    assert abs(cost[layer, t, q].item() - want.item()) < 1e-4
            part = cost[layer, start:stop].double()
            rows = (found[layer, start:stop] >= 0).nonzero()[:, 0]
            chosen = found[layer, start:stop][rows]
            assert len(rows) == min(stop - start, queries) and len(set(chosen.tolist())) == len(rows)
            want = part.numpy()[linear_sum_assignment(part.numpy())].sum()
            assert abs(part[rows, chosen].sum().item() - want) < 1e-6


@fuzz(1000)
@given(
    seed=seeds,
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    queries=st.integers(1, 8),
    classes=st.integers(1, 5),
    layers=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_criterion(seed, counts, queries, classes, layers, dtype):
    """All losses are finite and have finite gradients, and the order of an image's targets does not matter."""
    torch.manual_seed(seed)
    names = ("pred_logits", "pred_boxes")

    def predictions():
        logits = torch.randn(len(counts), queries, classes + 1).to(dtype)
        boxes = (0.1 + 0.8 * torch.rand(len(counts), queries, 4)).to(dtype)
        return dict(zip(names, (logits.requires_grad_(), boxes.requires_grad_()), strict=True))

    outputs = {**predictions(), "aux_outputs": [predictions() for _ in range(layers)]}
    targets = [{"labels": torch.randint(0, classes, (n,)), "boxes": 0.1 + 0.8 * torch.rand(n, 4)} for n in counts]
    orders = [torch.randperm(n) for n in counts]
    moved = [{k: v[order] for k, v in t.items()} for t, order in zip(targets, orders, strict=True)]
    criterion = SetCriterion(classes, HungarianMatcher(1, 5, 2), {}, 0.1, ["labels", "boxes", "cardinality"])
    losses = criterion(outputs, targets)
    assert len(losses) == 5 + 4 * layers and all(loss.isfinite() for loss in losses.values())
    inputs = [layer[name] for layer in (outputs, *outputs["aux_outputs"]) for name in names]
    total = sum(loss for name, loss in losses.items() if "error" not in name)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(total, inputs))
    torch.testing.assert_close(criterion(outputs, moved), losses)
