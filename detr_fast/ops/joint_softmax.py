"""`joint_softmax`: softmax over heads and keys together, with padded keys left out."""

import torch

from detr_fast.ops._dispatch import refuse_transforms, use_kernel


def joint_softmax(scores: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax of each query's scores over all heads and keys at once: a query's weights sum to 1 over both.

    Args:
        scores: [B, Q, H, L], any strides; float32, bfloat16 and float16 are computed in float32, float64 in float64
            (in plain PyTorch on every device).
        key_padding_mask: [B, L] bool, True = padding: these keys get weight 0. None: there is no padding.

    Returns:
        Weights [B, Q, H, L], contiguous, in the scores' dtype. A query whose keys are all padded gets zeros, and its
        scores a gradient of zeros.

    Raises:
        TypeError: `scores` is not floating point, `key_padding_mask` not bool.
        ValueError: a shape does not fit, or the two are on different devices.
        NotImplementedError: inside `torch.vmap` or `torch.func`'s transforms, or with forward-mode tangents.

    Source: facebookresearch/detr `models/segmentation.py` (MHAttentionMap).
    """
    _check(scores, key_padding_mask)
    refuse_transforms("joint_softmax", scores)
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.contiguous()
    return _joint_softmax(scores, key_padding_mask)


def joint_softmax_reference(scores: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """`joint_softmax` in plain PyTorch: same arguments, result and errors."""
    _check(scores, key_padding_mask)
    if scores.numel() == 0:
        return scores.clone(memory_format=torch.contiguous_format)
    x = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if key_padding_mask is not None:
        x = x.masked_fill(key_padding_mask[:, None, None], -torch.inf)
    x = x.flatten(2)
    no_key = (x == -torch.inf).all(dim=-1, keepdim=True)
    weights = x.masked_fill(no_key, 0).softmax(dim=-1).masked_fill(no_key, 0)
    return weights.view(scores.shape).to(scores.dtype)


def _check(scores, key_padding_mask) -> None:
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        raise TypeError(f"scores is {getattr(scores, 'dtype', type(scores).__name__)}; expected floating point")
    if scores.dim() != 4:
        raise ValueError(f"scores has shape {list(scores.shape)}; expected [B, Q, H, L]")
    if key_padding_mask is None:
        return
    if not isinstance(key_padding_mask, torch.Tensor) or key_padding_mask.dtype != torch.bool:
        got = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
        raise TypeError(f"key_padding_mask is {got}; expected bool, True = padding")
    if key_padding_mask.dim() != 2 or key_padding_mask.shape != (scores.shape[0], scores.shape[3]):
        raise ValueError(
            f"key_padding_mask has shape {list(key_padding_mask.shape)}; expected [B, L], here "
            f"[{scores.shape[0]}, {scores.shape[3]}]"
        )
    if key_padding_mask.device != scores.device:
        raise ValueError(f"key_padding_mask is on {key_padding_mask.device}, scores on {scores.device}")


def _on_kernel(scores: torch.Tensor) -> bool:
    return use_kernel(scores.device, "joint_softmax") and scores.dtype != torch.float64


def _empty_like(scores: torch.Tensor) -> torch.Tensor:
    """[B, Q, H, L], contiguous whatever the strides of `scores`."""
    return torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)


@torch.library.custom_op("detr_fast::joint_softmax", mutates_args=())
def _joint_softmax(scores: torch.Tensor, key_padding_mask: torch.Tensor | None) -> torch.Tensor:
    if not _on_kernel(scores):
        return joint_softmax_reference(scores, key_padding_mask)
    from detr_fast.kernels.joint_softmax import joint_softmax_forward

    weights = _empty_like(scores)
    joint_softmax_forward(scores, key_padding_mask, weights=weights)
    return weights


@_joint_softmax.register_fake
def _joint_softmax_fake(scores, key_padding_mask):
    return _empty_like(scores)


@torch.library.custom_op("detr_fast::joint_softmax_backward", mutates_args=())
def _joint_softmax_backward(grad: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    grad_scores = _empty_like(weights)
    if _on_kernel(weights):
        from detr_fast.kernels.joint_softmax import joint_softmax_backward

        joint_softmax_backward(grad, weights, grad_scores=grad_scores)
    else:
        dtype = torch.promote_types(weights.dtype, torch.float32)
        grad, weights = grad.to(dtype), weights.to(dtype)
        dot = (grad * weights).sum(dim=(2, 3), keepdim=True)
        grad_scores.copy_(weights * (grad - dot))
    return grad_scores


@_joint_softmax_backward.register_fake
def _joint_softmax_backward_fake(grad, weights):
    return _empty_like(weights)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output)


def _backward(ctx, grad):
    return _joint_softmax_backward(grad, ctx.saved_tensors[0]), None


_joint_softmax.register_autograd(_backward, setup_context=_setup_context)


@_joint_softmax.register_vmap
def _joint_softmax_vmap(info, in_dims, *args):
    raise NotImplementedError("joint_softmax has no vmap rule; fold the mapped dimension into the batch")
