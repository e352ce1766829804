"""Datasets, augmentation and loading."""

from detr_fast.data.categories import Categories
from detr_fast.data.check import DatasetReport, check_coco
from detr_fast.data.coco import (
    CocoDetection,
    CorruptImageError,
    ImageReadError,
    MissingImageError,
    build_dataset,
    get_coco_api_from_dataset,
    load_image,
    load_image_tensor,
    read_annotations,
)
from detr_fast.data.collates import DetectionCollate, DropMissing, SkipUnreadable
from detr_fast.data.grouping import SizeGroupedBatchSampler
from detr_fast.data.lines import LineDetection, make_line_transforms, make_lines_dataset
from detr_fast.data.loader import EpochLoader, PackedBatch, PackedCollate, build_loader
from detr_fast.data.panoptic import CocoPanoptic, build_panoptic, load_segment_ids, read_panoptic
from detr_fast.data.prefetch import Prefetcher
from detr_fast.data.seeding import UnpaddedDistributedSampler
from detr_fast.data.shapes import make_shapes_dataset
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
    "LineDetection",
    "MissingImageError",
    "PackedBatch",
    "PackedCollate",
    "Prefetcher",
    "SizeGroupedBatchSampler",
    "SkipUnreadable",
    "UnpaddedDistributedSampler",
    "build_dataset",
    "build_loader",
    "build_panoptic",
    "check_coco",
    "get_coco_api_from_dataset",
    "load_image",
    "load_image_tensor",
    "load_segment_ids",
    "make_coco_transforms",
    "make_line_transforms",
    "make_lines_dataset",
    "make_shapes_dataset",
    "read_annotations",
    "read_panoptic",
]
