"""Generated data sets: shapes in COCO's layout, wireframes in LETR's."""

from detr_fast.data.generate.shapes import make_shapes_dataset
from detr_fast.data.generate.wireframes import make_lines_dataset

__all__ = ["make_lines_dataset", "make_shapes_dataset"]
