"""Boxes against plain Python arithmetic, degenerate boxes, gradients."""

import itertools

import pytest
import torch

from detr_fast.criterion import (
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    masks_to_boxes,
    paired_generalized_box_iou,
)


def random_boxes(n, dtype=torch.float64):
    """[n, 4], x0, y0, x1, y1, some of them disjoint, some nested."""
    centre, size = torch.rand(n, 2, dtype=dtype), torch.rand(n, 2, dtype=dtype) * 0.6 + 0.01
    return torch.cat((centre - size / 2, centre + size / 2), dim=1)


def scalar_iou(a, b):
    """(IoU, union, generalised IoU) of two boxes, in plain Python."""
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return w * h / union, union, w * h / union - (hull - union) / hull


def test_box_formats_by_hand():
    centre = torch.tensor([[0.5, 0.4, 0.2, 0.6], [3.0, 5.0, 4.0, 0.0]])
    corners = torch.tensor([[0.4, 0.1, 0.6, 0.7], [1.0, 5.0, 5.0, 5.0]])
    torch.testing.assert_close(box_cxcywh_to_xyxy(centre), corners)
    torch.testing.assert_close(box_xyxy_to_cxcywh(corners), centre)
    assert box_cxcywh_to_xyxy(torch.rand(2, 3, 5, 4)).shape == (2, 3, 5, 4)


def test_box_xyxy_to_cxcywh_takes_integers():
    assert box_xyxy_to_cxcywh(torch.tensor([[1, 2, 4, 4]])).tolist() == [[2.5, 3.0, 3.0, 2.0]]


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0], [4.0, 0.0, 6.0, 2.0]])
    iou, union = box_iou(a, b)
    torch.testing.assert_close(iou, torch.tensor([[1 / 7, 1.0, 0.0]]))
    torch.testing.assert_close(union, torch.tensor([[7.0, 4.0, 8.0]]))
    torch.testing.assert_close(generalized_box_iou(a, b), torch.tensor([[1 / 7 - 2 / 9, 1.0, -4 / 12]]))


def test_iou_matches_plain_python():
    a, b = random_boxes(9), random_boxes(6)
    iou, union = box_iou(a, b)
    giou = generalized_box_iou(a, b)
    for i, j in itertools.product(range(9), range(6)):
        expected = torch.tensor(scalar_iou(a[i].tolist(), b[j].tolist()), dtype=torch.float64)
        torch.testing.assert_close(torch.stack((iou[i, j], union[i, j], giou[i, j])), expected)


def test_paired_giou_is_the_diagonal():
    a, b = random_boxes(50, torch.float32), random_boxes(50, torch.float32)
    assert torch.equal(paired_generalized_box_iou(a, b), generalized_box_iou(a, b).diagonal())


def test_paired_giou_gradcheck():
    a, b = random_boxes(8).requires_grad_(), random_boxes(8).requires_grad_()
    assert torch.autograd.gradcheck(paired_generalized_box_iou, (a, b))


@pytest.mark.parametrize(
    "a, b, giou",
    [
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], 0.0),  # the same point: 0 / 0 twice
        ([0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], 0.0),  # the same line
        ([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], -1.0),  # two points: no union in a hull of 1
        ([0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0], 0.0),  # a point within a box
    ],
    ids=["same-point", "same-line", "two-points", "point-in-box"],
)
def test_degenerate_boxes_stay_finite(a, b, giou):
    a, b = torch.tensor([a], requires_grad=True), torch.tensor([b], requires_grad=True)
    value = paired_generalized_box_iou(a, b)
    assert value.item() == giou
    assert torch.isfinite(box_iou(a, b)[0]).all()
    for gradient in torch.autograd.grad(value.sum() * 0.7, (a, b)):
        assert torch.isfinite(gradient).all() and gradient.abs().max() < 100


def test_no_boxes():
    none, some = torch.zeros(0, 4), random_boxes(3)
    assert generalized_box_iou(none, some.float()).shape == (0, 3)
    assert box_iou(some, none.double())[0].shape == (3, 0)
    assert paired_generalized_box_iou(none, none).shape == (0,)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4)])
def test_rejects_shapes(shape):
    with pytest.raises(ValueError, match=r"boxes2 must be \[N, 4\], got shape"):
        generalized_box_iou(torch.zeros(1, 4), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"boxes1 must be \[N, 4\], got shape"):
        box_iou(torch.zeros(shape), torch.zeros(1, 4))


def test_masks_to_boxes():
    masks = torch.zeros(3, 6, 9, dtype=torch.bool)
    masks[0, 2:5, 3:8] = True
    masks[1, 5, 0] = True
    expected = [[3, 2, 7, 4], [0, 5, 0, 5], [1e8, 1e8, 0, 0]]
    assert masks_to_boxes(masks).tolist() == expected
    assert masks_to_boxes(masks.float()).tolist() == expected
    assert masks_to_boxes(masks[:0]).shape == (0, 4)
    with pytest.raises(ValueError, match=r"masks must be \[N, H, W\]"):
        masks_to_boxes(masks[0])
