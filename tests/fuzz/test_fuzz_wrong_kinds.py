"""One argument of a public call becomes something else: the call works, or a TypeError or ValueError says why not."""

import numpy as np
import pytest
import torch
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

import detr_fast
from detr_fast.ops import assign, matching_cost, pointwise_conv

TOKENS, HEADS = torch.randn(4, 2, 8), torch.randn(2, 2, 4, 8)
BOXES = torch.rand(2, 5, 4)
TARGETS = [{"labels": torch.tensor([0, 1]), "boxes": torch.rand(2, 4)} for _ in range(2)]
OUTPUTS = {"pred_logits": torch.randn(2, 5, 4), "pred_boxes": BOXES}
PADDING = torch.zeros(2, 4, dtype=torch.bool)
MODULES = dict(
    multihead=detr_fast.MultiheadAttention(8, 2),
    sine=detr_fast.PositionEmbeddingSine(4),
    learned=detr_fast.PositionEmbeddingLearned(4),
    matcher=detr_fast.HungarianMatcher(),
    criterion=detr_fast.SetCriterion(3, detr_fast.HungarianMatcher(), {}, 0.1, ["labels", "boxes", "cardinality"]),
    postprocess=detr_fast.PostProcess(),
)
NESTED = detr_fast.NestedTensor(torch.randn(2, 3, 6, 7), torch.zeros(2, 6, 7, dtype=torch.bool))

# The call, and its arguments by name.
CALLS = {
    "pointwise_conv": (
        pointwise_conv,
        dict(
            x=torch.rand(1, 4, 2, 2), weight=torch.rand(6, 4, 1, 1), bias=torch.rand(6), residual=torch.rand(1, 6, 2, 2)
        ),
    ),
    "attention": (
        detr_fast.attention,
        dict(query=HEADS, key=HEADS, value=HEADS, key_padding_mask=PADDING, dropout_p=0.1, seed=torch.tensor([1])),
    ),
    "multihead": (MODULES["multihead"], dict(query=TOKENS, key=TOKENS, value=TOKENS, key_padding_mask=PADDING)),
    "pad_collate": (detr_fast.pad_collate, dict(images=[torch.rand(3, 4, 5)], mean=[0.5] * 3, std=[1.0] * 3)),
    "nested": (detr_fast.NestedTensor, dict(tensors=NESTED.tensors, mask=NESTED.mask)),
    "from list": (detr_fast.nested_tensor_from_tensor_list, dict(tensor_list=[torch.rand(3, 4, 5)])),
    "collate": (detr_fast.collate_fn, dict(batch=[(torch.rand(3, 4, 5), {})])),
    "sine_position": (detr_fast.sine_position, dict(mask=NESTED.mask, size=(2, 3))),
    "sine": (MODULES["sine"], dict(tensor_list=NESTED)),
    "learned": (MODULES["learned"], dict(tensor_list=NESTED)),
    "assign": (assign, dict(cost=torch.rand(1, 3, 4), offsets=torch.tensor([0, 1, 3]), largest=2)),
    "matching_cost": (
        matching_cost,
        dict(logits=torch.rand(1, 1, 5, 4), boxes=torch.rand(1, 1, 5, 4), labels=torch.tensor([1]),
             target_boxes=torch.rand(1, 4), offsets=torch.tensor([0, 1]), cost_class=1, cost_bbox=5, cost_giou=2),
    ),
    "matcher": (MODULES["matcher"], dict(outputs=OUTPUTS, targets=TARGETS)),
    "criterion": (MODULES["criterion"], dict(outputs=OUTPUTS, targets=TARGETS)),
    "postprocess": (MODULES["postprocess"], dict(outputs=OUTPUTS, target_sizes=torch.tensor([[4, 5], [6, 7]]))),
    "new matcher": (detr_fast.HungarianMatcher, dict(cost_class=1, cost_bbox=5, cost_giou=2)),
    "new criterion": (
        detr_fast.SetCriterion,
        dict(num_classes=3, matcher=MODULES["matcher"], weight_dict={}, eos_coef=0.1, losses=["labels"]),
    ),
}  # fmt: skip

JUNK = [
    None, True, "", "text", b"bytes", 3, -1, 0.5, float("nan"), 1j, [], [1, 2], [None], ["a"], (), {}, {"labels": 1},
    {"pred_logits": None}, object(), len, np.zeros((2, 3)), np.zeros((2, 2, 4, 8), np.float32), torch.zeros(()),
    torch.zeros(0), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, dtype=torch.bool),
    torch.zeros(4, 2, 8).long(), torch.zeros(2, 2, 4, 8, dtype=torch.complex64), [torch.zeros(3, 4)],
    [torch.zeros(2, 3, 4), None], [{}], [{}, {}], [None, None], [TARGETS[0]],
    [TARGETS[0], {}],
]  # fmt: skip
junk = st.sampled_from(JUNK)


def is_clean(call):
    """Whether the call works, or says why not."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return len(str(error)) > 10
    return True


def test_the_calls_work_as_they_stand():
    for function, arguments in CALLS.values():
        function(**arguments)


@fuzz(4000)
@given(name=st.sampled_from(sorted(CALLS)), which=st.integers(0, 7), value=junk)
def test_wrong_kinds_of_argument(name, which, value):
    function, arguments = CALLS[name]
    changed = list(arguments)[which % len(arguments)]
    assert is_clean(lambda: function(**{**arguments, changed: value})), (name, changed)


@pytest.mark.parametrize("name", ["matcher", "criterion"])
@fuzz(1000)
@given(image=st.integers(0, 1), key=st.sampled_from(["labels", "boxes"]), value=junk)
def test_wrong_kinds_inside_targets(name, image, key, value):
    targets = [dict(target) for target in TARGETS]
    targets[image][key] = value
    assert is_clean(lambda: MODULES[name](OUTPUTS, targets)), key
    assert is_clean(lambda: MODULES[name]({**OUTPUTS, f"pred_{'logits' if key == 'labels' else key}": value}, TARGETS))
