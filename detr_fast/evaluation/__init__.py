"""Evaluation as COCO defines it, and of line segments as L-CNN does."""

from detr_fast.evaluation.base import Evaluator
from detr_fast.evaluation.coco import CocoEvaluator
from detr_fast.evaluation.lines import LineEvaluator
from detr_fast.evaluation.panoptic import PanopticEvaluator, pq_compute

__all__ = ["CocoEvaluator", "Evaluator", "LineEvaluator", "PanopticEvaluator", "pq_compute"]
