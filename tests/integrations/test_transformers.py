"""`detr_fast.attention` in models of Hugging Face's transformers."""

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
    pytest.importorskip("scipy")  # transformers' matcher
    results = []
    for implementation in ("eager", "detr_fast"):
        model = build(name).train()
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
    assert plug.SinePositionEmbedding in kinds and FrozenBatchNorm2d in kinds
    assert not any(kind.__name__.startswith(("DetrSine", "DetrFrozen")) for kind in kinds)
    with torch.no_grad():
        assert_equal_outputs(patched.eval()(**padded_batch), expected)
    patched.save_pretrained(tmp_path / "ours")

    plug.unregister()
    plain = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert not any(type(module) in (plug.SinePositionEmbedding, FrozenBatchNorm2d) for module in plain.modules())
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
    from transformers.masking_utils import AttentionMaskInterface

    model = build("detr")
    before = monkey_patching.get_patch_mapping()
    plug.unregister()  # nothing there
    plug.register()
    plug.register()
    assert len(monkey_patching.get_patch_mapping()) == len(before) + 2
    plug.unregister()
    assert monkey_patching.get_patch_mapping() == before
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert "detr_fast" not in interface._global_mapping
    with pytest.raises(ValueError, match="detr_fast"):
        model.set_attn_implementation("detr_fast")


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
