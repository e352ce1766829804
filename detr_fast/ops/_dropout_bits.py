"""Attention's dropout mask in plain PyTorch: the bytes and their order are described in `detr_fast.ops.attention`."""

import functools

import numpy as np
import torch

_ROUNDS = 7
_A, _B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW_32 = 0xFFFFFFFF
# Elements up to which a CPU computes in NumPy, whose calls cost a third, and with one thread.
_SMALL = 2**18
_MULTIPLIERS = np.array([[_A], [_B]], dtype=np.uint64)
_KEY_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None] * np.array([_KEY_A, _KEY_B], dtype=np.uint64)


def philox(keys, c0, c1, c2, c3):
    """Philox 4x32 in int64 arithmetic: four words of which the low 32 bits count (Salmon et al. 2011).

    Args:
        keys: `round_keys`.
        c0, c1, c2, c3: the counter's words, int64 tensors in 0..2**32 - 1, shapes that broadcast.
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


def dropout_bytes(seed: torch.Tensor, slices: range, rows: range | torch.Tensor, k_len: int) -> torch.Tensor:
    """[slices, rows, k_len] uint8: the byte of every element; dropout drops those below its threshold.

    Args:
        seed: [1] int64.
        slices: batch · heads + head.
        rows: positions of the queries; [rows] int64 if it is a tensor.
        k_len: number of keys.
    """
    blocks = (k_len + 63) // 64
    size = (len(slices), len(rows), blocks)
    is_small = seed.device.type == "cpu" and len(slices) * len(rows) * blocks * 32 <= _SMALL
    drawn = (_drawn_by_numpy if is_small else _drawn)(seed, slices, rows, blocks)
    return drawn.view(*size[:2], 64 * blocks)[..., :k_len]


# Within 64 columns, 16 bits of word w of group g are the columns 16 w + 2 g (low half) or 16 w + 8 + 2 g (high) and the
# next: the four groups' halves are next to each other.


def _drawn(seed, slices, rows, blocks: int) -> torch.Tensor:
    """The bytes of all columns of `blocks` blocks of 64."""
    device = seed.device
    rows = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, range) else rows
    slices = torch.arange(slices.start, slices.stop, device=device)
    counter = (rows[:, None], torch.arange(4 * blocks, device=device), slices[:, None, None], torch.zeros_like(seed))
    size = (len(slices), len(rows), blocks)
    drawn = torch.empty(*size, 8, 4, dtype=torch.int16, device=device)
    for i, word in enumerate(philox(round_keys(seed), *counter)):
        drawn[:, :, :, 2 * i] = word.reshape(*size, 4)
        drawn[:, :, :, 2 * i + 1] = word.reshape(*size, 4) >> 16
    return drawn.view(torch.uint8)


def _drawn_by_numpy(seed, slices, rows, blocks: int) -> torch.Tensor:
    """`_drawn` in a third of the calls: words c0 and c2 are one array, c1 and c3 another, and halves are views."""
    value = seed.item()
    keys = np.array((value & _LOW_32, value >> 32 & _LOW_32), dtype=np.uint64) + _KEY_STEPS
    keys = keys.astype(np.uint32)[..., None]
    counters = (_remembered_counters if isinstance(rows, range) else _counters)(slices, rows, blocks)
    words = np.empty_like(counters)
    even, odd = counters[:2], counters[2:]
    products = np.empty((2, *even.shape), np.uint64)  # of this round, and of the last one, where `odd` is
    low_high = products.view(np.uint32).reshape(2, *even.shape, 2)[:, ::-1]
    for i, key in enumerate(keys):
        np.multiply(even, _MULTIPLIERS, out=products[i % 2])
        even = np.bitwise_xor(low_high[i % 2, ..., 1], odd, out=words[:2])
        even ^= key
        odd = low_high[i % 2, ..., 0]
    words[2:] = odd
    low = words.astype(np.uint16).view(np.uint64)  # of a word's four groups
    words >>= 16
    high = words.astype(np.uint16).view(np.uint64)
    drawn = np.empty((low.shape[1], 4, 2), np.uint64)
    for i, word in enumerate((0, 2, 1, 3)):  # c0, c1, c2, c3; one by one, as numpy copies long rows fast
        drawn[:, i, 0], drawn[:, i, 1] = low[word], high[word]
    return torch.from_numpy(drawn.view(np.uint8))


def _counters(slices: range, rows: range | torch.Tensor, blocks: int) -> np.ndarray:
    """[4, slices · rows · groups] uint32: c0, c2, c1 and c3."""
    words = np.zeros((4, len(slices), len(rows), 4 * blocks), np.uint32)
    words[0] = (np.arange(rows.start, rows.stop) if isinstance(rows, range) else rows.numpy())[:, None]
    words[1] = np.arange(slices.start, slices.stop)[:, None, None]
    words[2] = np.arange(4 * blocks)
    return words.reshape(4, -1)


_remembered_counters = functools.lru_cache(maxsize=8)(_counters)  # of half a megabyte at most
