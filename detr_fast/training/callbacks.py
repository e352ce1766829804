"""Who else is told of a run's numbers: a protocol, and Weights & Biases and MLflow as its two examples.

    train(config, callbacks=[WandbCallback(project="shapes")])

Only the first process of a run makes calls. What a callback raises ends the run, under the callback's name.
"""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from detr_fast.config import Config
from detr_fast.distributed import say
from detr_fast.errors import CallbackError, UsageError
from detr_fast.training.log import scalars


class Callback(Protocol):
    """What `train` calls. Nothing needs to be inherited."""

    def on_start(self, config: Config) -> None:
        """Before the first step, also of a resumed run; `config` has everything that was chosen."""

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        """After each epoch, with the row that log.txt gets; `scalars` makes single numbers of it."""

    def on_end(self) -> None:
        """The run is over, also by an error or a signal. Only after `on_start`."""


class WandbCallback:
    """Each epoch's numbers to Weights & Biases, with the configuration.

    Args:
        project: name of the project.
        options: further arguments of `wandb.init`, such as ``name`` or ``mode="offline"``.

    Raises:
        UsageError: wandb is not installed.
    """

    def __init__(self, project: str = "detr_fast", **options: Any):
        self._wandb = _installed("wandb")
        self._options = {"project": project, **options}
        self._run: Any = None

    def on_start(self, config: Config) -> None:
        folder = {"dir": config.output_dir} if config.output_dir else {}
        self._run = self._wandb.init(**{"config": config.to_dict(), **folder, **self._options})

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        self._run.log(scalars(row), step=row["epoch"])

    def on_end(self) -> None:
        self._run.finish()


class MLflowCallback:
    """Each epoch's numbers to MLflow, with the configuration as parameters; where to is for MLFLOW_TRACKING_URI to say.

    Args:
        experiment: its name; made if need be.
        options: further arguments of `mlflow.start_run`, such as ``run_name``.

    Raises:
        UsageError: mlflow is not installed.
    """

    def __init__(self, experiment: str = "detr_fast", **options: Any):
        self._mlflow = _installed("mlflow")
        self._experiment, self._options = experiment, options

    def on_start(self, config: Config) -> None:
        self._mlflow.set_experiment(self._experiment)
        name = {"run_name": Path(config.output_dir).name} if config.output_dir else {}
        self._mlflow.start_run(**{**name, **self._options})
        self._mlflow.log_params({name: value for name, value in config.to_dict().items() if value not in (None, "")})

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        numbers = {name: float(value) for name, value in scalars(row).items() if value is not None}
        self._mlflow.log_metrics(numbers, step=row["epoch"])

    def on_end(self) -> None:
        self._mlflow.end_run()


LOGGERS = {"wandb": WandbCallback, "mlflow": MLflowCallback}


def callbacks_of(config: Config) -> list[Callback]:
    """Those that ``--log_to`` names.

    Raises:
        UsageError: the package is not installed.
    """
    return [LOGGERS[config.log_to]()] if config.log_to else []


class Callbacks:
    """Calls each of them; one that fails is named. At the end of its ``with`` those that were started are ended."""

    def __init__(self, callbacks: Iterable[Callback]):
        self._callbacks: Sequence[Callback] = tuple(callbacks)
        self._started: list[Callback] = []

    def start(self, config: Config) -> None:
        for callback in self._callbacks:
            with _named(callback, "on_start"):
                callback.on_start(config)
            self._started.append(callback)

    def epoch(self, row: Mapping[str, Any]) -> None:
        for callback in self._callbacks:
            with _named(callback, "on_epoch"):
                callback.on_epoch(row)

    def __enter__(self) -> "Callbacks":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Ends those that were started, in the reverse order; the first failure is raised after the last. It is only
        said where `error` ends the run already."""
        failure = None
        while self._started:
            callback = self._started.pop()
            try:
                with _named(callback, "on_end"):
                    callback.on_end()
            except CallbackError as failed:
                failure = failure or failed
        if failure is not None and error is not None:
            say(str(failure))
        elif failure is not None:
            raise failure


@contextmanager
def _named(callback: Callback, method: str):
    try:
        yield
    except Exception as error:
        raise CallbackError(f"{type(callback).__name__}.{method} failed: {type(error).__name__}: {error}") from error


def _installed(package: str) -> Any:
    try:
        module = importlib.import_module(package)
    except ImportError:
        module = None
    # A folder of that name, such as wandb/ with earlier runs, imports as an empty package.
    if module is None or (hasattr(module, "__path__") and module.__file__ is None):
        raise UsageError(f"{package} is not installed; pip install 'detr_fast[{package}]'")
    return module
