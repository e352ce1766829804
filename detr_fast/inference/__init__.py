"""A finished model: loaded, evaluated, and put to work on images."""

from detr_fast.inference.detections import Detections
from detr_fast.inference.detector import Detector, load

__all__ = ["Detections", "Detector", "load"]
