"""Evaluation of a checkpoint.

Source: facebookresearch/detr, main.py (``--eval``).
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from detr_fast.config import Config, usage_errors, with_output_dir
from detr_fast.distributed import is_main_process
from detr_fast.errors import UsageError
from detr_fast.inference.loading import Loaded, load_for_inference
from detr_fast.tasks import task_of
from detr_fast.tasks.paths import check_data, with_data
from detr_fast.training.checkpoint import save_checkpoint
from detr_fast.training.engine import evaluate
from detr_fast.training.report import write_report
from detr_fast.training.setup import loader_for, start


def evaluate_checkpoint(config: Config, given: Collection[str], path: str) -> dict:
    """Evaluates a checkpoint on the validation data and prints the task's numbers, COCO's and those of each class.

    Masks are evaluated where the model has some, and with `dataset_file` "coco_panoptic" panoptic pictures.

    Args:
        config: data, device and processes; the model's settings are the checkpoint's.
        given: names of the settings that the user chose, see `load_for_inference`.
        path: the checkpoint.

    Returns:
        The losses and what `evaluate` adds to them.

    Raises:
        UsageError: what was given does not fit the checkpoint, or the data needs more classes than it has.
    """
    with usage_errors():
        task_of(config)  # refuses settings that do not go together
        check_data(config)
        config, _ = start(config)
        loaded = load_for_inference(with_output_dir(config), given, path)
    return evaluate_loaded(loaded, path)


def evaluate_loaded(loaded: Loaded, source: str) -> dict:
    """As `evaluate_checkpoint`, of a model that is loaded already.

    Args:
        loaded: the model; its `config` names data, and where eval.pth, the report and COCO's results file go: a folder
            that exists, or nowhere.
        source: what error messages call the model.
    """
    with usage_errors():
        task, categories = loaded.task, loaded.categories
        task.check_backend(loaded.config)
        config = with_data(loaded.config, ids={name: number for number, name in loaded.names.items()})
        if categories is None:
            categories = task.bare_categories(config)
        dataset: Any = task.build_dataset("val", config, categories=categories, uint8=True)
        if config.num_classes is not None and dataset.categories.num_classes > config.num_classes:
            raise UsageError(
                f"{source} has {config.num_classes} classes, the annotations need {dataset.categories.num_classes}: "
                f"category ids up to {dataset.categories.ids[-1]}"
            )
        task.fit_postprocessors(loaded.postprocessors, dataset, config)
        annotations = task.annotations(dataset, config)
        loader = loader_for(task, dataset, config, train=False)
    stats, evaluator = evaluate(
        loaded.model,
        loaded.criterion,
        loaded.postprocessors,
        loader,
        annotations,
        torch.device(config.device),
        config.output_dir,
        task=task,
        categories=dataset.categories,
        precision=config.precision,
        print_freq=config.print_freq,
        backend=config.eval_backend,
    )
    if is_main_process():
        for line in task.report(evaluator):
            print(line)
        if config.output_dir:
            folder = Path(config.output_dir)
            save_checkpoint(evaluator.state(), folder / "eval.pth")
            for name, results in task.results(evaluator).items():
                (folder / name).write_text(json.dumps(results), encoding="utf-8")
            print(f"report: {write_report(folder, task, evaluator, dataset, annotations, source)}", flush=True)
    return stats
