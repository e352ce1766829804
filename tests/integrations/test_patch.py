"""`patch` on models written here from the description of other DETRs; none of their modules are ours."""

import copy
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import detr_fast
from detr_fast.integrations.patch import ModuleReport, PatchError, patch, unpatch

PAGE = Path(__file__).parents[2] / "docs" / "other_detrs.md"


class Nested:
    def __init__(self, tensors, mask):
        self.tensors, self.mask = tensors, mask


class SinePosition(nn.Module):
    """Deformable DETR subtracts half a cell: `offset` 0.5."""

    def __init__(self, features, offset=0.0):
        super().__init__()
        self.features, self.offset = features, offset

    def forward(self, nested):
        valid = (~nested.mask).float()
        period = 10000 ** (2 * (torch.arange(self.features) // 2) / self.features)
        axes = []
        for dim in (1, 2):
            count = valid.cumsum(dim)
            count = (count - self.offset) / (count.narrow(dim, -1 + count.shape[dim], 1) + 1e-6) * 2 * math.pi
            angle = count[..., None] / period
            axes.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4).flatten(3))
        return torch.cat(axes, dim=3).permute(0, 3, 1, 2)


class FrozenNorm(nn.Module):
    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.small = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight / (self.running_var + self.small).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class ProjectedAttention(nn.Module):
    """Conditional DETR's: queries and keys arrive projected, and may be wider than the values."""

    def __init__(self, embed_dim, num_heads, vdim, dropout=0.1):
        super().__init__()
        self.embed_dim, self.num_heads, self.vdim, self.dropout = embed_dim, num_heads, vdim, dropout
        self.out_proj = nn.Linear(vdim, vdim)

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None):
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3) for x in (query, key, value))
        scores = q @ k.transpose(2, 3) * (self.embed_dim // self.num_heads) ** -0.5
        if attn_mask is not None:
            scores = scores + attn_mask
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], -math.inf)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        out = self.out_proj((weights @ v).permute(2, 0, 1, 3).flatten(2))
        return out, weights.mean(1) if need_weights else None


class Detector(nn.Module):
    """One convolution and norm, one post-norm encoder layer, queries that attend to its memory."""

    def __init__(self, batch_first=True, projected=False, offset=0.0, eps=1e-5):
        super().__init__()
        self.conv, self.norm, self.position = nn.Conv2d(3, 32, 4, 4), FrozenNorm(32, eps), SinePosition(16, offset)
        self.batch_first = batch_first and not projected
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=self.batch_first)
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(32), nn.LayerNorm(32), nn.Linear(32, 32)
        self.queries = nn.Parameter(torch.randn(6, 32))
        self.projected = projected
        if projected:
            self.q, self.k = nn.Linear(32, 64), nn.Linear(32, 64)
            self.cross = ProjectedAttention(64, 4, vdim=32)
        else:
            self.cross = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=self.batch_first)
        self.head = nn.Linear(32, 4)

    def forward(self, images, mask):
        x = self.norm(self.conv(images)).relu()
        padding = mask[:, ::4, ::4]
        position = self.position(Nested(x, padding))
        x, position = (y.flatten(2).permute(*((0, 2, 1) if self.batch_first else (2, 0, 1))) for y in (x, position))
        padding = padding.flatten(1)
        q = x + position
        x = self.norm1(x + self.attention(q, q, value=x, key_padding_mask=padding)[0])
        x = self.norm2(x + self.mlp(x).relu())
        q = self.queries.unsqueeze(0 if self.batch_first else 1)
        q = q.expand(len(images), -1, -1) if self.batch_first else q.expand(-1, len(images), -1)
        k = x + position
        q, k = (self.q(q), self.k(k)) if self.projected else (q, k)
        return {"boxes": self.head(self.cross(q, k, value=x, key_padding_mask=padding)[0]).sigmoid()}


def example():
    mask = torch.zeros(2, 24, 32, dtype=torch.bool)
    mask[1, 16:], mask[1, :, 20:] = True, True
    return {"images": torch.randn(2, 3, 24, 32), "mask": mask}


