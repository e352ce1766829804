"""Masks and panoptic pictures from logits, against small cases by hand and the original's steps retyped."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from detr_fast.criterion import PostProcessPanoptic, PostProcessSegm, id2rgb, rgb2id

IMAGE_SIZES = [(1, 1), (1, 40), (37, 1), (64, 96), (33, 65)]


def test_ids_and_colours():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 131844, 256**3 - 1]])
    colours = id2rgb(ids)
    assert colours.dtype == np.uint8 and colours.shape == (2, 4, 3)
    assert colours[0].tolist() == [[0, 0, 0], [1, 0, 0], [255, 0, 0], [0, 1, 0]]
    assert colours[1].tolist() == [[255, 255, 0], [0, 0, 1], [4, 3, 2], [255, 255, 255]]
    assert (rgb2id(colours) == ids).all() and rgb2id([[10, 20, 30]]) == 10 + 20 * 256 + 30 * 65536
    assert id2rgb(np.zeros((0, 3), dtype=np.int32)).shape == (0, 3, 3)
    for wrong in (-1, 256**3):
        with pytest.raises(ValueError, match=r"must be in 0..16777215"):
            id2rgb(np.array([wrong]))
    with pytest.raises(TypeError, match="float64"):
        id2rgb(np.array([1.0]))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        rgb2id(np.zeros((2, 2), dtype=np.uint8))


def results_of(batch):
    return [{"scores": torch.ones(1)} for _ in range(batch)]


def test_segm_by_hand():
    # One row of two cells, 4 pixels wide when resized: the boundary lies in the middle.
    outputs = {"pred_masks": torch.tensor([[[[8.0, -8.0]]]])}
    (result,) = PostProcessSegm()(results_of(1), outputs, torch.tensor([[2, 8]]), torch.tensor([[1, 4]]))
    assert result["masks"].dtype == torch.uint8
    assert result["masks"].tolist() == [[[[1, 1, 1, 1, 0, 0, 0, 0]] * 2]] and "scores" in result
    # With padding on the right only the left half of the batch is the image.
    outputs = {"pred_masks": outputs["pred_masks"].repeat(2, 1, 1, 1)}
    results = PostProcessSegm()(results_of(2), outputs, torch.tensor([[1, 2], [1, 4]]), torch.tensor([[1, 2], [1, 4]]))
    assert results[0]["masks"].tolist() == [[[[1, 1]]]] and results[1]["masks"].tolist() == [[[[1, 1, 0, 0]]]]


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_segm_matches_plain_steps_for_every_image_size(threshold):
    logits = torch.randn(len(IMAGE_SIZES), 3, 9, 11) * 3
    originals = torch.tensor([(h * 2 + 1, w + 3) for h, w in IMAGE_SIZES])
    sizes = torch.tensor(IMAGE_SIZES)
    results = PostProcessSegm(threshold)(results_of(5), {"pred_masks": logits[:, :, None]}, originals, sizes)
    full = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False).sigmoid() > threshold
    for mask, result, (h, w), (out_h, out_w) in zip(full, results, IMAGE_SIZES, originals.tolist(), strict=True):
        expected = torch.empty(3, out_h, out_w, dtype=torch.uint8)
        for y in range(out_h):
            for x in range(out_w):
                expected[:, y, x] = mask[:, min(int(y * (h / out_h)), h - 1), min(int(x * (w / out_w)), w - 1)]
        assert torch.equal(result["masks"][:, 0], expected)


def test_segm_rejects_what_does_not_fit():
    outputs = {"pred_masks": torch.zeros(2, 3, 4, 4)}
    size = torch.tensor([[4, 4]])
    for results, given, sizes, message in (
        (results_of(2), {"pred_boxes": 0}, size.repeat(2, 1), "lack the key 'pred_masks'"),
        (results_of(2), outputs, size, "sizes of as many images"),
        (results_of(1), outputs, size.repeat(2, 1), "sizes of as many images"),
        (results_of(2), {"pred_masks": torch.zeros(2, 3, 4)}, size.repeat(2, 1), r"shape \(2, 3, 4\)"),
        (results_of(2), outputs, torch.zeros(2, 2), "positive height and width"),
    ):
        with pytest.raises(ValueError, match=message):
            PostProcessSegm()(results, given, sizes, sizes)


THINGS = {0: True, 1: True, 2: False, 3: False}


def outputs_of(classes, masks, score=20.0):
    """One image whose queries are sure of `classes` (4: no object)."""
    logits = torch.zeros(1, len(classes), 5)
    for i, label in enumerate(classes):
        logits[0, i, label] = score
    masks = torch.as_tensor(masks, dtype=torch.float32)[None]
    return {"pred_logits": logits, "pred_masks": masks, "pred_boxes": torch.zeros(1, len(classes), 4)}


def picture(prediction):
    return rgb2id(np.asarray(Image.open(io.BytesIO(prediction["png_string"]))))


def halves(*columns, size=6):
    """Masks of a 6x6 picture: +9 in some columns, -9 elsewhere."""
    masks = torch.full((len(columns), size, size), -9.0)
    for i, (first, last) in enumerate(columns):
        masks[i, :, first:last] = 9
    return masks


def test_panoptic_by_hand():
    # Two things of one class stay apart; the two pieces of stuff become one; no-object takes no part.
    masks = halves((0, 1), (1, 2), (2, 4), (4, 6), (0, 6))
    (prediction,) = PostProcessPanoptic(THINGS)(outputs_of([1, 1, 2, 3, 4], masks), [(6, 6)])
    assert (picture(prediction) == np.array([0, 1, 2, 2, 3, 3])).all()
    assert prediction["segments_info"] == [
        {"id": 0, "isthing": True, "category_id": 1, "area": 6},
        {"id": 1, "isthing": True, "category_id": 1, "area": 6},
        {"id": 2, "isthing": False, "category_id": 2, "area": 12},
        {"id": 3, "isthing": False, "category_id": 3, "area": 12},
    ]


def test_panoptic_merges_stuff_of_one_class():
    masks = halves((0, 3), (3, 6))
    masks[1, 0] = masks[0, 0] = -1  # a row that is nobody's by much; both belong to one segment anyway
    (prediction,) = PostProcessPanoptic(THINGS)(outputs_of([2, 2], masks), [(6, 6)])
    assert prediction["segments_info"] == [{"id": 0, "isthing": False, "category_id": 2, "area": 36}]
    assert (picture(prediction) == 0).all()
    # Things with the same masks are two segments.
    (prediction,) = PostProcessPanoptic(THINGS)(outputs_of([1, 1], masks), [(6, 6)])
    assert [s["area"] for s in prediction["segments_info"]] == [21, 15]


def test_panoptic_removes_small_segments_until_none_is_left():
    masks = torch.full((3, 6, 6), -9.0)
    masks[0] = 0
    masks[1, 0, :4] = 5  # 4 pixels: removed
    masks[2, 0, 3:6] = 9  # 3 pixels: removed
    masks[1, 5, :1] = 8
    (prediction,) = PostProcessPanoptic(THINGS)(outputs_of([0, 1, 1], masks), [(6, 6)])
    # At first query 1 has 3 + 1 pixels and query 2 has 3; both go at once.
    assert prediction["segments_info"] == [{"id": 0, "isthing": True, "category_id": 0, "area": 36}]
    # Alone with its 4 pixels a query goes as well, and nothing is left.
    (prediction,) = PostProcessPanoptic(THINGS)(outputs_of([0], torch.zeros(1, 2, 2)), [(2, 2)])
    assert prediction["segments_info"] == [] and (picture(prediction) == 0).all()


@pytest.mark.parametrize("classes, score", [([4, 4], 20.0), ([0, 1], 0.1)], ids=["no object", "below threshold"])
def test_panoptic_without_segments(classes, score):
    (prediction,) = PostProcessPanoptic(THINGS)(outputs_of(classes, halves((0, 3), (3, 6)), score), [(6, 6)], [(5, 9)])
    assert prediction["segments_info"] == [] and picture(prediction).shape == (5, 9)
    assert (picture(prediction) == 0).all()


def plain_panoptic(outputs, b, size, target, things, threshold):
    """The steps one after another, pixel by pixel: (ids [H, W], classes, areas)."""
    probabilities = outputs["pred_logits"][b].softmax(-1)
    used = [q for q, p in enumerate(probabilities) if int(p.argmax()) != len(p) - 1 and float(p.max()) > threshold]
    classes = [int(probabilities[q].argmax()) for q in used]
    masks = F.interpolate(outputs["pred_masks"][b][used][:, None], size=size, mode="bilinear", align_corners=False)[
        :, 0
    ]
    merge = True
    while True:
        ids = np.zeros(target, dtype=int)
        for y in range(target[0]):
            for x in range(target[1]):
                if classes:
                    source_y = min(int((y + 0.5) * size[0] / target[0]), size[0] - 1)
                    source_x = min(int((x + 0.5) * size[1] / target[1]), size[1] - 1)
                    k = int(masks[:, source_y, source_x].softmax(0).argmax())
                    if merge and not things[classes[k]]:
                        k = classes.index(classes[k])
                    ids[y, x] = k
        areas = [int((ids == k).sum()) for k in range(len(classes))]
        stay = [k for k, area in enumerate(areas) if area > 4]
        if len(stay) == len(classes):
            return ids, classes, areas
        classes, masks, merge = [classes[k] for k in stay], masks[stay], False


def test_panoptic_matches_plain_steps_for_every_image_size():
    torch.manual_seed(1)
    outputs = {
        "pred_logits": torch.randn(5, 8, 5) * 3,
        "pred_masks": F.interpolate(torch.randn(5, 8, 3, 4) * 6, size=(9, 11), mode="bicubic"),
        "pred_boxes": torch.rand(5, 8, 4),
    }
    sizes = [(2, 2), (1, 40), (37, 1), (24, 36), (33, 15)]
    targets = [(4, 4), (2, 48), (38, 2), (16, 20), (16, 28)]  # no pixel's centre lies between two source pixels
    predictions = PostProcessPanoptic(THINGS, 0.4)(outputs, torch.tensor(sizes), [torch.tensor(t) for t in targets])
    count = 0
    for b, prediction in enumerate(predictions):
        ids, classes, areas = plain_panoptic(outputs, b, sizes[b], targets[b], THINGS, 0.4)
        assert (picture(prediction) == ids).all()
        assert prediction["segments_info"] == [
            {"id": i, "isthing": THINGS[c], "category_id": c, "area": a}
            for i, (c, a) in enumerate(zip(classes, areas, strict=True))
        ]
        count += len(classes)
    assert count > 8


def test_panoptic_cuts_the_image_out_of_a_padded_batch():
    masks = halves((0, 3), (3, 6))
    outputs = outputs_of([0, 1], masks)
    (prediction,) = PostProcessPanoptic(THINGS)(outputs, [(6, 4)], padded_size=(6, 6))
    assert (picture(prediction) == np.array([0, 0, 0, 1])).all()
    (prediction,) = PostProcessPanoptic(THINGS)(outputs, [(6, 4)])  # as the original: squeezed
    assert (picture(prediction) == np.array([0, 0, 1, 1])).all()


def test_panoptic_rejects_what_does_not_fit():
    outputs = outputs_of([0, 1], halves((0, 3), (3, 6)))
    with pytest.raises(ValueError, match="class 1 is predicted but is_thing_map"):
        PostProcessPanoptic({0: True})(outputs, [(6, 6)])
    with pytest.raises(ValueError, match="sizes of as many images"):
        PostProcessPanoptic(THINGS)(outputs, [(6, 6), (6, 6)])
    del outputs["pred_masks"]
    with pytest.raises(ValueError, match="lack the key 'pred_masks'"):
        PostProcessPanoptic(THINGS)(outputs, [(6, 6)])
