"""What was found in one image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast.inference.images import Picture
from detr_fast.tasks import Task
from detr_fast.tasks.base import Result

if TYPE_CHECKING:
    import supervision


class Detections:
    """The detections of one image, best first.

    ``len`` counts them, and a slice or an index array, such as ``found[found.scores > 0.9]``, makes a selection.

    Attributes:
        path: the image's file or address; None for an image from memory.
        size: (height, width) of the image in pixels.
    """

    path: str | None
    size: tuple[int, int]

    def __init__(self, result: Result, task: Task, names: Mapping[int, str], picture: Picture, size: tuple[int, int]):
        """Made by `Detector.predict`. `result`: of the task, "labels" being category ids, on the CPU."""
        self._result, self._task, self._names, self._picture = result, task, names, picture
        self.path, self.size = picture.path, size

    @cached_property
    def boxes(self) -> np.ndarray:
        """float32 [n, 4]: x0, y0, x1, y1 in pixels of the image; of lines, the boxes around them."""
        if self.lines is not None:
            ends = self.lines.reshape(-1, 2, 2)
            return np.concatenate([ends.min(axis=1), ends.max(axis=1)], axis=1)
        return self._result["boxes"].float().numpy()

    @cached_property
    def scores(self) -> np.ndarray:
        """float32 [n], in 0..1, descending."""
        return self._result["scores"].float().numpy()

    @cached_property
    def class_id(self) -> np.ndarray:
        """int64 [n]: category ids as in the data that the model was trained on."""
        return self._result["labels"].numpy()

    @property
    def class_name(self) -> list[str]:
        """n names; "class 7" for a category whose name is not known."""
        return [self._names.get(label, f"class {label}") for label in self.class_id.tolist()]

    @cached_property
    def masks(self) -> np.ndarray | None:
        """bool [n, height, width]; None for a model without masks."""
        return self._result["masks"].flatten(0, 1).bool().numpy() if "masks" in self._result else None

    @cached_property
    def lines(self) -> np.ndarray | None:
        """float32 [n, 4]: x1, y1, x2, y2 in pixels of the image; None for a model of boxes."""
        return self._result["lines"].float().numpy() if "lines" in self._result else None

    def __len__(self) -> int:
        return len(self._result["scores"])

    def __getitem__(self, index: Any) -> Detections:
        chosen = torch.from_numpy(np.atleast_1d(np.arange(len(self))[index]))
        return Detections(_selected(self._result, chosen), self._task, self._names, self._picture, self.size)

    def __repr__(self) -> str:
        found = [f"{name} {score:.2f}" for name, score in zip(self.class_name, self.scores, strict=True)]
        more = [f"and {len(self) - 5} more"] if len(self) > 5 else []
        return f"Detections({', '.join(found[:5] + more)})"

    def to_coco(self, image_id: int | None = None) -> list[dict[str, Any]]:
        """In COCO's results format, as in ``predictions.json``: "category_id", "bbox" (x, y, width, height) or "line"
        (x1, y1, dx, dy), "score", with masks "segmentation" (run lengths), and "category_name" where it is known.

        Args:
            image_id: put into every entry; None: there is no "image_id".
        """
        image = {} if image_id is None else {"image_id": image_id}
        return [
            {**image, **entry, **self._name_of(entry.get("category_id"))}
            for entry in self._task.describe(self._result, 0.0)
        ]

    def _name_of(self, label: int | None) -> dict[str, str]:
        return {} if label is None or label not in self._names else {"category_name": self._names[label]}

    def to_supervision(self) -> supervision.Detections:
        """As ``supervision.Detections``, with the names under ``data["class_name"]``.

        Raises:
            ImportError: the package is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs the package supervision: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.class_id,
            data={"class_name": np.array(self.class_name, dtype=str)},
        )

    def plot(self, image: Image.Image | None = None) -> Image.Image:
        """A copy of the image with the detections drawn in; small images are enlarged.

        Args:
            image: the image. None: as it was given; a file is read once more.

        Raises:
            ImageReadError: the file is no longer there.
        """
        return self._task.draw(self._picture.read() if image is None else image, self._result, self._names, 0.0)


def best(result: Result, threshold: float) -> Result:
    """A result's detections of at least that score, best first, on the CPU."""
    scores, order = result["scores"].cpu().sort(descending=True)
    return _selected(result, order[: int((scores >= threshold).sum())])


def _selected(result: Result, chosen: Tensor) -> Result:
    """The rows of what a result has for each detection; whatever else it has stays as it is."""
    count = len(result["scores"])

    def rows_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        is_per_detection = value.ndim > 0 and len(value) == count
        return (value[chosen.to(value.device)] if is_per_detection else value).cpu()

    return {name: rows_of(value) for name, value in result.items()}
