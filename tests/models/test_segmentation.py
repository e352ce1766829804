"""The mask head against the original's formula, retyped plainly: repeated features, concatenated, one by one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detr_fast.layers import PositionEmbeddingSine
from detr_fast.models import (
    DETR,
    Backbone,
    DETRsegm,
    Joiner,
    MaskHeadSmallConv,
    MHAttentionMap,
    Transformer,
    build_model,
)
from detr_fast.nested_tensor import nested_tensor_from_tensor_list
from tests.models.test_build import _args


def plain_head(head, x, bbox_mask, fpns):
    """[B * Q, 1, h, w], with every query's input written out."""
    batch, queries = bbox_mask.shape[:2]
    out = []
    for b in range(batch):
        for q in range(queries):
            y = torch.cat([x[b], bbox_mask[b, q]])[None]
            y = head.gn1(head.lay1(y)).relu()
            y = head.gn2(head.lay2(y)).relu()
            for i, fpn in enumerate(fpns, 1):
                level = getattr(head, f"adapter{i}")(fpn[b : b + 1])
                y = level + F.interpolate(y, size=level.shape[-2:], mode="nearest")
                y = getattr(head, f"gn{i + 2}")(getattr(head, f"lay{i + 2}")(y)).relu()
            out.append(head.out_lay(y))
    return torch.cat(out)


def plain_map(module, q, k, mask):
    """[B, Q, N, h, w], one query at a time, over unpadded cells."""
    heads, size = module.num_heads, k.shape[-2:]
    q = module.q_linear(q).unflatten(-1, (heads, -1)) * module.normalize_fact
    k = module.k_linear(k.flatten(2).transpose(1, 2)).unflatten(-1, (heads, -1))  # [B, L, N, c]
    out = torch.zeros(q.shape[0], q.shape[1], heads, size.numel(), dtype=q.dtype)
    for b in range(q.shape[0]):
        valid = ~mask[b].flatten()
        for i in range(q.shape[1]):
            scores = (k[b] * q[b, i]).sum(-1).T[:, valid]  # [N, valid cells]
            out[b, i][:, valid] = scores.flatten().softmax(0).view(scores.shape)
    return out.unflatten(-1, size)


def head_inputs(dtype=torch.float32, width=128, heads=8):
    x = torch.randn(2, width, 3, 5, dtype=dtype)
    bbox_mask = torch.rand(2, 3, heads, 3, 5, dtype=dtype) * 0.2
    fpns = [torch.randn(2, c, h, w, dtype=dtype) for c, h, w in ((24, 5, 9), (16, 10, 17), (8, 20, 33))]
    return x, bbox_mask, fpns


def make_head(width=128, heads=8):
    head = MaskHeadSmallConv(width + heads, [24, 16, 8], width)
    for parameter in head.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return head


def test_mask_head_matches_plain_version():
    head = make_head()
    x, bbox_mask, fpns = head_inputs()
    inputs = [x, bbox_mask, *fpns]
    plain_inputs = [t.clone().requires_grad_() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    out = head(inputs[0], inputs[1], inputs[2:])
    expected = plain_head(head, plain_inputs[0], plain_inputs[1], plain_inputs[2:])
    assert out.shape == (6, 1, 20, 33)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    cotangent = torch.randn(out.shape)
    parameters = list(head.parameters())
    grads = torch.autograd.grad(out, inputs + parameters, cotangent)
    plain_grads = torch.autograd.grad(expected, plain_inputs + parameters, cotangent)
    for grad, plain in zip(grads, plain_grads, strict=True):
        # A bias before a group norm has next to no gradient of its own: what is left are rounding errors.
        torch.testing.assert_close(grad, plain, rtol=1e-3, atol=1e-4 * max(1.0, float(plain.abs().max())))


def test_mask_head_never_repeats_the_features():
    """No convolution sees features or levels once per query."""
    head = make_head()
    seen = {}
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0].shape[0]}))
    x, bbox_mask, fpns = head_inputs()
    head(x, bbox_mask, fpns)
    assert {name: n for name, n in seen.items() if name.startswith("adapter")} == {f"adapter{i}": 2 for i in (1, 2, 3)}
    assert "lay1" not in seen  # its parts are applied apart

    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.cat.default, torch.ops.aten.repeat.default):
                largest.append(out.shape)
            return out

    with torch.no_grad(), Watch():
        head(x, bbox_mask, fpns)
    assert largest == [(2, 3, 1, 20, 33)]  # the masks themselves


def test_mask_head_without_gradients_gives_the_same():
    head = make_head()
    x, _, fpns = head_inputs()
    bbox_mask = torch.rand(2, 53, 8, 3, 5)  # three parts of at most 25 queries
    with torch.no_grad():
        out = head(x, bbox_mask, fpns)
    torch.testing.assert_close(out, head(x, bbox_mask, fpns), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[[0, 52, 53, 105]], plain_head(head, x, bbox_mask[:, [0, 52]], fpns))


