"""Line segments [N, 4], x1, y1, x2, y2, under the augmentations of an image.

The left end comes first; of a vertical line the upper one.

Source: mlpc-ucsd/LETR, src/datasets/transforms.py and helper/wireframe.py. There a horizontal flip leaves a vertical
line with its lower end first, and what a crop leaves of a line can lie outside the image; here neither happens.
"""

import torch
from torch import Tensor


def ordered_ends(lines: Tensor) -> Tensor:
    """The same lines, left end first, of a vertical line the upper one."""
    x1, y1, x2, y2 = lines.unbind(dim=1)
    swap = (x1 > x2) | ((x1 == x2) & (y1 > y2))
    return torch.where(swap[:, None], lines[:, [2, 3, 0, 1]], lines)


def hflip_lines(lines: Tensor, width: int) -> Tensor:
    """Mirrors left and right."""
    return ordered_ends(lines * lines.new_tensor([-1, 1, -1, 1]) + lines.new_tensor([width, 0, width, 0]))


def vflip_lines(lines: Tensor, height: int) -> Tensor:
    """Mirrors top and bottom."""
    return ordered_ends(lines * lines.new_tensor([1, -1, 1, -1]) + lines.new_tensor([0, height, 0, height]))


def crop_lines(lines: Tensor, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Moves lines into a region and cuts off what is outside.

    Returns:
        Lines [N, 4], and [N] bool: False where nothing is left, whose line means nothing. A line that touches the
        region in one point is gone; one that was a point and is inside stays.

    Source: Liang and Barsky 1984, "A New Concept and Method for Line Clipping".
    """
    lines = lines - lines.new_tensor([left, top, left, top])
    start = lines[:, None, :2]  # [N, 1, 2]
    step = lines[:, None, 2:] - start
    # Of each line and axis the part 0..1 that is inside; where it does not move along the axis, all or nothing.
    sides = lines.new_tensor([[0, 0], [width, height]])
    at_sides = (sides - start) / step  # [N, 2, 2]
    still, inside = step == 0, (start >= 0) & (start <= sides[1])
    enter = torch.where(still, torch.where(inside, 0.0, 1.0), at_sides.amin(dim=1, keepdim=True))
    leave = torch.where(still, torch.where(inside, 1.0, 0.0), at_sides.amax(dim=1, keepdim=True))
    enter, leave = enter.amax(dim=2).clamp(min=0), leave.amin(dim=2).clamp(max=1)  # [N, 1]
    ends = torch.cat((start[:, 0] + enter * step[:, 0], start[:, 0] + leave * step[:, 0]), dim=1)
    ends = torch.min(ends.clamp(min=0), lines.new_tensor([width, height, width, height]))  # rounding
    return ends, (enter < leave)[:, 0]
