"""Evaluation as COCO defines it."""

from detr_fast.evaluation.coco import CocoEvaluator

__all__ = ["CocoEvaluator"]
