"""What a batch that the matcher refuses is called where the criterion gives NaN, as it does on a GPU."""

import torch
from torch import nn

from detr_fast.criterion import HungarianMatcher
from detr_fast.nested_tensor import NestedTensor
from detr_fast.training import engine
from detr_fast.training.step import TrainingStep


class Model(nn.Module):
    def forward(self, samples):
        return {"pred_logits": torch.zeros(1, 3, 4), "pred_boxes": torch.full((1, 3, 4), 0.5)}


class NanCriterion(nn.Module):
    weight_dict = {"loss_ce": 1}

    def __init__(self, matcher):
        super().__init__()
        if matcher is not None:
            self.matcher = matcher

    def forward(self, outputs, targets):
        return {"loss_ce": torch.tensor(torch.nan)}


def explanation(matcher, label):
    samples = NestedTensor(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool))
    targets = [{"labels": torch.tensor([label]), "boxes": torch.full((1, 4), 0.5)}]
    batch = (5, samples, targets)
    return engine._explain(TrainingStep(Model(), NanCriterion(matcher), None, torch.device("cpu")), batch, 2)


def test_the_matcher_is_asked_why_a_loss_is_nan():
    message = explanation(HungarianMatcher(), 7)
    assert "epoch 2, batch 5: no matching: targets[0]['labels'] has 7, the model's classes are 0 to 3" in message


def test_other_losses_that_are_nan_are_named():
    for matcher in (HungarianMatcher(), None):
        assert "outputs are finite, loss_ce is not" in explanation(matcher, 1)
