"""Weights between this package and Hugging Face's folders: what to import."""

from detr_fast.inference.huggingface import convert
from detr_fast.inference.huggingface_names import from_huggingface, to_huggingface

__all__ = ["convert", "from_huggingface", "to_huggingface"]