def test_mask_head_double_agrees_with_single():
    head = make_head()
    x, bbox_mask, fpns = head_inputs()
    exact = copy.deepcopy(head).double()(x.double(), bbox_mask.double(), [f.double() for f in fpns])
    torch.testing.assert_close(head(x, bbox_mask, fpns).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_map_matches_plain_version(bias):
    module = MHAttentionMap(16, 32, 4, bias=bias)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    q, k = torch.randn(3, 5, 16), torch.randn(3, 16, 6, 7)
    mask = torch.rand(3, 6, 7) < 0.4
    weights = module(q, k, mask=mask)
    torch.testing.assert_close(weights, plain_map(module, q, k, mask), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights.flatten(2).sum(-1), torch.ones(3, 5))
    assert (weights.amax(dim=(3, 4)) > 0).all() and not torch.allclose(weights.sum(dim=(3, 4)), torch.tensor(0.25))
    unmasked = module(q, k)
    torch.testing.assert_close(unmasked, plain_map(module, q, k, torch.zeros_like(mask)), rtol=1e-5, atol=1e-7)


def test_attention_map_of_an_image_that_is_all_padding_is_zero():
    module = MHAttentionMap(16, 16, 4)
    k = torch.randn(2, 16, 4, 4, requires_grad=True)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1] = True
    weights = module(torch.randn(2, 3, 16), k, mask)
    (weights * torch.randn(weights.shape)).sum().backward()
    assert (weights[1] == 0).all() and (k.grad[1] == 0).all() and (k.grad[0] != 0).any()


def small_detr(level=None, aux_loss=False, norm="batch"):
    backbone = Backbone("resnet18", True, True, False, weights=None, norm=norm, level=level)
    transformer = Transformer(128, 8, 1, 2, 64, return_intermediate_dec=True)
    joiner = Joiner(backbone, PositionEmbeddingSine(64, normalize=True))
    return DETR(joiner, transformer, num_classes=5, num_queries=4, aux_loss=aux_loss)


@pytest.mark.parametrize("level, sizes", [(None, (2, 3)), (1, (8, 12))])
def test_detrsegm_matches_its_parts(level, sizes):
    model = DETRsegm(small_detr(level, aux_loss=True)).eval()
    images = [torch.randn(3, 64, 96), torch.randn(3, 50, 60)]
    samples = nested_tensor_from_tensor_list(images)
    with torch.no_grad():
        out = model(images)
        detr = model.detr
        expected = detr(images)
        features, positions = detr.backbone(samples)
        src, mask = features[-1].decompose()
        src = detr.input_proj(src)
        hs, memory = detr.transformer(src, mask, detr.query_embed.weight, positions[-1])
        maps = plain_map(model.bbox_attention, hs[-1], memory, mask)
        levels = [f.tensors for f in features[:-1]][::-1]
        levels += [levels[-1]] * (3 - len(levels))
        masks = plain_head(model.mask_head, src, maps, levels).view(2, 4, 16, 24)
    assert src.shape[-2:] == sizes
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(out[key], expected[key])
        torch.testing.assert_close(out["aux_outputs"][0][key], expected["aux_outputs"][0][key])
    torch.testing.assert_close(out["pred_masks"], masks, rtol=1e-4, atol=1e-5)


def test_masks_of_every_image_size():
    model = DETRsegm(small_detr()).eval()
    for height, width in ((32, 32), (33, 65), (70, 41)):
        with torch.no_grad():
            out = model([torch.randn(3, height, width)])
        assert out["pred_masks"].shape == (1, 4, -(-height // 4), -(-width // 4)) and out["pred_masks"].isfinite().all()


def test_freeze_detr_trains_the_mask_head_alone():
    model = DETRsegm(small_detr(), freeze_detr=True).train()
    before = {name: value.clone() for name, value in model.detr.state_dict().items()}
    out = model([torch.randn(3, 64, 64)])
    (out["pred_masks"] * torch.randn(out["pred_masks"].shape)).sum().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bbox_attention", "mask_head"}
    assert all(p.grad is not None for p in model.mask_head.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.detr.state_dict().items())
    assert not model.detr.backbone[0].body.bn1.training and model.mask_head.training
    assert DETRsegm(small_detr()).train().detr.backbone[0].body.bn1.training


def test_detrsegm_rejects_what_its_mask_head_does_not_fit():
    with pytest.raises(ValueError, match="return_interm_layers=True"):
        DETRsegm(small_detr(level=0))
    with pytest.raises(ValueError, match="multiple of 8"):
        MaskHeadSmallConv(128 + 4, [8, 8, 8], 128)
    with pytest.raises(ValueError, match="three levels"):
        MaskHeadSmallConv(136, [8, 8], 128)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        MHAttentionMap(16, 16, 3)


def test_build_model_with_masks():
    args = _args(masks=True, hidden_dim=128, nheads=8, mask_loss_coef=2, dice_loss_coef=3, aux_loss=False)
    model, criterion, postprocessors = build_model(args)
    assert isinstance(model, DETRsegm) and set(postprocessors) == {"bbox", "segm"}
    assert "masks" in criterion.losses and criterion.weight_dict["loss_mask"] == 2
    assert criterion.weight_dict["loss_dice"] == 3
    assert all(p.requires_grad for p in model.parameters())
    images = [torch.randn(3, 64, 80), torch.randn(3, 50, 64)]
    targets = [
        {
            "labels": torch.tensor([1]),
            "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]]),
            "masks": torch.zeros(1, 64, 80) > 0,
        },
        {"labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 50, 64) > 0},
    ]
    targets[0]["masks"][:, 20:40, 30:50] = True
    losses = criterion(model(images), targets)
    assert losses["loss_mask"] > 0 and losses["loss_dice"] > 0
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items()).backward()
    assert all(p.grad is not None for p in model.parameters())

    args = _args(masks=True, frozen_weights="x", hidden_dim=128, nheads=8, mask_loss_coef=1, dice_loss_coef=1)
    args.dataset_file, args.thing_classes, args.num_classes = "coco_panoptic", [1, 3], 5
    model, _, postprocessors = build_model(args)
    assert model.freeze_detr and not any(p.requires_grad for p in model.detr.parameters())
    assert postprocessors["panoptic"].is_thing_map == {0: False, 1: True, 2: False, 3: True, 4: False}
