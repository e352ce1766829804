"""Segment ids as colours, as COCO's panoptic PNG files hold them: id = red + 256 * green + 256² * blue.

Source: the COCO panoptic format (cocodataset.org, "Format data", section 4).
"""

import numpy as np

_LARGEST_ID = 256**3 - 1


def id2rgb(ids: np.ndarray) -> np.ndarray:
    """Colours of segment ids.

    Args:
        ids: [...] integers in 0..256³ - 1.

    Returns:
        uint8 [..., 3].

    Raises:
        TypeError: not integers. ValueError: an id outside the range.
    """
    ids = np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"segment ids must be integers, got {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() <= _LARGEST_ID:
        raise ValueError(f"segment ids must be in 0..{_LARGEST_ID}, got {ids.min()} to {ids.max()}")
    ids = ids.astype(np.int64)
    return np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)


def rgb2id(colours: np.ndarray) -> np.ndarray:
    """Segment ids of colours; the inverse of ``id2rgb``.

    Args:
        colours: [..., 3], integers in 0..255 (a fourth channel, or any further one, is ignored).

    Returns:
        int64 [...].

    Raises:
        ValueError: fewer than three channels.
    """
    colours = np.asarray(colours)
    if colours.ndim == 0 or colours.shape[-1] < 3:
        raise ValueError(f"expected colours [..., 3], got shape {colours.shape}")
    red, green, blue = (colours[..., i].astype(np.int64) for i in range(3))
    return red + 256 * green + 256**2 * blue
