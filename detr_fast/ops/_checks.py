"""Kinds of arguments: what every op and the criterion refuse in the same words."""

from torch import Tensor


def is_number(value) -> bool:
    """What `float()` takes and is one number."""
    if isinstance(value, (int, float)):  # a symbolic number of torch.compile, too, whose attributes 2.11 cannot ask for
        return True
    return hasattr(value, "__float__") and not (isinstance(value, Tensor) and value.dim() > 0)


def is_integer(value) -> bool:
    """What counts and is one number; torch's symbolic integers included."""
    if isinstance(value, int):
        return True
    return hasattr(value, "__index__") and not (isinstance(value, Tensor) and value.dim() > 0)


def check_numbers(**numbers) -> None:
    """Raise unless all are numbers."""
    for name, number in numbers.items():
        if not is_number(number):
            raise TypeError(f"{name} is {number!r}; expected a number")


def check_tensor(name: str, value, shape: str = "") -> None:
    """Raise unless it is a tensor. `shape`: as it stands in the message, such as " [B, H]"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor{shape}")
