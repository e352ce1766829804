"""Attention's dropout mask in plain PyTorch: the bytes and their order are described in `detr_fast.ops.attention`."""

import torch

_ROUNDS = 7
_A, _B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW_32 = 0xFFFFFFFF
# Elements up to which a CPU computes in NumPy, whose calls cost a third, and with one thread.
_SMALL = 2**18


def philox(keys, c0, c1, c2, c3):
    """Philox 4x32 in int64 arithmetic: four words of which the low 32 bits count (Salmon et al. 2011).

    Args:
        keys: `round_keys`.
        c0, c1, c2, c3: the counter's words, int64 tensors or arrays in 0..2**32 - 1, shapes that broadcast.
    """
    for i, (k0, k1) in enumerate(keys):
        # A product may wrap around in int64: its 64 bits are right all the same. c1 and c3 keep bits above their low
        # 32, which are masked off when the words become c0 and c2.
        product_0, product_2 = c0 * _A, c2 * _B
        c0, c2 = product_2 >> 32, product_0 >> 32
        if i < 3:  # the words' shapes still grow
            c0, c2 = c0 ^ c1, c2 ^ c3
        else:  # allocating would cost more than computing
            c0 ^= c1
            c2 ^= c3
        c0 ^= k0
        c0 &= _LOW_32
        c2 ^= k1
        c2 &= _LOW_32
        c1, c3 = product_2, product_0
    return c0, c1, c2, c3


def round_keys(seed: torch.Tensor) -> list[tuple]:
    """The two keys of each round: integers on a CPU, elsewhere tensors [1], since reading the seed would wait."""
    if seed.device.type == "cpu":
        value = seed.item()
        low, high = value & _LOW_32, value >> 32
        return [((low + _KEY_A * i) & _LOW_32, (high + _KEY_B * i) & _LOW_32) for i in range(_ROUNDS)]
    rounds = torch.arange(_ROUNDS, device=seed.device)
    low, high = (seed & _LOW_32) + _KEY_A * rounds, (seed >> 32) + _KEY_B * rounds
    return list(zip((low & _LOW_32).split(1), (high & _LOW_32).split(1), strict=True))


def dropout_bytes(seed: torch.Tensor, slices: torch.Tensor, rows: torch.Tensor, k_len: int) -> torch.Tensor:
    """[slices, rows, k_len] uint8: the byte of every element; dropout drops those below its threshold.

    Args:
        seed: [1] int64.
        slices: [slices] int64, batch · heads + head.
        rows: [rows] int64, positions of the queries.
        k_len: number of keys.
    """
    blocks = (k_len + 63) // 64
    size = (len(slices), len(rows), blocks)
    keys, groups, zero = round_keys(seed), torch.arange(4 * blocks, device=seed.device), torch.zeros_like(seed)
    drawn = torch.empty(*size, 8, 4, dtype=torch.int16, device=seed.device)
    target = drawn
    if seed.device.type == "cpu" and drawn.numel() <= _SMALL:
        slices, rows, groups, zero, target = (x.numpy() for x in (slices, rows, groups, zero, drawn))
    counter = (rows[:, None], groups, slices[:, None, None], zero)
    # Within 64 columns, 16 bits of word w of group g are the columns 16 w + 2 g (low half) or 16 w + 8 + 2 g (high) and
    # the next: the four groups' halves are next to each other.
    for i, word in enumerate(philox(keys, *counter)):
        target[:, :, :, 2 * i] = word.reshape(*size, 4)
        target[:, :, :, 2 * i + 1] = word.reshape(*size, 4) >> 16
    return drawn.view(*size[:2], 32 * blocks).view(torch.uint8)[..., :k_len]
