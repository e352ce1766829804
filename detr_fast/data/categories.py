"""The classes of a dataset: category ids, names, and the labels that the model sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


def category_name(category: Mapping[str, Any]) -> str:
    """What an entry of a COCO json's ``categories`` is called: its ``id`` where it has no ``name``."""
    name = str(category["id"] if category.get("name") is None else category["name"])
    # A json can hold what no file and no terminal takes: lone halves of a surrogate pair.
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Categories:
    """Ids and names of the categories, and how they become labels.

    Args:
        ids: category ids as they stand in the annotations, ascending and unique.
        names: their names, in the same order.
        contiguous: False: an id is its own label and the model has max(ids) + 1 classes, as the original does with
            COCO (ids to 90: 91 classes, and one more for no-object). True: labels are 0..len(ids) - 1.

    Raises:
        ValueError: no category, ids that are negative, unsorted or repeated, or more or fewer names than ids.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    contiguous: bool = False

    def __post_init__(self):
        object.__setattr__(self, "ids", tuple(int(i) for i in self.ids))
        object.__setattr__(self, "names", tuple(str(name) for name in self.names))
        if not self.ids:
            raise ValueError("there must be at least one category, got none")
        if list(self.ids) != sorted(set(self.ids)) or self.ids[0] < 0:
            raise ValueError(f"category ids must be unique, ascending and not negative, got {list(self.ids)}")
        if len(self.names) != len(self.ids):
            raise ValueError(f"expected one name for each of the {len(self.ids)} category ids, got {len(self.names)}")

    @classmethod
    def from_coco(cls, categories: Sequence[dict], *, contiguous: bool = False) -> Categories:
        """From the ``categories`` list of a COCO json: dicts with ``id`` and, optionally, ``name``."""
        ordered = sorted(categories, key=lambda category: category["id"])
        ids = tuple(category["id"] for category in ordered)
        return cls(ids, tuple(map(category_name, ordered)), contiguous)

    @property
    def num_classes(self) -> int:
        """Number of labels, without no-object: what ``DETR(num_classes=…)`` takes."""
        return len(self.ids) if self.contiguous else self.ids[-1] + 1

    @cached_property
    def label_of(self) -> dict[int, int]:
        """category id → label."""
        return {i: label if self.contiguous else i for label, i in enumerate(self.ids)}

    @cached_property
    def label_names(self) -> dict[int, str]:
        """label → name. Labels between COCO's ids that belong to no category have none."""
        return {self.label_of[i]: name for i, name in zip(self.ids, self.names, strict=True)}

    def to_id(self, label: int | torch.Tensor) -> int | torch.Tensor:
        """The category id of a label, or of each label of an int64 tensor: `label_of` backwards.

        Where ids are used as they are every label is its own id, also those between the ids that belong to no category.
        """
        if not self.contiguous:
            return label
        if isinstance(label, torch.Tensor):
            return torch.tensor(self.ids, device=label.device)[label]
        return self.ids[label]

    def to_dict(self) -> dict:
        """Plain lists and a bool, for json and for checkpoints that load with ``weights_only=True``."""
        return {"ids": list(self.ids), "names": list(self.names), "contiguous": self.contiguous}

    @classmethod
    def from_dict(cls, state: dict) -> Categories:
        """From what ``to_dict`` returned."""
        return cls(tuple(state["ids"]), tuple(state["names"]), bool(state["contiguous"]))
