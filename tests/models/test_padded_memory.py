"""Detectors whose memory nobody reads leave padded pixels out of the encoder's attention, with equal numbers."""

import copy
import pickle

import pytest
import torch
from pairwise import pairwise
from test_detr import _flat, tiny_detr
from test_letr import make_args
from test_segmentation import small_detr
from torch import nn

from detr_fast.layers import MultiheadAttention
from detr_fast.models import (
    DETR,
    DETRsegm,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    letr,
)
from detr_fast.nested_tensor import NestedTensor
from detr_fast.ops.attention import attention_of_projections


def encoder_attentions(transformer):
    return [layer.self_attn for layer in transformer.encoder.layers]


def read_all_rows(transformer):
    for module in encoder_attentions(transformer):
        module.skip_padded_queries = False


def _padded():
    """Images of which half, three quarters, all and nothing is padding."""
    mask = torch.ones(4, 96, 130, dtype=torch.bool)
    mask[0, :, :65] = False
    mask[1, :48, :65] = False
    mask[3] = False
    return NestedTensor(torch.randn(4, 3, 96, 130, dtype=torch.float64).masked_fill(mask[:, None], 0), mask)


def _step(model, samples):
    """Outputs and every parameter's gradient, with random cotangents and the same random numbers each time."""
    torch.manual_seed(1)
    out = model(samples)
    out = out[0] if isinstance(out, tuple) else out
    layers = [*out.pop("aux_outputs", []), out]
    out = [value for layer in layers for value in layer.values()]
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(2)
    gradients = torch.autograd.grad(out, parameters.values(), [torch.randn_like(x) for x in out], allow_unused=True)
    return out, dict(zip(parameters, gradients, strict=True))


@pytest.fixture
def skipped(monkeypatch):
    """The `query_padding_mask` that the op gets in each attention among the pixels, in order."""
    masks = []

    def recording(projections, key_padding_mask=None, *args, query_padding_mask=None, **kwargs):
        if key_padding_mask is not None and len({x.shape[1] for x in projections}) == 1:
            masks.append(query_padding_mask)
        return attention_of_projections(
            projections, key_padding_mask, *args, query_padding_mask=query_padding_mask, **kwargs
        )

    monkeypatch.setattr("detr_fast.layers.attention.attention_of_projections", recording)
    return masks


def fractions(masks):
    return [mask.double().mean(dim=1).tolist() for mask in masks]


def none(masks):
    return bool(masks) and all(mask is None for mask in masks)


@pytest.mark.parametrize(
    ("activation", "pre_norm", "dropout"), pairwise(["relu", "gelu", "glu"], [False, True], [0.0, 0.3])
)
def test_detr_and_gradients_equal_those_with_padded_rows(pre_norm, activation, dropout, skipped):
    model = tiny_detr(level=1, pre_norm=pre_norm, activation=activation, dropout=dropout).double().train()
    samples = _padded()
    out, gradients = _step(model, samples)
    assert len(skipped) == 2  # one for each of the encoder's layers
    for padded in fractions(skipped):
        assert padded[0] > 0.4 and padded[1] > 0.7 and padded[2:] == [1, 0]
    skipped.clear()
    read_all_rows(model.transformer)
    expected, expected_gradients = _step(model, samples)
    assert none(skipped)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    assert all(gradient is not None for gradient in gradients.values())
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("stack", "pre_norm", "dropout"), pairwise([False, True], [False, True], [0.0, 0.3]))
def test_letr_and_gradients_equal_those_with_padded_rows(stack, pre_norm, dropout, skipped):
    kinds = dict(pre_norm=pre_norm, second_pre_norm=pre_norm, dropout=dropout, second_dropout=dropout)
    model = letr.build(make_args(LETRpost=stack, layer1_num=2, layer2_num=1, **kinds))[0].double().train()
    transformers = [model.letr.transformer, model.transformer] if stack else [model.transformer]
    samples = _padded()
    out, gradients = _step(model, samples)
    assert len(skipped) == len(transformers)
    for padded in fractions(skipped):
        assert padded[0] > 0.4 and padded[1] > 0.7 and padded[2:] == [1, 0]
    skipped.clear()
    for transformer in transformers:
        read_all_rows(transformer)
    expected, expected_gradients = _step(model, samples)
    assert none(skipped)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    # LETR's levels leave the backbone's last stage unused.
    assert all(gradient is not None for name, gradient in gradients.items() if "backbone" not in name)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-11)


