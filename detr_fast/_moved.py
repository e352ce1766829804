"""Names that are looked up where they live only when somebody asks for them."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lookup(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that live elsewhere.

    For names which the original offers in a lower room than the one they belong to here (a builder among the models,
    a criterion beside LETR): nothing is imported upwards until a user asks for such a name.

    Args:
        module: the module's ``__name__``.
        homes: name → the module in which it lives.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return __getattr__
