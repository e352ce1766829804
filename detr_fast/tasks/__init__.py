"""Tasks: what differs between boxes, masks, panoptic segmentation and lines, each in a file of its own."""

from detr_fast.tasks.base import Task
from detr_fast.tasks.registry import dataset_files, register, task_of, task_of_postprocessors, task_of_weights, tasks

__all__ = ["Task", "dataset_files", "register", "task_of", "task_of_postprocessors", "task_of_weights", "tasks"]