class Ops(TorchDispatchMode):
    """Names of our ops that ran."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "detr_fast":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def ops_of(model, batch):
    with Ops() as ops, torch.no_grad():
        model(**batch)
    return ops.names


def line(report, name) -> ModuleReport:
    (found,) = (module for module in report.modules if module.name == name)
    return found


@pytest.mark.parametrize(
    "family", [{}, {"batch_first": False}, {"projected": True}], ids=["batch-first", "length-first", "projected"]
)
def test_a_family_is_taken_whole_and_restored(family):
    model, batch = Detector(**family).train(), example()
    model.norm1.eval()
    keys, storages = list(model.state_dict()), [(p, p.data_ptr()) for p in model.parameters()]
    values = copy.deepcopy(model.state_dict())
    classes, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    shown = str(model)
    expected = copy.deepcopy(model).eval()(**batch)["boxes"]
    assert ops_of(model, batch) == []

    report = patch(model, batch)
    assert sorted(report.taken) == ["attention", "cross", "norm", "position"]
    assert all(module.error <= 1e-5 and module.ms_before > 0 and module.ms_after > 0 for module in report.modules)
    assert max(report.output_error, report.gradient_error) <= 1e-5
    table = str(report)
    assert all(module.name in table and module.reason in table for module in report.modules)
    assert "no padding" not in table

    assert ops_of(model, batch).count("attention") == 2
    assert ops_of(model, batch).count("sine_position") == 1
    torch.testing.assert_close(copy.deepcopy(model).eval()(**batch)["boxes"], expected, rtol=0, atol=1e-5)
    assert str(model) == shown and list(model.state_dict()) == keys
    assert [m.training for m in model.modules()] == modes
    assert [set(vars(m)) for m in model.modules()] == attributes
    model.load_state_dict(values)
    for (old, pointer), new in zip(storages, model.parameters(), strict=True):
        assert new is old and new.data_ptr() == pointer and new.grad is None

    unpatch(model)
    assert [type(m) for m in model.modules()] == classes and ops_of(model, batch) == []
    assert torch.equal(model.eval()(**batch)["boxes"], expected)


def test_position_with_an_offset_is_refused():
    model = Detector(offset=0.5)
    report = patch(model, example())
    assert "position" not in report.taken and "attention" in report.taken
    assert "differs from the sine embedding" in line(report, "position").reason
    assert line(report, "position").error > 1e-2
    assert type(model.position) is SinePosition


def test_norm_without_eps_is_refused():
    report = patch(Detector(eps=0.0), example())
    assert "norm" not in report.taken and "attention" in report.taken
    assert "differs in" in line(report, "norm").reason and line(report, "norm").error > 1e-2


def test_a_trainable_norm_is_refused():
    model = Detector()
    model.norm = nn.BatchNorm2d(32)
    before = copy.deepcopy(model.norm.state_dict())
    report = patch(model, example())
    assert "in training mode" in line(report, "norm").reason
    assert all(torch.equal(value, before[name]) for name, value in model.norm.state_dict().items())


def test_attention_with_another_scale_is_refused_although_its_output_is_zero():
    class Odd(nn.MultiheadAttention):
        def forward(self, query, *args, **kwargs):
            return super().forward(2 * query, *args, **kwargs)

    class Hotter(ProjectedAttention):
        def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None):
            return super().forward(2 * query, key, value, key_padding_mask, need_weights, attn_mask)

    model = Detector(projected=True)
    model.attention, model.cross = Odd(32, 4), Hotter(64, 4, vdim=32)
    nn.init.zeros_(model.cross.requires_grad_(False).out_proj.weight)
    report = patch(model, example())
    assert set(report.taken) == {"norm", "position"}
    assert "its forward takes" in line(report, "attention").reason
    assert "differs" in line(report, "cross").reason


def test_a_model_that_differs_is_restored():
    class Reads(Detector):
        def forward(self, images, mask):
            bias = 0.1 * (type(self.attention) is not nn.MultiheadAttention)
            return super().forward(images, mask)["boxes"] + bias

    class Fails(Detector):
        def forward(self, images, mask):
            assert type(self.attention) is nn.MultiheadAttention, "no other class"
            return super().forward(images, mask)

    for cls, message in ((Reads, "differs: outputs by 1.0e-01"), (Fails, "AssertionError: no other class")):
        model = cls()
        with pytest.raises(PatchError, match=message) as caught:
            patch(model, example())
        assert caught.value.report.taken == [] and "restored" in str(caught.value)
        assert type(model.attention) is nn.MultiheadAttention and type(model.norm) is FrozenNorm and model.training


def test_hooks_run_and_see_the_weights():
    model, batch, seen = Detector(), example(), []
    handle = model.cross.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    patch(model, batch)
    seen.clear()
    model.eval()(**batch)
    assert seen[0].shape == (2, 6, 48)
    assert ops_of(model, batch).count("attention") == 1
    handle.remove()
    assert ops_of(model, batch).count("attention") == 2


def test_masks_that_the_op_does_not_take_give_the_same():
    model, batch = Detector().eval(), example()
    plain = copy.deepcopy(model.cross)
    patch(model, batch)
    q, k = torch.randn(2, 3, 32), torch.randn(2, 5, 32)
    for options in ({"attn_mask": torch.randn(3, 5)}, {"key_padding_mask": torch.randn(2, 5)}, {"need_weights": True}):
        ours, theirs = model.cross(q, k, k, **options), plain(q, k, k, **options)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_copies_and_pickles_are_patched_too():
    model, batch = Detector(projected=True).eval(), example()
    patch(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert ops_of(twin, batch).count("attention") == 2
        assert torch.equal(twin(**batch)["boxes"], model(**batch)["boxes"])
        unpatch(twin)
        assert ops_of(twin, batch) == []


def test_ddp(tmp_path):
    model, batch = Detector().eval(), example()
    model(**batch)["boxes"].square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        patch(wrapped, batch)
        model.zero_grad()
        wrapped(**batch)["boxes"].square().sum().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
        assert ops_of(wrapped, batch).count("attention") == 2
    finally:
        dist.destroy_process_group()


def test_bad_input_says_what_was_expected():
    model, batch = Detector(), example()
    with pytest.raises(ValueError, match="bfloat16; expected float32"):
        patch(Detector().bfloat16(), batch)
    with pytest.raises(TypeError, match="expected an nn.Module"):
        patch("model", batch)
    batch["mask"] = torch.zeros_like(batch["mask"])
    assert "no padding" in str(detr_fast.patch(model, batch))
    with pytest.raises(ValueError, match="patched already"):
        detr_fast.patch(model, batch)


def test_the_page_runs_as_printed(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(snippet, {})
    assert re.search(r"attention +MultiheadAttention +taken .* batch first", capsys.readouterr().out)


class LooseNorm(nn.Module):
    """A frozen norm that takes any [B, C, ...]."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value) + torch.rand(channels))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def test_a_norm_of_other_shapes_runs_its_own_forward():
    model, x = nn.Sequential(nn.Conv1d(4, 8, 1), LooseNorm(8)), torch.rand(3, 4, 5)
    before = model(x)
    report = detr_fast.patch(model, x)
    assert "taken" in str(report)
    torch.testing.assert_close(model(x), before)
    images = torch.rand(2, 8, 3, 4)
    torch.testing.assert_close(model[1](images), LooseNorm.forward(model[1], images))


def test_precisions_of_products_are_as_before():
    own = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        detr_fast.patch(nn.Sequential(nn.Conv1d(4, 8, 1), LooseNorm(8)), torch.rand(3, 4, 5))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = own


def test_weights_that_are_given_only_on_request_are_refused():
    class Quiet(nn.MultiheadAttention):
        def forward(
            self,
            query,
            key,
            value,
            key_padding_mask=None,
            need_weights=False,
            attn_mask=None,
            average_attn_weights=True,
            is_causal=False,
        ):
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Quiet(16, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    assert "need_weights=True as the default" in str(detr_fast.patch(Model(), torch.rand(5, 2, 16)))
