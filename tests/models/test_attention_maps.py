"""Attention weights as code written for the original reads them, and as `capture_attention` gives them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import detr_fast
from detr_fast import DETR, NestedTensor, Transformer, TransformerDecoderLayer, TransformerEncoderLayer
from detr_fast.models import AttentionMaps


def make_detr(**options):
    torch.manual_seed(0)
    backbone = detr_fast.Backbone("resnet18", False, False, False, weights=None)
    joiner = detr_fast.Joiner(backbone, detr_fast.PositionEmbeddingSine(16, normalize=True))
    return DETR(joiner, Transformer(32, 4, 2, 2, 64, return_intermediate_dec=True), 5, 7, **options).eval()


def with_stock_attention(model):
    """The same detector with torch's own sequence-first attention, as the original has."""
    other = make_detr()
    other.load_state_dict(model.state_dict())
    for layer in (*other.transformer.encoder.layers, *other.transformer.decoder.layers):
        for name, attention in list(layer.named_children()):
            if isinstance(attention, nn.MultiheadAttention):
                stock = nn.MultiheadAttention(attention.embed_dim, attention.num_heads).eval()
                stock.load_state_dict(attention.state_dict())
                setattr(layer, name, stock)
    return other


def notebook(model, image):
    """The steps of the original's attention notebook: hooks on the backbone and on the last layers' attentions."""
    features, encoder, decoder = [], [], []
    hooks = [
        model.backbone[-2].register_forward_hook(lambda self, input, output: features.append(output)),
        model.transformer.encoder.layers[-1].self_attn.register_forward_hook(
            lambda self, input, output: encoder.append(output[1])
        ),
        model.transformer.decoder.layers[-1].multihead_attn.register_forward_hook(
            lambda self, input, output: decoder.append(output[1])
        ),
    ]
    with torch.no_grad():
        outputs = model(image)
    for hook in hooks:
        hook.remove()
    h, w = features[0]["0"].tensors.shape[-2:]
    keep = outputs["pred_logits"].softmax(-1)[0, :, :-1].max(-1).values.topk(3).indices
    queries = torch.stack([decoder[0][0, i].view(h, w) for i in keep])
    pixels = encoder[0][0].reshape(h, w, h, w)
    return outputs, keep, queries, pixels


def test_the_notebooks_steps_give_the_originals_maps():
    model = make_detr()
    image = torch.randn(1, 3, 96, 130)
    outputs, keep, queries, pixels = notebook(model, image)
    wants = notebook(with_stock_attention(model), image)
    assert queries.shape == (3, 3, 5) and pixels.shape == (3, 5, 3, 5) and torch.equal(keep, wants[1])
    torch.testing.assert_close((queries, pixels), wants[2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(queries.sum((1, 2)), torch.ones(3))
    assert queries.std() > 1e-4 and (queries[0] - queries[1]).abs().max() > 1e-4
    torch.testing.assert_close(outputs, wants[0], rtol=0, atol=1e-5)
    # Without hooks the outputs are the fused path's.
    with torch.no_grad():
        torch.testing.assert_close(model(image), outputs, rtol=0, atol=1e-5)


class Post(TransformerEncoderLayer):
    """As somebody writes it against the original: sequence first, and `value` by name."""

    def forward_post(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        q = k = self.with_pos_embed(src, pos)
        found, self.weights = self.self_attn(
            q, k, value=src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=True
        )
        src = self.norm1(src + self.dropout1(found))
        return self.norm2(src + self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(src))))))


class PostDecoder(TransformerDecoderLayer):
    def forward_post(
        self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None, memory_key_padding_mask=None,
        pos=None, query_pos=None,
    ):  # fmt: skip
        q = k = self.with_pos_embed(tgt, query_pos)
        tgt = self.norm1(tgt + self.self_attn(q, k, value=tgt, key_padding_mask=tgt_key_padding_mask)[0])
        found = self.multihead_attn(
            query=self.with_pos_embed(tgt, query_pos), key=self.with_pos_embed(memory, pos), value=memory,
            key_padding_mask=memory_key_padding_mask,
        )[0]  # fmt: skip
        tgt = self.norm2(tgt + found)
        return self.norm3(tgt + self.linear2(self.activation(self.linear1(tgt))))


def test_layers_with_the_originals_forward_post_are_the_same_model():
    model = make_detr()
    images = NestedTensor(torch.randn(2, 3, 96, 130), torch.zeros(2, 96, 130, dtype=torch.bool))
    images.mask[1, 40:] = True
    with torch.no_grad():
        expected = model(images)
        for layer in model.transformer.encoder.layers:
            layer.__class__ = Post
        for layer in model.transformer.decoder.layers:
            layer.__class__ = PostDecoder
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert model.transformer.encoder.layers[0].weights.shape == (2, 15, 15)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_forward_is_forward_post_or_forward_pre(pre_norm):
    src, memory = torch.randn(5, 2, 32), torch.randn(9, 2, 32)
    encoder = TransformerEncoderLayer(32, 4, 48, 0.0, normalize_before=pre_norm)
    decoder = TransformerDecoderLayer(32, 4, 48, 0.0, normalize_before=pre_norm)
    name, other = ("forward_pre", "forward_post") if pre_norm else ("forward_post", "forward_pre")
    assert torch.equal(encoder(src), getattr(encoder, name)(src))
    assert torch.equal(decoder(src, memory), getattr(decoder, name)(src, memory))
    assert (encoder(src) - getattr(encoder, other)(src)).abs().max() > 1e-2


