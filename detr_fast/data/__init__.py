"""Datasets, augmentation and loading."""

from detr_fast import _moved
from detr_fast.criterion.target_batch import TargetBatch
from detr_fast.data.annotations import read_annotations, read_panoptic
from detr_fast.data.categories import Categories
from detr_fast.data.check import DatasetReport, check_coco, check_panoptic
from detr_fast.data.coco import CocoDetection, get_coco_api_from_dataset
from detr_fast.data.collates import DetectionCollate, DropMissing, SkipUnreadable
from detr_fast.data.generate import make_lines_dataset, make_shapes_dataset
from detr_fast.data.grouping import SizeGroupedBatchSampler
from detr_fast.data.images import (
    CorruptImageError,
    ImageReadError,
    MissingImageError,
    load_image,
    load_image_tensor,
    load_segment_ids,
)
from detr_fast.data.layouts import Layout, Split, find_layout
from detr_fast.data.lines import LineDetection, make_line_transforms
from detr_fast.data.loader import EpochLoader, build_loader
from detr_fast.data.mending import mend_file
from detr_fast.data.packed import PackedBatch, PackedCollate
from detr_fast.data.panoptic import CocoPanoptic
from detr_fast.data.prefetch import Prefetcher
from detr_fast.data.seeding import UnpaddedDistributedSampler
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, make_coco_transforms

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Categories",
    "CocoDetection",
    "CocoPanoptic",
    "CorruptImageError",
    "DatasetReport",
    "DetectionCollate",
    "DropMissing",
    "EpochLoader",
    "ImageReadError",
    "Layout",
    "LineDetection",
    "MissingImageError",
    "PackedBatch",
    "PackedCollate",
    "Prefetcher",
    "SizeGroupedBatchSampler",
    "SkipUnreadable",
    "Split",
    "TargetBatch",
    "UnpaddedDistributedSampler",
    "build_loader",
    "check_coco",
    "check_panoptic",
    "find_layout",
    "get_coco_api_from_dataset",
    "load_image",
    "load_image_tensor",
    "load_segment_ids",
    "make_coco_transforms",
    "make_line_transforms",
    "make_lines_dataset",
    "make_shapes_dataset",
    "mend_file",
    "read_annotations",
    "read_panoptic",
]

# The original's builders take its argparse namespace.
__getattr__ = _moved.lookup(
    __name__, dict.fromkeys(("build_dataset", "build_panoptic"), "detr_fast.integrations.original")
)
