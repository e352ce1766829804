"""`detr_fast.attention` in models of Hugging Face's transformers."""

import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detr_fast.integrations import transformers as plug
from detr_fast.layers import FrozenBatchNorm2d

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

TIMM = {"model_type": "timm_backbone", "backbone": "resnet18", "features_only": True, "use_pretrained_backbone": False}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SIZES = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 7, **LAYERS}


def detr(kind="DetrForObjectDetection", **changes):
    levels = [1, 2] if kind == "DetrForObjectDetection" else [1, 2, 3, 4]
    config = transformers.DetrConfig(
        backbone_config={**TIMM, "out_indices": levels}, num_labels=5, **{**SIZES, **changes}
    )
    return getattr(transformers, kind)(config)


def panoptic():
    # The mask head needs a width of at least 128 and, with the heads, a multiple of 8.
    return detr("DetrForSegmentation", d_model=128, encoder_attention_heads=8, decoder_attention_heads=8)


def conditional():
    config = transformers.ConditionalDetrConfig(backbone_config={**TIMM, "out_indices": [1, 2]}, num_labels=5, **SIZES)
    return transformers.ConditionalDetrForObjectDetection(config)


def rt_detr():
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone, num_labels=5, d_model=32, encoder_hidden_dim=32, encoder_in_channels=[16, 32, 32],
        decoder_in_channels=[32, 32, 32], encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=7, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, num_denoising=4, hidden_expansion=0.5,
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config)


MODELS = {"detr": detr, "panoptic": panoptic, "conditional": conditional, "rt_detr": rt_detr}


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # fresh ones are so small that attention is nearly uniform
                parameter.mul_(1.5)
    return model


def tensors_of(output):
    names = ("logits", "pred_boxes", "pred_masks", "last_hidden_state", "encoder_last_hidden_state")
    return {name: output[name] for name in names if output.get(name) is not None}


def assert_equal_outputs(ours, theirs):
    assert set(tensors_of(ours)) == set(tensors_of(theirs))
    for name, value in tensors_of(theirs).items():
        torch.testing.assert_close(
            tensors_of(ours)[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def targets():
    labels = []
    for count in (2, 1):
        boxes = torch.rand(count, 4) * 0.3 + 0.3
        masks = (torch.rand(count, 64, 96) < 0.5).float()
        labels.append({"class_labels": torch.arange(count), "boxes": boxes, "masks": masks})
    return labels


@pytest.fixture
def calls(monkeypatch):
    """How often `detr_fast.attention` was called."""
    made = []
    real = plug.attention
    monkeypatch.setattr(plug, "attention", lambda *args, **kwargs: made.append(args) or real(*args, **kwargs))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_gives_what_eager_gives(name, registered, padded_batch, calls):
    model = build(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(**padded_batch)
        assert not calls
        model.set_attn_implementation("detr_fast")
        ours = model(**padded_batch)
    assert calls
    assert_equal_outputs(ours, theirs)
    if name != "rt_detr":  # which knows no padding
        assert any(args[3] is not None and args[3].any() for args in calls)


def test_without_the_mask_function_padding_is_dropped(registered, padded_batch):
    """Why `register` registers two functions."""
    from transformers.masking_utils import AttentionMaskInterface

    model = build("detr")
    model.set_attn_implementation("detr_fast")
    with torch.no_grad():
        right = model(**padded_batch).logits
        del AttentionMaskInterface._global_mapping["detr_fast"]
        wrong = model(**padded_batch).logits
    assert (right - wrong)[1].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["detr", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])])
