"""LETR: both stages against plain PyTorch, its matcher and losses against loops, and a short training run."""

import argparse
import itertools

import pytest
import torch
import torch.nn.functional as F
from plain_detr import plain_detr, plain_features, plain_position, plain_transformer, randomize_norms
from torch import nn

from detr_fast.cli import main
from detr_fast.data import make_lines_dataset
from detr_fast.models.letr import (
    LETR,
    HungarianMatcher_Line,
    PostProcess_Line,
    SetCriterion,
    build,
    load_first_stage,
)
from detr_fast.training.log import read_log

ARGS = {
    "backbone": "resnet18", "backbone_weights": "none", "backbone_norm": "frozen", "dilation": False,
    "lr_backbone": 1e-4, "position_embedding": "sine", "hidden_dim": 32, "nheads": 4, "dim_feedforward": 24,
    "enc_layers": 1, "dec_layers": 2, "dropout": 0.0, "pre_norm": False, "num_queries": 7, "aux_loss": True,
    "layer1_num": 3, "layer2_num": 2, "LETRpost": False, "layer1_frozen": False, "second_hidden_dim": 32,
    "second_nheads": 4, "second_dim_feedforward": 40, "second_enc_layers": 1, "second_dec_layers": 3,
    "second_dropout": 0.0, "second_pre_norm": False, "set_cost_class": 1, "set_cost_line": 5, "line_loss_coef": 5,
    "eos_coef": 0.1, "device": "cpu",
}  # fmt: skip


def make_args(**changes):
    return argparse.Namespace(**{**ARGS, **changes})


def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 70, 96, generator=generator), torch.randn(3, 96, 64, generator=generator)]


def targets(counts=(3, 5), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"lines": torch.rand(n, 4, generator=generator, dtype=dtype), "labels": torch.zeros(n, dtype=torch.int64)}
        for n in counts
    ]


