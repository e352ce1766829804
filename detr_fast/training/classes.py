"""The class head of a run that starts from weights: the rows of classes that they know already stay, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from detr_fast.data.categories import Categories

_NAMES = 10  # that a line shows


def known_classes(categories: Categories, weights: Mapping[str, Any]) -> dict[int, int] | None:
    """Label → its label in the weights, of each class that they have under the same name.

    Args:
        categories: of the training data.
        weights: a checkpoint.

    Returns:
        None where there is nothing to choose: the weights name no classes, or have the same ones under the same labels,
        or both use category ids as labels, as the original does, and have equally many.
    """
    if "categories" not in weights:
        return None
    theirs = Categories.from_dict(weights["categories"])
    by_id = not categories.contiguous and not theirs.contiguous and categories.num_classes == theirs.num_classes
    if by_id or categories.label_names == theirs.label_names:
        return None
    label_of: dict[str, int] = {}
    for label, name in theirs.label_names.items():
        label_of.setdefault(name, label)
    return {label: label_of[name] for label, name in categories.label_names.items() if name in label_of}


def say_known(categories: Categories, known: Mapping[int, int]) -> str:
    """A line that says which classes' rows are taken, and which start fresh."""
    names = categories.label_names
    fresh = [name for label, name in names.items() if label not in known]
    new = f"; new: {_some(fresh)}" if fresh else ""
    return f"class head: taken by name: {_some([names[label] for label in known])}, and no-object{new}"


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {rest} more" if rest > 0 else "")