def test_capture_attention_gives_the_weights_of_every_layer():
    model = make_detr()
    stock = with_stock_attention(model)
    images = torch.randn(2, 3, 96, 130)
    with torch.no_grad():
        fused = model(images)
        found = []
        for detector in (model, stock):
            with detr_fast.capture_attention(detector) as maps:
                outputs = detector(images)
            torch.testing.assert_close(outputs, fused, rtol=0, atol=1e-5)
            found.append((maps.encoder, maps.decoder_self, maps.decoder))
        with detr_fast.capture_attention(model.transformer, average_heads=False) as heads:
            model(images)
            model(images)  # the last call's are kept
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    assert [tuple(x.shape) for layers in found[0] for x in layers] == [(2, 15, 15)] * 2 + [(2, 7, 7)] * 2 + [
        (2, 7, 15)
    ] * 2
    assert [x.shape for x in heads.encoder] == [(2, 4, 15, 15)] * 2
    torch.testing.assert_close(heads.queries(0).mean(1), found[0][2][0].view(2, 7, 3, 5))
    torch.testing.assert_close(heads.pixels().mean(1), found[0][0][1].view(2, 3, 5, 3, 5))
    assert all(not layer.self_attn._forward_hooks for layer in model.transformer.encoder.layers)


def test_a_map_is_drawn_where_its_weights_are():
    maps = AttentionMaps()
    maps.size, maps.mask = (2, 4), torch.tensor([[[False, False, False, True]] * 2])
    maps.decoder = [torch.zeros(1, 3, 8)]
    maps.decoder[0][0, 1, 2] = 0.9  # top right of what is no padding
    maps.encoder = [torch.zeros(1, 8, 8)]
    maps.encoder[0][0, 6, 4] = 0.4  # from the bottom right to the bottom left
    image = Image.new("RGB", (120, 80), (40, 40, 40))
    for options, (x, y) in ((dict(query=1), (110, 10)), (dict(point=(1.0, 1.0)), (10, 70))):
        picture = maps.picture(image, **options)
        assert picture.size == image.size
        yellow = np.asarray(picture)[..., 0].astype(int) - np.asarray(picture)[..., 2]
        assert yellow[y, x] > 200 and yellow[79 - y, 119 - x] == 0
    assert np.array_equal(np.asarray(maps.picture(image, query=0)), np.asarray(image))  # no weight at all


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "got query None and point None; expected one of them"),
        (dict(query=7), "query is 7; expected 0 to 2"),
        (dict(point=(1.5, 0)), r"point is \(1.5, 0\); expected x and y in 0..1"),
        (dict(query=0, layer=2), "layer is 2; expected 0 to 0"),
        (dict(query=0, index=1), "index is 1; expected an image of the batch, 0 to 0"),
    ],
)
def test_picture_rejects(options, message):
    maps = AttentionMaps()
    with pytest.raises(ValueError, match="no attention was captured"):
        maps.picture(Image.new("RGB", (4, 4)), query=0)
    maps.size, maps.decoder, maps.encoder = (1, 2), [torch.rand(1, 3, 2)], [torch.rand(1, 2, 2)]
    with pytest.raises(ValueError, match=message):
        maps.picture(Image.new("RGB", (4, 4)), **options)


def test_capture_attention_rejects_what_has_not_one_transformer():
    with pytest.raises(TypeError, match="model is a str; expected a detector"):
        with detr_fast.capture_attention("detr"):
            pass
    with pytest.raises(ValueError, match="Linear has 0 transformers"):
        with detr_fast.capture_attention(nn.Linear(1, 1)):
            pass


class VendoredNestedTensor:
    """What other code carries a copy of: the same attributes, no `non_blocking`, no `record_stream`."""

    def __init__(self, tensors, mask):
        self.tensors, self.mask = tensors, mask

    def to(self, device):
        return VendoredNestedTensor(self.tensors.to(device), self.mask.to(device))

    def decompose(self):
        return self.tensors, self.mask


def test_a_vendored_nested_tensor_is_taken():
    from detr_fast.data.prefetch import Prefetcher

    model = make_detr()
    ours = NestedTensor(torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool))
    ours.mask[1, 33:] = True
    theirs = VendoredNestedTensor(*ours.decompose())
    with torch.no_grad():
        expected = model(ours)
        for samples in (theirs, *Prefetcher([theirs], torch.device("cpu"))):
            torch.testing.assert_close(model(samples), expected, rtol=0, atol=0)


def test_set_aux_loss_is_the_originals():
    model = make_detr(aux_loss=True)
    logits, boxes = torch.randn(3, 2, 7, 6), torch.rand(3, 2, 7, 4)
    layers = model._set_aux_loss(logits, boxes)
    assert len(layers) == 2 and all(sorted(layer) == ["pred_boxes", "pred_logits"] for layer in layers)
    for i, layer in enumerate(layers):
        assert torch.equal(layer["pred_logits"], logits[i]) and torch.equal(layer["pred_boxes"], boxes[i])
    # A subclass that overrides it is asked.
    model._set_aux_loss = lambda outputs_class, outputs_coord: len(outputs_class)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64))["aux_outputs"] == 2