def outputs(counts=7, layers=1, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def one():
        return {
            "pred_logits": torch.randn(2, counts, 2, generator=generator, dtype=dtype),
            "pred_lines": torch.rand(2, counts, 4, generator=generator, dtype=dtype),
        }

    return {**one(), **({"aux_outputs": [one() for _ in range(layers - 1)]} if layers > 1 else {})}


@pytest.mark.parametrize(("level", "pre_norm"), [(3, False), (1, True)])
def test_first_stage_matches_plain_detr(level, pre_norm):
    torch.manual_seed(0)
    model, _, _ = build(make_args(layer1_num=level, pre_norm=pre_norm))
    randomize_norms(model)
    model.eval()
    assert model.input_proj.in_channels == 64 * 2**level
    with torch.no_grad():
        out = model(images(), None, None, None)
        state = {key.replace("lines_embed", "bbox_embed"): value for key, value in model.state_dict().items()}
        logits, lines = plain_detr(state, images(), level=level, pre_norm=pre_norm)
    torch.testing.assert_close(out["pred_logits"], logits[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out["pred_lines"], lines[-1], rtol=1e-4, atol=1e-4)
    assert len(out["aux_outputs"]) == 1
    torch.testing.assert_close(out["aux_outputs"][0]["pred_lines"], lines[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_second_stage_reads_a_finer_level_with_the_first_ones_queries(pre_norm):
    torch.manual_seed(0)
    model, _, _ = build(make_args(LETRpost=True, second_pre_norm=pre_norm))
    randomize_norms(model)
    model.eval()
    image = images()[0][None]  # no padding
    with torch.no_grad():
        out, nothing = model(image)
        assert nothing is None and len(out["aux_outputs"]) == 2

        state = model.state_dict()
        first = {key.removeprefix("letr."): value for key, value in state.items() if key.startswith("letr.")}

        def stage(state, level, query, **kind):
            x = plain_features(first, "resnet18", image, level=level)
            x = F.conv2d(x, state["input_proj.weight"], state["input_proj.bias"])
            mask = torch.zeros(1, *x.shape[-2:], dtype=torch.bool)
            part = {key.removeprefix("transformer."): value for key, value in state.items()}
            return plain_transformer(part, x, mask, query, plain_position(mask, 16), 4, **kind)[0][-1]

        queries = stage(first, 3, first["query_embed.weight"])
        hs = stage(state, 2, queries[0], pre_norm=pre_norm)
        logits = F.linear(hs, state["class_embed.weight"], state["class_embed.bias"])
    torch.testing.assert_close(out["pred_logits"], logits, rtol=1e-4, atol=1e-4)


def test_state_dict_has_letr_names():
    model, _, _ = build(make_args(LETRpost=True))
    names = set(model.state_dict())
    assert {
        "letr.backbone.0.body.conv1.weight", "backbone.0.body.conv1.weight", "letr.query_embed.weight",
        "letr.input_proj.weight", "letr.lines_embed.layers.2.bias", "letr.class_embed.weight", "input_proj.bias",
        "transformer.encoder.layers.0.self_attn.in_proj_weight", "lines_embed.layers.0.weight", "class_embed.bias",
        "letr.transformer.decoder.layers.1.multihead_attn.out_proj.weight", "transformer.decoder.norm.weight",
    } <= names  # fmt: skip
    assert not any(name.startswith("query_embed") for name in names)


def test_transformers_return_sequence_first_memory_and_weights():
    model, _, _ = build(make_args(LETRpost=True))
    model.eval()
    src, pos = torch.randn(2, 2, 32, 3, 5)
    mask = torch.zeros(2, 3, 5, dtype=torch.bool)
    mask[1, :, 3:] = True
    hs, memory = model.letr.transformer(src, mask, torch.randn(7, 32), pos)
    assert hs.shape == (2, 2, 7, 32) and memory.shape == (15, 2, 32)
    queries = torch.randn(2, 7, 32)
    hs, memory, weights = model.transformer(src, mask, queries, pos, need_weights=True)
    assert hs.shape == (3, 2, 7, 32) and memory.shape == (15, 2, 32)
    assert [w.shape for w in weights] == [(2, 7, 15)] * 3
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 7))
    assert weights[2][1].unflatten(1, (3, 5))[:, :, 3:].abs().max() == 0
    fast, _, nothing = model.transformer(src, mask, queries, pos)
    torch.testing.assert_close(fast, hs, rtol=1e-4, atol=1e-5)
    assert nothing is None
    # Each image has queries of its own.
    alone, *_ = model.transformer(src[1:], mask[1:], queries[1:], pos[1:])
    torch.testing.assert_close(fast[:, 1:], alone, rtol=1e-4, atol=1e-5)


def test_frozen_first_stage_gets_no_gradients_and_keeps_its_statistics():
    torch.manual_seed(0)
    model, criterion, _ = build(make_args(LETRpost=True, layer1_frozen=True, backbone_norm="batch"))
    model.train()
    before = {key: value.clone() for key, value in model.letr.state_dict().items()}
    losses = criterion(model(images())[0], targets())
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items()).backward()
    assert all(p.grad is None for p in model.letr.parameters())
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(torch.equal(value, before[key]) for key, value in model.letr.state_dict().items())


def test_second_stage_starts_from_the_first():
    args = make_args(LETRpost=True, second_dec_layers=2, second_dim_feedforward=24)
    torch.manual_seed(0)
    first, _, _ = build(make_args())
    stack, _, _ = build(args)
    # LETR's early checkpoints have another name for the head.
    load_first_stage(stack, {k.replace("lines_embed", "bbox_embed"): v for k, v in first.state_dict().items()})
    for name in ("transformer", "class_embed", "lines_embed"):
        mine, theirs = getattr(stack, name).state_dict(), getattr(first, name).state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert torch.equal(stack.letr.query_embed.weight, first.query_embed.weight)
    with pytest.raises(ValueError, match="do not fit"):
        load_first_stage(build(make_args(LETRpost=True))[0], first.state_dict())


class FourLevels(nn.Module):
    """Somebody else's backbone, which says nothing of its channels."""

    def forward(self, samples):
        from detr_fast import NestedTensor

        batch = len(samples.tensors)
        sizes = [(256, 8), (512, 4), (1024, 2), (2048, 1)]
        levels = [
            NestedTensor(torch.ones(batch, c, n, n), torch.zeros(batch, n, n, dtype=torch.bool)) for c, n in sizes
        ]
        return levels, [torch.zeros(batch, 32, n, n) for _, n in sizes]


def test_foreign_backbone_has_the_channels_of_a_resnet50():
    from detr_fast.models.letr import Transformer

    transformer = Transformer(32, 4, 1, 1, 16, return_intermediate_dec=True)
    for level, channels in enumerate((256, 512, 1024, 2048)):
        model = LETR(FourLevels(), transformer, 1, 5, argparse.Namespace(layer1_num=level))
        assert model.input_proj.in_channels == channels
    out = model(torch.zeros(2, 3, 32, 32))
    assert out["pred_lines"].shape == (2, 5, 4) and "aux_outputs" not in out
    with pytest.raises(ValueError, match="layer1_num is 4"):
        LETR(FourLevels(), transformer, 1, 5, argparse.Namespace(layer1_num=4))


def test_build_refuses_levels_and_widths_that_do_not_fit():
    with pytest.raises(ValueError, match="layer1_num is 3; the backbone returns the levels 0 to 1"):
        build(make_args(backbone_level=1))
    with pytest.raises(ValueError, match="second_hidden_dim is 64"):
        build(make_args(LETRpost=True, second_hidden_dim=64))


def brute_force(cost):
    """Cheapest injective assignment of targets (columns) to queries (rows): {target: query}."""
    queries, count = cost.shape
    best = min(itertools.permutations(range(queries), count), key=lambda q: sum(cost[q[j], j] for j in range(count)))
    return dict(enumerate(best))


def test_matcher_matches_brute_force():
    out, tgt = outputs(counts=5), targets((3, 0))
    matched = HungarianMatcher_Line(cost_class=2, cost_line=5)(out, tgt)
    for b in range(2):
        probability = out["pred_logits"][b].softmax(-1)[:, 0]
        distance = (out["pred_lines"][b][:, None] - tgt[b]["lines"]).abs().sum(-1)
        expected = brute_force(5 * distance - 2 * probability[:, None])
        query, target = matched[b]
        assert query.dtype == target.dtype == torch.int64 and query.tolist() == sorted(query.tolist())
        assert dict(zip(target.tolist(), query.tolist(), strict=True)) == expected


def test_swapped_ends_are_another_line():
    line = torch.tensor([[0.1, 0.2, 0.8, 0.4]])
    out = {"pred_logits": torch.zeros(1, 2, 2), "pred_lines": torch.stack((line[0, [2, 3, 0, 1]], line[0] + 0.2))[None]}
    query, _ = HungarianMatcher_Line()(out, [{"lines": line, "labels": torch.zeros(1, dtype=torch.int64)}])[0]
    assert query.tolist() == [1]


def test_matcher_rejects():
    with pytest.raises(ValueError, match="both are"):
        HungarianMatcher_Line(0, 0)
    with pytest.raises(ValueError, match="pred_lines"):
        HungarianMatcher_Line()({"pred_logits": torch.zeros(2, 3, 2)}, targets())
    with pytest.raises(ValueError, match="lacks the key 'lines'"):
        HungarianMatcher_Line()(outputs(), [{"labels": torch.zeros(1, dtype=torch.int64)}] * 2)
    bad = outputs()
    bad["pred_lines"][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"pred_lines \(1 of 56 values\)"):
        HungarianMatcher_Line()(bad, targets())


def plain_losses(out, tgt, indices, eos, focal_gamma=None):
    """LETR's losses of one layer, query by query."""
    total = weights = line = 0.0
    for b, (query, target) in enumerate(indices):
        pairs = dict(zip(query.tolist(), target.tolist(), strict=True))
        for q in range(out["pred_logits"].shape[1]):
            label = int(tgt[b]["labels"][pairs[q]]) if q in pairs else 1
            log_p = out["pred_logits"][b, q].log_softmax(-1)[label]
            weight = eos if label == 1 else 1.0
            total = total - weight * log_p * (1 if focal_gamma is None else (1 - log_p.exp()) ** focal_gamma)
            weights += weight if focal_gamma is None else 1.0
            if q in pairs:
                line = line + (out["pred_lines"][b, q] - tgt[b]["lines"][pairs[q]]).abs().sum()
    return {"loss_ce": total / weights, "loss_line": line / max(1, sum(len(t["labels"]) for t in tgt))}


@pytest.mark.parametrize("gamma", [None, 2.0, 0.5], ids=["cross_entropy", "focal2", "focal0.5"])
@pytest.mark.parametrize("names", [("lines_labels", "lines"), ("POST_lines_labels", "POST_lines")])
def test_losses_match_plain(gamma, names):
    args = argparse.Namespace(
        label_loss_func="cross_entropy" if gamma is None else "focal_loss", label_loss_params=f'{{"gamma": {gamma}}}'
    )
    if gamma is None:
        args.label_loss_params = "{}"
    criterion = SetCriterion(1, {"loss_ce": 1}, 0.3, names, args, matcher=HungarianMatcher_Line(1, 5))
    out, tgt = outputs(layers=3), targets((4, 0))
    values = criterion(out, tgt)
    layers = {"": out, "_0": out["aux_outputs"][0], "_1": out["aux_outputs"][1]}
    assert set(values) == {f"{name}{suffix}" for name in ("loss_ce", "loss_line") for suffix in layers}
    for suffix, layer in layers.items():
        indices = criterion.matcher(layer, tgt)
        for name, value in plain_losses(layer, tgt, indices, 0.3, gamma).items():
            torch.testing.assert_close(values[name + suffix], value)
        # The public methods, as the original's training calls them.
        direct = {
            **criterion.loss_lines_labels(layer, tgt, 4.0, origin_indices=indices),
            **criterion.get_loss("lines", layer, tgt, 4.0, origin_indices=indices),
        }
        torch.testing.assert_close(direct, {name: values[name + suffix] for name in direct})


def test_losses_with_another_matcher_and_without_targets():
    class First(nn.Module):
        def forward(self, outputs, targets):
            return [(torch.arange(len(t["labels"])), torch.arange(len(t["labels"]))) for t in targets]

    names = ["lines_labels", "lines", "cardinality"]
    criterion = SetCriterion(1, {}, 0.1, names, argparse.Namespace(), matcher=First())
    out, tgt = outputs(layers=2), targets((2, 1))
    values = criterion(out, tgt)
    expected = plain_losses(out, tgt, First()(out, tgt), 0.1)
    torch.testing.assert_close({name: values[name] for name in expected}, expected)
    found = (out["pred_logits"].argmax(-1) == 0).sum(1)
    assert values["cardinality_error"] == (found - torch.tensor([2, 1])).abs().float().mean()

    out["pred_lines"].requires_grad_()
    empty = SetCriterion(1, {}, 0.1, names, argparse.Namespace())(out, targets((0, 0)))
    assert empty["loss_line"] == 0
    empty["loss_line"].backward()
    assert out["pred_lines"].grad.abs().max() == 0


@pytest.mark.parametrize("func", ["cross_entropy", "focal_loss"])
def test_losses_gradcheck(func):
    args = argparse.Namespace(label_loss_func=func)
    criterion = SetCriterion(1, {}, 0.1, ["lines_labels", "lines"], args)
    out, tgt = outputs(counts=3, dtype=torch.float64), targets((2, 1), dtype=torch.float64)

    def run(logits, lines):
        values = criterion({"pred_logits": logits, "pred_lines": lines}, tgt)
        return values["loss_ce"], values["loss_line"]

    inputs = [out[name].requires_grad_() for name in ("pred_logits", "pred_lines")]
    assert torch.autograd.gradcheck(run, inputs)


def test_post_lines_of_all_queries_or_of_the_matched_ones():
    criterion = SetCriterion(1, {}, 0.1, ["lines"], argparse.Namespace())
    out, tgt = outputs(), targets((3, 2))
    indices = criterion.matcher(out, tgt)
    expected = criterion.loss_lines(out, tgt, 5.0, origin_indices=indices)["loss_line"]
    every = criterion.loss_lines_POST({"POST_pred_lines": out["pred_lines"]}, tgt, 5.0, indices)["loss_line"]
    chosen = torch.cat([lines[i] for lines, (i, _) in zip(out["pred_lines"], indices, strict=True)])[None]
    matched = criterion.loss_lines_POST({"POST_pred_lines": chosen}, tgt, 5.0, indices)["loss_line"]
    torch.testing.assert_close(every, expected)
    torch.testing.assert_close(matched, expected)


def test_criterion_rejects():
    with pytest.raises(ValueError, match="unknown loss 'boxes'"):
        SetCriterion(1, {}, 0.1, ["boxes"], argparse.Namespace())
    with pytest.raises(ValueError, match="label_loss_func is 'dice'"):
        SetCriterion(1, {}, 0.1, ["lines"], argparse.Namespace(label_loss_func="dice"))
    for params in ('{"alpha": 1}', "__import__('os')", "[2.0]", '{"gamma": -1}'):
        with pytest.raises(ValueError, match="label_loss_params"):
            SetCriterion(1, {}, 0.1, ["lines"], argparse.Namespace(label_loss_params=params))
    bad = targets()
    bad[0]["labels"][0] = 1
    with pytest.raises(ValueError, match="the classes are 0 to 0"):
        SetCriterion(1, {}, 0.1, ["lines"], argparse.Namespace())(outputs(), bad)


def test_postprocess_scales_each_image():
    out, sizes = outputs(), torch.tensor([[100, 200], [50, 40]])
    results = PostProcess_Line()(out, sizes, "prediction")
    posted = PostProcess_Line()(
        {"pred_logits": out["pred_logits"], "POST_pred_lines": out["pred_lines"]}, sizes, "prediction_POST"
    )
    for b, result in enumerate(results):
        height, width = sizes[b].tolist()
        torch.testing.assert_close(result["scores"], out["pred_logits"][b].softmax(-1)[:, 0])
        assert result["labels"].tolist() == [0] * 7
        torch.testing.assert_close(result["lines"], out["pred_lines"][b] * torch.tensor([width, height] * 2))
        assert torch.equal(posted[b]["lines"], result["lines"])
    truth = [dict(t, image_id=torch.tensor([i])) for i, t in enumerate(targets())]
    scaled = PostProcess_Line()(truth, sizes, "ground_truth")
    torch.testing.assert_close(scaled[1]["lines"], truth[1]["lines"] * torch.tensor([40, 50, 40, 50]))
    with pytest.raises(ValueError, match="output_type is 'masks'"):
        PostProcess_Line()(out, sizes, "masks")


TINY = [
    "--dataset_file", "lines", "--backbone", "resnet18", "--backbone_weights", "none", "--backbone_level", "1",
    "--layer1_num", "1", "--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1", "--dec_layers", "1",
    "--dim_feedforward", "32", "--num_queries", "12", "--image_size", "48", "--batch_size", "2", "--num_workers", "0",
    "--lr_backbone", "1e-3", "--device", "cpu", "--print_freq", "1000", "--epochs", "1",
    "--output_dir", "none", "--sample_images", "1",
]  # fmt: skip
SECOND = [
    "--LETRpost", "--layer1_frozen", "--layer2_num", "0", "--second_hidden_dim", "32", "--second_nheads", "2",
    "--second_enc_layers", "1", "--second_dec_layers", "1", "--second_dim_feedforward", "32",
    "--label_loss_func", "focal_loss", "--label_loss_params", '{"gamma": 2.0}',
]  # fmt: skip


def test_both_stages_train_and_evaluate_by_the_commands(tmp_path, capsys):
    data = str(make_lines_dataset(tmp_path / "data", num_train=4, num_val=2, image_size=48))
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", *TINY, "--coco_path", data, "--output_dir", str(first)]) == 0
    [row] = read_log(first)
    assert set(row["test_line_eval"]) == {"sAP5", "sAP10", "sAP15", "distance"}
    assert row["test_line_eval"]["distance"] > 0 and row["train_loss_line"] > 0 and "train_class_error" not in row
    for name in ("checkpoint.pth", "checkpoint_best.pth", "eval/latest.pth", "samples/epoch0000.png"):
        assert (first / name).is_file()

    weights = str(first / "checkpoint.pth")
    flags = [*TINY, *SECOND, "--coco_path", data, "--output_dir", str(second)]
    assert main(["train", *flags, "--frozen_weights", weights]) == 0
    coarse = torch.load(weights, weights_only=True)["model"]
    fine = torch.load(second / "checkpoint.pth", weights_only=True)["model"]
    assert all(torch.equal(fine[f"letr.{name}"], value) for name, value in coarse.items())

    capsys.readouterr()
    evaluate = ["eval", "--weights", str(second / "checkpoint.pth"), "--coco_path", data, "--num_workers", "0"]
    assert main([*evaluate, "--device", "cpu", "--output_dir", str(tmp_path / "eval")]) == 0
    assert capsys.readouterr().out.count("tructural average precision") == 3
    alone = torch.load(tmp_path / "eval" / "eval.pth", weights_only=True)["stats"]
    assert alone == pytest.approx(read_log(second)[0]["test_line_eval"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--LETRpost"], "--LETRpost does nothing with --dataset_file coco"),
        (["--dataset_file", "lines", "--bbox_loss_coef", "3"], "--bbox_loss_coef does nothing with"),
        (["--dataset_file", "lines", "--masks"], "--masks does nothing with"),
        (["--dataset_file", "lines", "--layer1_frozen"], "--layer1_frozen is about the second stage"),
        (["--dataset_file", "lines", "--LETRpost", "--hidden_dim", "64"], "--second_hidden_dim must be"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, message, capsys):
    assert main(["train", *flags, "--coco_path", "nowhere"]) == 2
    assert message in capsys.readouterr().err
