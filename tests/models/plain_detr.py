"""DETR once more, functional and from stock parts alone, to compare with. It reads a state dict of official names."""

import math

import torch
import torch.nn.functional as F
import torchvision


def plain_position(mask, num_pos_feats, temperature=10000.0):
    """mask [B, h, w] → [B, 2F, h, w], normalised to 0..2π, cell by cell as the formula reads."""
    batch, height, width = mask.shape
    pos = torch.zeros(batch, 2 * num_pos_feats, height, width)
    valid = (~mask).float()
    for axis, offset in ((1, 0), (2, num_pos_feats)):  # y features before x features
        count = valid.cumsum(axis)
        count = count / (count.narrow(axis, count.shape[axis] - 1, 1) + 1e-6) * 2 * math.pi
        for i in range(num_pos_feats):
            angle = count / temperature ** (2 * (i // 2) / num_pos_feats)
            pos[:, offset + i] = angle.cos() if i % 2 else angle.sin()
    return pos


def plain_features(state, name, images, dilation=False, level=3):
    """Feature map of a frozen-norm ResNet; `state` holds `backbone.0.body.*`."""
    resnet = getattr(torchvision.models, name)(
        weights=None,
        replace_stride_with_dilation=[False, False, dilation],
        norm_layer=lambda n: torchvision.ops.FrozenBatchNorm2d(n, eps=1e-5),
    )
    prefix = "backbone.0.body."
    body = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    missing, unexpected = resnet.load_state_dict(body, strict=False)
    assert not unexpected and all(key.startswith(("fc.", "layer4.", "layer3.", "layer2.")) for key in missing)
    resnet.to(images.dtype)
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))
    for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)[: level + 1]:
        x = stage(x)
    return x


def plain_transformer(state, src, mask, query_embed, pos, nhead, pre_norm=False, activation=F.relu):
    """hs [layers, B, Q, C] and memory [B, C, h, w]; `state` holds `encoder.*` and `decoder.*`. No dropout."""
    batch, features, height, width = src.shape

    def attend(name, q, k, v, key_padding_mask=None):
        return F.multi_head_attention_forward(
            q, k, v, features, nhead,
            state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"], None, None, False, 0.0,
            state[f"{name}.out_proj.weight"], state[f"{name}.out_proj.bias"],
            training=False, key_padding_mask=key_padding_mask, need_weights=False,
        )[0]  # fmt: skip

    def norm(name, x):
        return F.layer_norm(x, (features,), state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def layer(name, x, *sublayers):
        for i, sublayer in enumerate(sublayers, 1):
            if pre_norm:
                x = x + sublayer(norm(f"{name}.norm{i}", x))
            else:
                x = norm(f"{name}.norm{i}", x + sublayer(x))
        return x

    x = src.flatten(2).permute(2, 0, 1)
    pos = pos.flatten(2).permute(2, 0, 1)
    query = query_embed[:, None].repeat(1, batch, 1)
    padding = mask.flatten(1)
    i = 0
    while f"encoder.layers.{i}.norm1.weight" in state:
        name = f"encoder.layers.{i}"
        x = layer(
            name,
            x,
            lambda y: attend(f"{name}.self_attn", y + pos, y + pos, y, padding),  # noqa: B023
            lambda y: linear(f"{name}.linear2", activation(linear(f"{name}.linear1", y))),  # noqa: B023
        )
        i += 1
    memory = norm("encoder.norm", x) if pre_norm else x

    y, hs, i = torch.zeros_like(query), [], 0
    while f"decoder.layers.{i}.norm1.weight" in state:
        name = f"decoder.layers.{i}"
        y = layer(
            name,
            y,
            lambda z: attend(f"{name}.self_attn", z + query, z + query, z),  # noqa: B023
            lambda z: attend(f"{name}.multihead_attn", z + query, memory + pos, memory, padding),  # noqa: B023
            lambda z: linear(f"{name}.linear2", activation(linear(f"{name}.linear1", z))),  # noqa: B023
        )
        hs.append(norm("decoder.norm", y))
        i += 1
    return torch.stack(hs).transpose(1, 2), memory.permute(1, 2, 0).reshape(src.shape)


def plain_detr(state, images, backbone="resnet18", dilation=False, level=3, nhead=4, **transformer):
    """Logits and boxes [layers, B, Q, …] of images [3, H_i, W_i], padded here."""
    height, width = max(x.shape[1] for x in images), max(x.shape[2] for x in images)
    batch = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images])
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, x in enumerate(images):
        mask[i, : x.shape[1], : x.shape[2]] = False
    features = plain_features(state, backbone, batch, dilation, level)
    h, w = features.shape[-2:]
    rows = torch.tensor([int(y * (height / h)) for y in range(h)])
    columns = torch.tensor([int(x * (width / w)) for x in range(w)])
    mask = mask[:, rows][:, :, columns]
    src = F.conv2d(features, state["input_proj.weight"], state["input_proj.bias"])
    pos = plain_position(mask, src.shape[1] // 2).to(src.dtype)
    part = {key.removeprefix("transformer."): value for key, value in state.items()}
    hs = plain_transformer(part, src, mask, state["query_embed.weight"], pos, nhead, **transformer)[0]
    logits = F.linear(hs, state["class_embed.weight"], state["class_embed.bias"])
    for i in range(3):
        hs = F.linear(hs, state[f"bbox_embed.layers.{i}.weight"], state[f"bbox_embed.layers.{i}.bias"])
        hs = hs.relu() if i < 2 else hs.sigmoid()
    return logits, hs


def randomize_norms(model):
    """Gives the frozen norms of a backbone statistics that matter."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if value.dim() != 1 or ".body." not in name:
            continue
        noise = torch.rand(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + 1.5 * noise)
        elif name.endswith("weight"):
            value.copy_(0.2 + 0.6 * noise)
        else:
            value.copy_(0.4 * noise - 0.2)