def test_detrsegm_and_gradients_equal_those_with_padded_rows(skipped):
    model, samples = DETRsegm(small_detr(norm="frozen", aux_loss=True)).double().train(), _padded()
    out, gradients = _step(model, samples)
    assert skipped and all(padded[2:] == [1, 0] for padded in fractions(skipped))
    skipped.clear()
    read_all_rows(model.detr.transformer)
    expected, expected_gradients = _step(model, samples)
    assert none(skipped)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_without_padding_nothing_changes():
    model = tiny_detr(level=1).eval()
    images = torch.randn(2, 3, 64, 96)
    out = _flat(model(images))
    read_all_rows(model.transformer)
    for a, b in zip(out, _flat(model(images)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [Transformer, letr.Transformer, letr.StackTransformer])
@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_transformer_computes_padded_rows_unless_told(pre_norm, kind, skipped):
    model = kind(32, 4, 2, 2, 48, 0.0, "relu", pre_norm, True).double()
    src, pos = torch.randn(2, 2, 32, 5, 7, dtype=torch.float64)
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[0, 3:] = True
    query = torch.randn(2, 6, 32, dtype=torch.float64)
    hs, memory = model(src, mask, query, pos)[:2]
    assert none(skipped)
    skipped.clear()
    for module in encoder_attentions(model):
        module.skip_padded_queries = True
    fast, fast_memory = model(src, mask, query, pos)[:2]
    assert len(skipped) == 2 and all(torch.equal(x, mask.flatten(1)) for x in skipped)
    torch.testing.assert_close(fast, hs, rtol=1e-11, atol=1e-12)
    if kind is Transformer:
        memory, fast_memory = (x.flatten(2).permute(2, 0, 1) for x in (memory, fast_memory))
    tokens = ~mask.flatten(1).t()
    torch.testing.assert_close(fast_memory[tokens], memory[tokens], rtol=1e-11, atol=1e-12)


class EncoderOfTheOriginal(TransformerEncoder):
    def forward(self, src, mask=None, src_key_padding_mask=None, pos=None):
        return super().forward(src, mask, src_key_padding_mask, pos)


class LayerOfTheOriginal(TransformerEncoderLayer):
    def forward_post(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        return super().forward_post(src, src_mask, src_key_padding_mask, pos)


class DecoderOfAnother(TransformerDecoder):
    pass


class DecoderLayerOfAnother(TransformerDecoderLayer):
    pass


class NormOfAnother(nn.LayerNorm):
    pass


class AttentionOfAnother(MultiheadAttention):
    pass


class TransformerOfAnother(Transformer):
    def forward(self, src, mask, query_embed, pos_embed):
        return super().forward(src, mask, query_embed, pos_embed)


class DetectorOfAnother(DETR):
    """Reads what `Transformer` returns, all of it."""


class Foreign(nn.Module):
    """Somebody else's transformer, with the original's four arguments."""

    def __init__(self, transformer):
        super().__init__()
        self.part, self.d_model = transformer, transformer.d_model

    def forward(self, src, mask, query_embed, pos_embed):
        return self.part(src, mask, query_embed, pos_embed)


def _stock_attention(layer):
    attention = layer.self_attn
    layer.self_attn = nn.MultiheadAttention(attention.embed_dim, attention.num_heads, batch_first=True).double()
    layer.self_attn.load_state_dict(attention.state_dict())


def _detr_with(kind, transformer, backbone):
    """A detector of which one part is of another's class."""
    if kind == "transformer":
        transformer.__class__ = TransformerOfAnother
    elif kind == "foreign":
        transformer = Foreign(transformer)
    elif kind == "encoder":
        transformer.encoder.__class__ = EncoderOfTheOriginal
    elif kind == "layer":
        transformer.encoder.layers[1].__class__ = LayerOfTheOriginal
    elif kind == "decoder":
        transformer.decoder.__class__ = DecoderOfAnother
    elif kind == "decoder layer":
        transformer.decoder.layers[0].__class__ = DecoderLayerOfAnother
    elif kind == "norm":
        transformer.encoder.layers[0].norm2.__class__ = NormOfAnother
    elif kind == "attention":
        transformer.encoder.layers[1].self_attn.__class__ = AttentionOfAnother
    elif kind == "stock attention":
        for layer in transformer.encoder.layers:
            _stock_attention(layer)
    return (DetectorOfAnother if kind == "detector" else DETR)(backbone, transformer, 5, 6, True).double()


KINDS = [
    "transformer", "foreign", "encoder", "layer", "decoder", "decoder layer", "norm", "attention", "stock attention",
    "detector",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_are_computed_where_another_may_read_them(kind, skipped):
    """Which is no error, and gives the same numbers."""
    plain, samples = tiny_detr(level=1).double(), _padded()
    samples.mask[2] = samples.mask[1]  # torch's attention gives NaN for an image that is all padding
    expected, expected_gradients = _step(plain, samples)
    assert len(skipped) == 2 and not any(mask is None for mask in skipped)
    skipped.clear()
    transformer = copy.deepcopy(plain.transformer)  # set to skip by its detector
    model = _detr_with(kind, transformer, plain.backbone)
    for name, module in plain.named_children():
        if name not in ("transformer", "backbone"):
            getattr(model, name).load_state_dict(module.state_dict())
    out, gradients = _step(model, samples)
    assert kind == "stock attention" or none(skipped)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    gradients = {name.replace(".part.", "."): gradient for name, gradient in gradients.items()}
    torch.testing.assert_close(
        [gradients[name] for name in expected_gradients], [*expected_gradients.values()], rtol=1e-8, atol=1e-9
    )


class SegmentationOfAnother(DETRsegm):
    """May read the memory as it likes."""


def test_who_skips():
    def skips(transformer):
        return [module.skip_padded_queries for module in encoder_attentions(transformer)]

    assert skips(Transformer(32, 4, 2, 1)) == [False] * 2
    detr = small_detr(norm="frozen")
    assert all(skips(detr.transformer)) and all(skips(copy.deepcopy(detr).transformer))
    assert all(skips(pickle.loads(pickle.dumps(detr)).transformer))
    assert all(skips(DETRsegm(detr).detr.transformer))
    assert not any(skips(SegmentationOfAnother(detr).detr.transformer))
    assert not any(skips(DETRsegm(detr).detr.transformer))  # which the other may still read
    assert not any("skip" in name for name in detr.state_dict())
    for module in detr.modules():
        if isinstance(module, MultiheadAttention):
            module.__dict__.pop("skip_padded_queries", None)
    assert not any(skips(pickle.loads(pickle.dumps(detr)).transformer))  # as pickled by an earlier version
    stack = letr.build(make_args(LETRpost=True, layer1_num=2, layer2_num=1))[0]
    assert all(skips(stack.transformer)) and all(skips(stack.letr.transformer))
