"""Attention's dropout mask in plain PyTorch: the bytes and their order are described in `detr_fast.ops.attention`."""

import torch

_ROUNDS = 7
_A, _B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW_32 = 0xFFFFFFFF


def philox(seed, c0, c1, c2, c3):
    """Philox 4x32 in int64 arithmetic: four words of which the low 32 bits count (Salmon et al. 2011).

    Args:
        seed: [1] int64, the key.
        c0, c1, c2, c3: the counter's words, int64 in 0..2**32 - 1, shapes that broadcast.
    """
    k0, k1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    for _ in range(_ROUNDS):
        # A product wraps at 64 bits, which keeps its bits. What stands above a word's low 32 goes at its next use.
        product_0, product_2 = c0 * _A, c2 * _B
        c0, c2 = ((product_2 >> 32) ^ c1 ^ k0) & _LOW_32, ((product_0 >> 32) ^ c3 ^ k1) & _LOW_32
        c1, c3 = product_2, product_0
        k0, k1 = (k0 + _KEY_A) & _LOW_32, (k1 + _KEY_B) & _LOW_32
    return c0, c1, c2, c3


def dropout_bytes(seed: torch.Tensor, slices: torch.Tensor, rows: torch.Tensor, k_len: int) -> torch.Tensor:
    """[slices, rows, k_len] uint8: the byte of every element; dropout drops those below its threshold.

    Args:
        seed: [1] int64.
        slices: [slices] int64, batch · heads + head.
        rows: [rows] int64, positions of the queries.
        k_len: number of keys.
    """
    blocks = (k_len + 63) // 64
    groups = torch.arange(4 * blocks, device=seed.device)
    words = philox(seed, rows[:, None], groups, slices[:, None, None], torch.zeros_like(seed))
    shape = (len(slices), len(rows), blocks)
    # A word's halves are the pairs of columns 16 w + 2 g and 16 w + 8 + 2 g (word w of group g) within 64.
    pairs = torch.empty((*shape, 4, 2, 4), dtype=torch.int16, device=seed.device)  # [..., word, half, group]
    for w, word in enumerate(words):
        halves = word.to(torch.int32).expand(*shape[:2], 4 * blocks).contiguous().view(torch.int16)
        pairs[..., w, :, :] = halves.view(*shape, 4, 2).transpose(-1, -2)
    return pairs.view(torch.uint8).view(*shape[:2], 64 * blocks)[..., :k_len]
