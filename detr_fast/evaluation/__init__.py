"""Evaluation as COCO defines it."""

from detr_fast.evaluation.coco import CocoEvaluator
from detr_fast.evaluation.panoptic import PanopticEvaluator, pq_compute

__all__ = ["CocoEvaluator", "PanopticEvaluator", "pq_compute"]
