"""Which tasks there are, and which of them a configuration, a checkpoint or a set of post-processors belongs to."""

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from detr_fast.config import Config, default_of
from detr_fast.errors import UsageError
from detr_fast.tasks.base import Task

_TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Makes a task known to the command line, to training and to evaluation.

    The tasks of this package are the modules of `detr_fast.tasks`, each of which calls this; somebody else's task may
    be registered from anywhere. One of the same name takes the former's place.
    """
    _TASKS[task.name] = task
    return task


def tasks() -> list[Task]:
    """All registered tasks."""
    _import_all()
    return list(_TASKS.values())


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"detr_fast.tasks.{module.name}")


def dataset_files() -> list[str]:
    """The values that ``--dataset_file`` may have."""
    return list(dict.fromkeys(task.dataset_file for task in tasks()))


def task_of(config: Config) -> Task:
    """The task that a configuration asks for, once its settings have been found to go together.

    Raises:
        UsageError: there is no such task, or a setting that it does not honour.
    """
    for task in tasks():
        if task.handles(config):
            for other in tasks():
                for name in other.own_flags:
                    if name not in task.own_flags and getattr(config, name) != default_of(name):
                        raise UsageError(_does_nothing(name, config, other))
            task.check(config)
            return task
    raise UsageError(f"--dataset_file must be one of {', '.join(dataset_files())}, got {config.dataset_file!r}")


def _does_nothing(name: str, config: Config, owner: Task) -> str:
    return (
        f"--{name} does nothing with --dataset_file {config.dataset_file}; it is only read with --dataset_file "
        f"{owner.dataset_file}"
    )


def task_of_weights(state: Mapping[str, Tensor], asked: str | None, trained_as: str | None) -> Task:
    """The task of a model with these weights.

    Args:
        state: the model's weights, to which several tasks may lay claim.
        asked: the ``--dataset_file`` that the user gave; None if there was none.
        trained_as: the ``--dataset_file`` of the training, if the checkpoint knows it. Without either it is the first
            task, in the order of registration, that recognises the weights.

    Raises:
        ValueError: no task's model has such weights.
    """
    found = [task for task in tasks() if task.recognises(state)]
    if not found:
        raise ValueError("the weights are of no model that is known here; expected the weights of a DETR")
    named = [task for task in found if task.dataset_file == asked] if asked else []
    trained = [task for task in found if task.dataset_file == trained_as and not task.only_if_asked]
    default = [task for task in found if not task.only_if_asked]
    return [*named, *trained, *default, *found][0]


def task_of_postprocessors(names: Iterable[str]) -> Task:
    """The task whose `build` returns post-processors of these names.

    Raises:
        ValueError: there is none.
    """
    names = set(names)
    for task in tasks():
        if names == set(task.postprocessor_names):
            return task
    raise ValueError(
        f"no task has the post-processors {sorted(names)}; the tasks have "
        f"{'; '.join(', '.join(task.postprocessor_names) for task in tasks())}"
    )