def test_loss_and_gradients_in_training(name, registered, padded_batch, calls):
    """transformers as it is against everything that `register` brings."""
    from transformers.monkey_patching import apply_patches

    results = []
    for implementation in ("eager", "detr_fast"):
        plug.unregister() if implementation == "eager" else plug.register()
        with apply_patches():
            model = build(name).train()
        patched = any(isinstance(module, plug._EncoderLayer) for module in model.modules())
        assert patched == (implementation == "detr_fast" and name != "rt_detr")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for rate in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
        model.set_attn_implementation(implementation)
        torch.manual_seed(1)
        loss = model(**padded_batch, labels=targets()).loss
        loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        results.append((loss.detach(), gradients))
    assert calls
    (loss, gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
    assert set(gradients) == set(our_gradients)
    for key, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert ((our_gradients[key] - gradient).abs().max() / scale) < 1e-4, key


def test_dropout_on_the_weights_is_used_in_training_alone(registered, padded_batch):
    torch.manual_seed(0)
    model = detr(attention_dropout=0.5, dropout=0.0)
    model.set_attn_implementation("detr_fast")
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            first, second = (model(**padded_batch).logits for _ in range(2))
        assert torch.equal(first, second) != training


@pytest.mark.parametrize("how", ["argument", "config"])
def test_attentions_are_returned_when_asked(how, registered, padded_batch, calls):
    model = build("detr")
    arguments = {"output_attentions": True} if how == "argument" else {}
    model.set_attn_implementation("eager")
    model.config.output_attentions = how == "config"
    with torch.no_grad():
        theirs = model(**padded_batch, **arguments)
        model.set_attn_implementation("detr_fast")
        ours = model(**padded_batch, **arguments)
    assert not calls
    assert_equal_outputs(ours, theirs)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(ours[name]) == 2
        for weights, expected in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_a_model_loaded_patched_is_the_same_without(registered, padded_batch, tmp_path):
    model = build("detr")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**padded_batch)
    model.save_pretrained(tmp_path / "theirs")
    patched = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "theirs", attn_implementation="detr_fast")
    kinds = {type(module) for module in patched.modules()}
    ours = {plug.SinePositionEmbedding, FrozenBatchNorm2d, plug.DetrEncoderLayer}
    assert ours <= kinds
    assert not any(kind.__name__.startswith(("DetrSine", "DetrFrozen")) for kind in kinds)
    with torch.no_grad():
        assert_equal_outputs(patched.eval()(**padded_batch), expected)
    patched.save_pretrained(tmp_path / "ours")

    plug.unregister()
    plain = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert not any(
        type(module) in (plug.SinePositionEmbedding, FrozenBatchNorm2d, plug.DetrEncoderLayer)
        for module in plain.modules()
    )
    state = plain.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        for name, value in tensors_of(plain(**padded_batch)).items():
            assert torch.equal(value, expected[name])


def test_only_classes_that_count_alike_are_replaced(registered):
    from transformers.models.conditional_detr import modeling_conditional_detr
    from transformers.models.deformable_detr import modeling_deformable_detr
    from transformers.models.detr import modeling_detr
    from transformers.monkey_patching import apply_patches

    with apply_patches():
        assert modeling_detr.DetrSinePositionEmbedding is plug.SinePositionEmbedding
        assert modeling_conditional_detr.ConditionalDetrFrozenBatchNorm2d is FrozenBatchNorm2d
        deformable = modeling_deformable_detr.DeformableDetrSinePositionEmbedding
        assert deformable.__module__ == modeling_deformable_detr.__name__


@pytest.mark.parametrize("masked", [True, False])
def test_the_position_embedding_is_theirs(masked):
    from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding

    mask = torch.ones(2, 6, 9, dtype=torch.bool)
    mask[1, 4:], mask[1, :, 5:] = False, False
    arguments = {"shape": torch.Size([2, 3, 6, 9]), "device": "cpu", "mask": mask if masked else None}
    ours = plug.SinePositionEmbedding(16, normalize=True)
    theirs = DetrSinePositionEmbedding(16, normalize=True)
    expected = theirs(**arguments, dtype=torch.float32)
    torch.testing.assert_close(ours(**arguments, dtype=torch.float32), expected, rtol=0, atol=2e-6)
    low = ours(**arguments, dtype=torch.bfloat16)
    assert torch.equal(low, ours(**arguments, dtype=torch.float32).to(torch.bfloat16))


def test_registering_is_undone():
    from transformers import AttentionInterface, monkey_patching
    from transformers.loss.loss_utils import LOSS_MAPPING
    from transformers.masking_utils import AttentionMaskInterface

    model = build("detr")
    before, losses = monkey_patching.get_patch_mapping(), dict(LOSS_MAPPING)
    plug.unregister()  # nothing there
    plug.register()
    plug.register()
    assert len(monkey_patching.get_patch_mapping()) == len(before) + 4
    assert all(isinstance(LOSS_MAPPING[name], kind) for name, kind in plug._LOSSES.items())
    plug.unregister()
    assert monkey_patching.get_patch_mapping() == before
    assert losses == LOSS_MAPPING
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert "detr_fast" not in interface._global_mapping
    with pytest.raises(ValueError, match="detr_fast"):
        model.set_attn_implementation("detr_fast")


