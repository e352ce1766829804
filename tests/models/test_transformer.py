import pytest
import torch
import torch.nn.functional as F
from plain_detr import plain_transformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast.models import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}


def _inputs(batch=2, features=32, height=5, width=7, queries=6, dtype=torch.float32):
    src = torch.randn(batch, features, height, width, dtype=dtype)
    pos = torch.randn(batch, features, height, width, dtype=dtype)
    query = torch.randn(queries, features, dtype=dtype)
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[0, 3:] = True
    mask[-1, :, 5:] = True
    return src, mask, query, pos


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "glu"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_transformer_and_gradients_match_plain(pre_norm, activation, channels_last):
    model = Transformer(32, 4, 2, 3, 48, 0.0, activation, pre_norm, True).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    src, mask, query, pos = _inputs(dtype=torch.float64)
    if channels_last:
        src, pos = (x.contiguous(memory_format=torch.channels_last) for x in (src, pos))
    leaves = [x.requires_grad_() for x in (src, query, pos)]
    hs, memory = model(src, mask, query, pos)
    state = dict(model.named_parameters())
    expected = plain_transformer(state, src, mask, query, pos, 4, pre_norm, ACTIVATIONS[activation])
    assert hs.shape == (3, 2, 6, 32) and memory.shape == src.shape
    torch.testing.assert_close((hs, memory), expected)
    leaves += model.parameters()
    cotangents = [torch.randn_like(hs), torch.randn_like(memory)]
    gradients = torch.autograd.grad([hs, memory], leaves, cotangents)
    expected = torch.autograd.grad(expected, leaves, cotangents)
    torch.testing.assert_close(gradients, expected)


def test_without_intermediates_only_the_last_layer_is_returned():
    inputs = _inputs()
    every = Transformer(32, 4, 1, 3, 48, 0.0, return_intermediate_dec=True)
    last = Transformer(32, 4, 1, 3, 48, 0.0)
    last.load_state_dict(every.state_dict())
    hs = last(*inputs)[0]
    assert hs.shape == (1, 2, 6, 32)
    torch.testing.assert_close(hs[0], every(*inputs)[0][-1])


