"""Folders of labelled images as other tools write them: found, read, and given as COCO jsons.

COCO, Roboflow's COCO, YOLO (Ultralytics) and Pascal VOC. What is not a COCO json already is written as one, so that
checking, training and evaluation see a single format.

The readers are our own: supervision's take one folder of images at a time, without the lists of a data set, turn
polygons into bitmaps, and leave out VOC's "difficult" mark.

Source of the formats: docs.ultralytics.com/datasets; M. Everingham et al., "The PASCAL VOC Challenge development kit".
"""

from detr_fast.data.layouts.files import IMAGE_SUFFIXES
from detr_fast.data.layouts.finding import Layout, Split, find_layout

__all__ = ["IMAGE_SUFFIXES", "Layout", "Split", "find_layout"]