def loss_case(kind, auxiliary_loss=False):
    """A model's configuration and the arguments of its loss, random."""
    sizes = {"num_labels": 5, "auxiliary_loss": auxiliary_loss, "bbox_cost": 3, "eos_coefficient": 0.3}
    config = {
        "detr": lambda: transformers.DetrConfig(decoder_layers=3, **sizes),
        "panoptic": lambda: transformers.DetrConfig(decoder_layers=3, **sizes),
        "table": lambda: transformers.TableTransformerConfig(decoder_layers=3, **sizes),
        "yolos": lambda: transformers.YolosConfig(decoder_layers=3, **sizes),
    }[kind]()
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 7, 6, requires_grad=True)  # [layers, B, Q, K]
    boxes = (torch.rand(3, 2, 7, 4) * 0.3 + 0.3).requires_grad_()
    masks = [torch.randn(2, 7, 16, 24, requires_grad=True)] if kind == "panoptic" else []
    arguments = [logits[-1], targets(), "cpu", boxes[-1], *masks, config, logits, boxes]
    return arguments, [logits, boxes, *masks]


@pytest.mark.parametrize("auxiliary_loss", [False, True], ids=["last", "every-layer"])
@pytest.mark.parametrize("kind", ["detr", "panoptic", "table", "yolos"])
def test_the_loss_is_theirs(kind, auxiliary_loss, registered):
    from transformers.loss.loss_utils import LOSS_MAPPING

    function = LOSS_MAPPING["ForSegmentation" if kind == "panoptic" else "ForObjectDetection"]
    results = []
    for compute in (function.original, function):
        arguments, sources = loss_case(kind, auxiliary_loss)
        total, losses, earlier = compute(*arguments)
        gradients = torch.autograd.grad(total, sources, allow_unused=True)
        results.append((total, losses, earlier, gradients))
    (total, losses, earlier, gradients), (ours, our_losses, our_earlier, our_gradients) = results
    torch.testing.assert_close(ours, total, rtol=1e-5, atol=1e-5)
    assert set(our_losses) == set(losses) and len(losses) == (4 if kind != "panoptic" else 6) + 8 * auxiliary_loss
    for name, value in losses.items():
        torch.testing.assert_close(our_losses[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for gradient, expected in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert (our_earlier is None) == (earlier is None) == (not auxiliary_loss)
    for layer, expected in zip(our_earlier or [], earlier or [], strict=True):
        assert set(layer) == set(expected) and all(torch.equal(layer[name], expected[name]) for name in layer)


@pytest.mark.parametrize("kind", ["detr", "panoptic"])
def test_a_loss_that_ours_refuses_is_theirs(kind, registered):
    """A label that means no-object, which they let pass."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    function = LOSS_MAPPING["ForSegmentation" if kind == "panoptic" else "ForObjectDetection"]
    arguments, _ = loss_case(kind)
    arguments[1][0]["class_labels"][0] = 5
    assert torch.equal(function(*arguments)[0], function.original(*arguments)[0])


@pytest.mark.parametrize("value", [1.0, torch.inf, torch.nan])
def test_the_encoder_layer_clamps_as_theirs(value):
    from transformers.models.detr.modeling_detr import DetrEncoderLayer

    config = transformers.DetrConfig(**{**SIZES, "dropout": 0.0})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = DetrEncoderLayer(config)
    ours = plug.DetrEncoderLayer(config)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for layer in (theirs, ours):
            layer.final_layer_norm.bias[3] = value
    x, position = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    for training in (True, False):
        out, expected = (
            layer.train(training)(x, None, spatial_position_embeddings=position) for layer in (ours, theirs)
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert isinstance(pickle.loads(pickle.dumps(ours)), DetrEncoderLayer)


def test_the_encoder_layer_waits_for_nothing():
    """Reading a value fails on the meta device."""
    from transformers.models.detr.modeling_detr import DetrEncoderLayer

    config = transformers.DetrConfig(**SIZES)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        x = torch.randn(2, 6, 32)
        assert plug.DetrEncoderLayer(config).train()(x, None).shape == x.shape
        with pytest.raises(RuntimeError):
            DetrEncoderLayer(config).train()(x, None)


@pytest.mark.slow
def test_a_step_of_their_trainer(registered, padded_batch, tmp_path):
    pytest.importorskip("accelerate")
    build("detr").save_pretrained(tmp_path / "model")
    model = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "model", attn_implementation="detr_fast")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [
        {"pixel_values": pixels, "pixel_mask": mask, "labels": target}
        for pixels, mask, target in zip(
            padded_batch["pixel_values"], padded_batch["pixel_mask"], targets(), strict=True
        )
    ]

    def collate(items):
        stacked = {name: torch.stack([item[name] for item in items]) for name in ("pixel_values", "pixel_mask")}
        return {**stacked, "labels": [item["labels"] for item in items]}

    arguments = transformers.TrainingArguments(
        tmp_path / "out", max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate)
    loss = trainer.train().training_loss
    assert 0 < loss < 100
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("encoder" in name for name in changed) and any("bbox_predictor" in name for name in changed)


def formula(query, key, value, added):
    weights = (query @ key.transpose(-2, -1) * 0.3 + added).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


LOWEST = torch.finfo(torch.float32).min
KEEP = torch.tensor([[True] * 5, [True, True, True, False, False]])
PAIRS = torch.ones(5, 5, dtype=torch.bool).tril()
# mask, is_causal, what is added to the scores, whether `detr_fast.attention` computes it
MASKS = {
    "none": (None, False, torch.zeros(5, 5), True),
    "keys": (KEEP, False, torch.where(KEEP, 0.0, LOWEST)[:, None, None], True),
    "keys-of-all": (KEEP[1:], False, torch.where(KEEP[1:], 0.0, LOWEST)[:, None, None], True),
    "keys-4d": (KEEP[:, None, None], False, torch.where(KEEP, 0.0, LOWEST)[:, None, None], True),
    "pairs": (PAIRS.expand(2, 1, 5, 5), False, torch.where(PAIRS, 0.0, LOWEST), False),
    "pairs-float": (torch.where(PAIRS, 0.0, LOWEST), False, torch.where(PAIRS, 0.0, LOWEST), False),
    "float-4d": (torch.linspace(-1, 1, 50).view(2, 1, 5, 5), False, torch.linspace(-1, 1, 50).view(2, 1, 5, 5), False),
    "causal": (None, True, torch.where(PAIRS, 0.0, LOWEST), False),
}


@pytest.mark.parametrize("weights", [False, True], ids=["out", "weights"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind(kind, weights, calls):
    mask, causal, added, is_ours = MASKS[kind]
    query, key = torch.randn(2, 2, 5, 3, 16).transpose(2, 3)  # [B, H, L, D], views of [B, L, H, D]
    value = torch.randn(2, 3, 5, 8)
    module = SimpleNamespace(is_causal=causal, training=False)
    out, returned = plug.attention_forward(module, query, key, value, mask, scaling=0.3, output_attentions=weights)
    expected, expected_weights = formula(query, key, value, added)
    torch.testing.assert_close(out, expected)
    assert bool(calls) == (is_ours and not weights)
    if weights:
        torch.testing.assert_close(returned, expected_weights)
    else:
        assert returned is None


def test_heads_that_share_keys_go_to_sdpa(calls):
    query, key, value = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    module = SimpleNamespace(is_causal=False, num_key_value_groups=2, training=False)
    out, _ = plug.attention_forward(module, query, key, value, KEEP, scaling=0.3)
    shared = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    torch.testing.assert_close(out, formula(query, *shared, torch.where(KEEP, 0.0, LOWEST)[:, None, None])[0])
    assert not calls


def test_a_causal_model_keeps_its_order(registered):
    from transformers.masking_utils import create_causal_mask

    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=11
    )
    config._attn_implementation = "detr_fast"
    mask = create_causal_mask(config, torch.zeros(2, 5, 32), KEEP.long(), None)
    assert torch.equal(mask.bool(), (PAIRS & KEEP[:, None])[:, None])


def test_a_query_without_any_key_gets_nothing():
    query = torch.randn(2, 2, 5, 16)
    keep = torch.tensor([[True] * 5, [False] * 5])
    for asked in (False, True):
        module = SimpleNamespace(is_causal=False, training=False)
        out, weights = plug.attention_forward(module, query, query, query, keep, output_attentions=asked)
        assert torch.equal(out[1], torch.zeros_like(out[1])) and out[0].isfinite().all()
    assert not weights[1].any()


def test_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope: dict = {}
    exec(snippet, scope)
    assert scope["model"].config._attn_implementation == "sdpa"