def _as_torch(layer, stock):
    """Our layer's weights in torch.nn's own layer, which has no positions."""
    stock.load_state_dict(layer.state_dict())
    return stock


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_matches_torch(norm_first):
    layer = TransformerEncoderLayer(32, 4, 48, 0.0, normalize_before=norm_first)
    stock = _as_torch(layer, nn.TransformerEncoderLayer(32, 4, 48, 0.0, norm_first=norm_first))
    src = torch.randn(9, 2, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    torch.testing.assert_close(
        layer(src, src_key_padding_mask=padding), stock(src, src_key_padding_mask=padding), atol=1e-5, rtol=1e-4
    )
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    torch.testing.assert_close(layer(src, src_mask=causal), stock(src, src_mask=causal), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layer_matches_torch(norm_first):
    layer = TransformerDecoderLayer(32, 4, 48, 0.0, normalize_before=norm_first)
    stock = _as_torch(layer, nn.TransformerDecoderLayer(32, 4, 48, 0.0, norm_first=norm_first))
    tgt, memory = torch.randn(5, 2, 32), torch.randn(9, 2, 32)
    arguments = dict(
        tgt_mask=torch.ones(5, 5, dtype=torch.bool).triu(1),
        memory_mask=torch.zeros(5, 9).masked_fill(torch.rand(5, 9) < 0.3, float("-inf")),
        tgt_key_padding_mask=torch.tensor([[False] * 5, [False] * 4 + [True]]),
        memory_key_padding_mask=torch.tensor([[False] * 9, [False] * 6 + [True] * 3]),
    )
    for names in (["tgt_mask"], ["memory_mask"], ["tgt_key_padding_mask"], ["memory_key_padding_mask"]):
        chosen = {name: arguments[name] for name in names}
        out = layer(tgt, memory, **chosen)
        torch.testing.assert_close(out, stock(tgt, memory, **chosen), atol=1e-5, rtol=1e-4)
        assert (out - layer(tgt, memory)).abs().max() > 1e-3


def test_masks_reach_every_layer_of_the_stacks():
    encoder = TransformerEncoder(TransformerEncoderLayer(32, 4, 48, 0.0), 2)
    decoder = TransformerDecoder(TransformerDecoderLayer(32, 4, 48, 0.0), 2, return_intermediate=True)
    src, tgt, pos, query_pos = (torch.randn(n, 2, 32) for n in (9, 5, 9, 5))
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = src
    for layer in encoder.layers:
        expected = layer(expected, src_mask=causal, pos=pos)
    torch.testing.assert_close(encoder(src, mask=causal, pos=pos), expected)
    memory, expected, y = src, [], tgt
    masks = dict(tgt_mask=causal[:5, :5], memory_mask=causal[:5])
    for layer in decoder.layers:
        y = layer(y, memory, pos=pos, query_pos=query_pos, **masks)
        expected.append(y)
    torch.testing.assert_close(decoder(tgt, memory, pos=pos, query_pos=query_pos, **masks), torch.stack(expected))


def test_dropout_acts_in_training_only_and_follows_the_seed():
    model = Transformer(32, 4, 2, 2, 48, 0.5)
    inputs = _inputs()
    torch.manual_seed(1)
    first = model(*inputs)[0]
    assert (first - model(*inputs)[0]).abs().max() > 1e-3
    torch.manual_seed(1)
    assert torch.equal(first, model(*inputs)[0])
    model.eval()
    assert torch.equal(model(*inputs)[0], model(*inputs)[0])
    layer = model.decoder.layers[0]
    rates = [getattr(layer, name).p for name in ("dropout", "dropout1", "dropout2", "dropout3")]
    assert rates + [layer.self_attn.dropout, layer.multihead_attn.dropout] == [0.5] * 6


def test_dropout_on_attention_alone_changes_the_output():
    layer = TransformerEncoderLayer(32, 4, 48, 0.5)
    layer.dropout = layer.dropout1 = layer.dropout2 = nn.Identity()
    src = torch.randn(9, 2, 32)
    assert (layer(src) - layer(src)).abs().max() > 1e-3


def test_padded_pixels_are_not_read():
    model = Transformer(32, 4, 2, 2, 48, 0.0)
    src, mask, query, pos = _inputs()
    hs, memory = model(src, mask, query, pos)
    other = torch.where(mask[:, None], torch.randn_like(src), src)
    hs_other, memory_other = model(other, mask, query, pos)
    torch.testing.assert_close(hs, hs_other)
    valid = ~mask[:, None].expand_as(memory)
    torch.testing.assert_close(memory[valid], memory_other[valid])


def test_image_of_padding_alone_is_finite():
    model = Transformer(32, 4, 2, 2, 48, 0.0)
    src, mask, query, pos = _inputs()
    mask[0] = True
    hs, memory = model(src.requires_grad_(), mask, query, pos)
    torch.autograd.backward([hs, memory], [torch.randn_like(hs), torch.randn_like(memory)])
    assert all(x.isfinite().all() for x in (hs, memory, src.grad))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class _Copies(TorchDispatchMode):
    """Counts what copies a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.count += 1
        return out


@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_layers_copy_nothing(pre_norm):
    model = Transformer(32, 4, 3, 3, 48, 0.0, "relu", pre_norm, True).eval()
    src, mask, query, pos = _inputs()
    counts = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        inputs = [x.contiguous(memory_format=memory_format) for x in (src, pos)]
        with _Copies() as copies:
            model(inputs[0], mask, query, inputs[1])
        counts.append(copies.count)
    # NCHW inputs cost one copy each.
    assert counts == [0, 2]


def test_seq_first_layers_return_views_of_batch_first_memory():
    layer = TransformerEncoderLayer(32, 4, 48, 0.0)
    assert layer(torch.randn(2, 9, 32).transpose(0, 1)).transpose(0, 1).is_contiguous()


def test_glu_widens_linear1():
    layer = TransformerEncoderLayer(32, 4, 48, activation="glu")
    assert layer.linear1.out_features == 96 and layer.linear2.in_features == 48


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(src=torch.zeros(2, 16, 5, 7)), ValueError, r"src is \[2, 16, 5, 7\]; expected \[B, 32, h, w\]"),
        (dict(pos_embed=torch.zeros(2, 32, 7, 5)), ValueError, "pos_embed is"),
        (dict(mask=torch.zeros(2, 5, 7)), TypeError, "mask is torch.float32"),
        (dict(mask=torch.zeros(2, 7, 5, dtype=torch.bool)), ValueError, r"mask is \[2, 7, 5\]"),
    ],
)
def test_rejects_what_does_not_fit(change, error, message):
    model = Transformer(32, 4, 1, 1, 48)
    inputs = dict(zip(("src", "mask", "query_embed", "pos_embed"), _inputs(), strict=True))
    with pytest.raises(error, match=message):
        model(**{**inputs, **change})


def test_rejects_unknown_activation():
    with pytest.raises(ValueError, match="activation is 'swish'"):
        Transformer(32, 4, activation="swish")
