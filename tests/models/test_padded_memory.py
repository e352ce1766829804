"""Detectors whose memory nobody reads leave padded pixels out of the encoder's attention, with equal numbers."""

import pytest
import torch
from pairwise import pairwise
from test_detr import _flat, tiny_detr
from test_letr import make_args
from test_segmentation import small_detr
from torch import nn

from detr_fast.models import DETRsegm, Transformer, TransformerEncoder, TransformerEncoderLayer, letr
from detr_fast.nested_tensor import NestedTensor


def original_signature(base):
    """A subclass that overrides forward with the original's four arguments, and so computes all rows."""

    class FourArguments(base):
        def forward(self, src, mask, query_embed, pos_embed):
            return super().forward(src, mask, query_embed, pos_embed)

    return FourArguments


class EncoderOfTheOriginal(TransformerEncoder):
    def forward(self, src, mask=None, src_key_padding_mask=None, pos=None):
        return super().forward(src, mask, src_key_padding_mask, pos)


class LayerOfTheOriginal(TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        return super().forward(src, src_mask, src_key_padding_mask, pos)


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


class _QueryPadding:
    """Records the `query_padding_mask` of a transformer's encoder's attentions."""

    def __init__(self, transformer):
        self.masks = []
        for layer in transformer.encoder.layers:
            layer.self_attn.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.masks.append(kwargs.get("query_padding_mask"))

    def none(self):
        return bool(self.masks) and all(mask is None for mask in self.masks)

    def fractions(self):
        return [mask.double().mean(dim=1).tolist() for mask in self.masks]


@pytest.mark.parametrize(
    ("activation", "pre_norm", "dropout"), pairwise(["relu", "gelu", "glu"], [False, True], [0.0, 0.3])
)
def test_detr_and_gradients_equal_those_with_padded_rows(pre_norm, activation, dropout):
    model = tiny_detr(level=1, pre_norm=pre_norm, activation=activation, dropout=dropout).double().train()
    recorded, samples = _QueryPadding(model.transformer), _padded()
    out, gradients = _step(model, samples)
    assert len(recorded.masks) == 2  # one for each of the encoder's layers
    for padded in recorded.fractions():
        assert padded[0] > 0.4 and padded[1] > 0.7 and padded[2:] == [1, 0]
    recorded.masks.clear()
    model.transformer.__class__ = original_signature(Transformer)
    expected, expected_gradients = _step(model, samples)
    assert recorded.none()
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    assert all(gradient is not None for gradient in gradients.values())
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("stack", "pre_norm", "dropout"), pairwise([False, True], [False, True], [0.0, 0.3]))
def test_letr_and_gradients_equal_those_with_padded_rows(stack, pre_norm, dropout):
    kinds = dict(pre_norm=pre_norm, second_pre_norm=pre_norm, dropout=dropout, second_dropout=dropout)
    model = letr.build(make_args(LETRpost=stack, layer1_num=2, layer2_num=1, **kinds))[0].double().train()
    transformers = [model.letr.transformer, model.transformer] if stack else [model.transformer]
    recorded, samples = [_QueryPadding(transformer) for transformer in transformers], _padded()
    out, gradients = _step(model, samples)
    for padded in [fractions for record in recorded for fractions in record.fractions()]:
        assert padded[0] > 0.4 and padded[1] > 0.7 and padded[2:] == [1, 0]
    for transformer, record in zip(transformers, recorded, strict=True):
        assert len(record.masks) == 1
        record.masks.clear()
        transformer.__class__ = original_signature(type(transformer))
    expected, expected_gradients = _step(model, samples)
    assert all(record.none() for record in recorded)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    # LETR's levels leave the backbone's last stage unused.
    assert all(gradient is not None for name, gradient in gradients.items() if "backbone" not in name)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_without_padding_nothing_changes():
    model = tiny_detr(level=1).eval()
    images = torch.randn(2, 3, 64, 96)
    out = _flat(model(images))
    model.transformer.__class__ = original_signature(Transformer)
    for a, b in zip(out, _flat(model(images)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [Transformer, letr.Transformer, letr.StackTransformer])
@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_transformer_computes_padded_rows_unless_told(pre_norm, kind):
    model = kind(32, 4, 2, 2, 48, 0.0, "relu", pre_norm, True).double()
    recorded = _QueryPadding(model)
    src, pos = torch.randn(2, 2, 32, 5, 7, dtype=torch.float64)
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[0, 3:] = True
    query = torch.randn(2, 6, 32, dtype=torch.float64)
    hs, memory = model(src, mask, query, pos)[:2]
    assert recorded.none()
    recorded.masks.clear()
    fast, fast_memory = model(src, mask, query, pos, padded_memory=False)[:2]
    assert len(recorded.masks) == 2 and all(torch.equal(x, mask.flatten(1)) for x in recorded.masks)
    torch.testing.assert_close(fast, hs, rtol=1e-11, atol=1e-12)
    if kind is Transformer:
        memory, fast_memory = (x.flatten(2).permute(2, 0, 1) for x in (memory, fast_memory))
    tokens = ~mask.flatten(1).t()
    torch.testing.assert_close(fast_memory[tokens], memory[tokens], rtol=1e-11, atol=1e-12)


class Foreign(nn.Module):
    """Somebody else's transformer, with the original's four arguments."""

    def __init__(self, transformer):
        super().__init__()
        self.part, self.d_model = transformer, transformer.d_model

    def forward(self, src, mask, query_embed, pos_embed):
        return self.part(src, mask, query_embed, pos_embed)


def test_detr_calls_a_foreign_transformer_with_the_originals_four_arguments():
    model, samples = tiny_detr(level=1).double(), _padded()
    expected, _ = _step(model, samples)
    recorded = _QueryPadding(model.transformer)
    model.transformer = Foreign(model.transformer)
    calls = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((len(args), kwargs)), with_kwargs=True
    )
    torch.testing.assert_close(_step(model, samples)[0], expected, rtol=1e-11, atol=1e-12)
    assert calls == [(4, {})] and recorded.none()


def _stock_attention(layer):
    attention = layer.self_attn
    layer.self_attn = nn.MultiheadAttention(attention.embed_dim, attention.num_heads, batch_first=True).double()
    layer.self_attn.load_state_dict(attention.state_dict())


@pytest.mark.parametrize("part", ["encoder", "layer", "attention"])
def test_parts_of_the_transformer_may_have_the_originals_signature(part):
    model, samples = tiny_detr(level=1).double(), _padded()
    samples.mask[2] = samples.mask[1]  # torch's attention gives NaN for an image that is all padding
    expected, expected_gradients = _step(model, samples)
    encoder = model.transformer.encoder
    if part == "encoder":
        encoder.__class__ = EncoderOfTheOriginal
    for layer in encoder.layers:
        if part == "layer":
            layer.__class__ = LayerOfTheOriginal
        elif part == "attention":
            _stock_attention(layer)
    recorded = _QueryPadding(model.transformer)
    out, gradients = _step(model, samples)
    assert recorded.none()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-8, atol=1e-9)


def test_detrsegm_and_gradients_equal_those_with_padded_rows():
    model, samples = DETRsegm(small_detr(norm="frozen", aux_loss=True)).double().train(), _padded()
    recorded = _QueryPadding(model.detr.transformer)
    out, gradients = _step(model, samples)
    assert recorded.masks and all(padded[2:] == [1, 0] for padded in recorded.fractions())
    recorded.masks.clear()
    model.detr.transformer.__class__ = original_signature(Transformer)
    expected, expected_gradients = _step(model, samples)
    assert recorded.none()
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-11)
