"""PostProcess by hand, and what it refuses."""

import math

import pytest
import torch

from detr_fast.criterion import PostProcess


def test_postprocess_by_hand():
    logits = torch.log(torch.tensor([[[0.1, 0.3, 0.6], [0.7, 0.2, 0.1]]]))  # no-object, last, wins the first query
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.2], [0.25, 0.5, 0.5, 1.0]]])
    [result] = PostProcess()({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]))
    assert set(result) == {"scores", "labels", "boxes"}
    torch.testing.assert_close(result["scores"], torch.tensor([0.3, 0.7]))
    assert result["labels"].tolist() == [1, 0]
    torch.testing.assert_close(result["boxes"], torch.tensor([[50.0, 40.0, 150.0, 60.0], [0.0, 0.0, 100.0, 100.0]]))


def test_postprocess_matches_plain_python():
    logits, boxes = torch.randn(2, 3, 5, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    sizes = [(480, 640), (333, 500)]
    results = PostProcess()({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor(sizes))
    assert len(results) == 2
    for b, (height, width) in enumerate(sizes):
        for q in range(3):
            exponentials = [math.exp(x) for x in logits[b, q].tolist()]
            best = max(range(4), key=lambda c: exponentials[c])
            cx, cy, w, h = boxes[b, q].tolist()
            assert results[b]["labels"][q].item() == best
            assert results[b]["scores"][q].item() == pytest.approx(exponentials[best] / sum(exponentials))
            assert results[b]["boxes"][q].tolist() == pytest.approx(
                [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
            )


def test_postprocess_is_float32_for_low_precision_and_has_no_gradient():
    outputs = {
        "pred_logits": torch.randn(1, 4, 3, dtype=torch.bfloat16, requires_grad=True),
        "pred_boxes": torch.rand(1, 4, 4, dtype=torch.bfloat16),
    }
    sizes = torch.tensor([[1333, 1201]])
    [result] = PostProcess()(outputs, sizes)
    [expected] = PostProcess()({k: v.float() for k, v in outputs.items()}, sizes)
    assert result["scores"].dtype == result["boxes"].dtype == torch.float32
    assert not result["scores"].requires_grad
    assert torch.equal(result["scores"], expected["scores"]) and torch.equal(result["boxes"], expected["boxes"])


@pytest.mark.parametrize(
    "sizes, error",
    [
        (torch.ones(1, 2), ValueError),
        (torch.ones(2, 3), ValueError),
        (torch.ones(2), ValueError),
        ([(1, 2), (3, 4)], TypeError),
    ],
    ids=["batch", "columns", "dimensions", "list"],
)
def test_postprocess_rejects_sizes(sizes, error):
    with pytest.raises(error, match=r"target_sizes must be"):
        PostProcess()({"pred_logits": torch.zeros(2, 5, 3), "pred_boxes": torch.zeros(2, 5, 4)}, sizes)


def test_postprocess_rejects_outputs():
    with pytest.raises(ValueError, match="lack the key 'pred_boxes'"):
        PostProcess()({"pred_logits": torch.zeros(2, 5, 3)}, torch.ones(2, 2))
    with pytest.raises(ValueError, match="a class besides no-object"):
        PostProcess()({"pred_logits": torch.zeros(2, 5, 1), "pred_boxes": torch.zeros(2, 5, 4)}, torch.ones(2, 2))
