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
    rounds = torch.arange(_ROUNDS, device=seed.device)
    keys_0 = (((seed & _LOW_32) + _KEY_A * rounds) & _LOW_32).split(1)
    keys_1 = (((seed >> 32) + _KEY_B * rounds) & _LOW_32).split(1)
    for k0, k1 in zip(keys_0, keys_1, strict=True):
        # A product wraps at 64 bits, which keeps its bits. What stands above a word's low 32 goes at its next use.
        product_0, product_2 = c0 * _A, c2 * _B
        c0 = _xor(_xor(product_2 >> 32, c1), k0).bitwise_and_(_LOW_32)
        c2 = _xor(_xor(product_0 >> 32, c3), k1).bitwise_and_(_LOW_32)
        c1, c3 = product_2, product_0
    return c0, c1, c2, c3


def _xor(mine: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """mine ^ other, in the memory of `mine` where that is large enough: allocating costs more than computing."""
    return mine.bitwise_xor_(other) if other.shape in (mine.shape, (1,)) else mine ^ other


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
    # Within 64 columns, 16 bits of word w of group g are the columns 16 w + 2 g (low half) or 16 w + 8 + 2 g (high) and
    # the next: the four groups' halves next to each other are 64 bits of the result.
    size = (len(slices), len(rows), len(groups))
    halves = [part.to(torch.int16).expand(size).contiguous() for word in words for part in (word, word >> 16)]
    drawn = torch.stack([half.view(torch.int64) for half in halves], dim=-1).view(torch.uint8)
    return drawn.flatten(2)[..., :k_len]
