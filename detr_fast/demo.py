"""The demonstration: generated data, and a call of the ordinary training with a small model."""

import torch

from detr_fast.config import Config, choose_device, make_output_dir
from detr_fast.data.generate import make_shapes_dataset
from detr_fast.distributed import is_main_process
from detr_fast.errors import InterruptedRun, UsageError
from detr_fast.inference.prediction import predict
from detr_fast.training.trainer import train

# A detector from scratch: batch norm instead of frozen statistics, one learning rate for all, read at stride 8.
_COMMON = {
    "backbone": "resnet18", "backbone_weights": "none", "backbone_level": 1, "enc_layers": 2, "dec_layers": 2,
    "num_queries": 10, "lr": 5e-4, "lr_backbone": 5e-4, "lr_schedule": "cosine", "warmup_steps": 100,
    "dropout": 0.0, "sample_images": 6, "augmentation": "flip",
}  # fmt: skip
_CPU = {
    "image_size": 64, "hidden_dim": 128, "dim_feedforward": 256, "nheads": 8, "batch_size": 8, "epochs": 7,
    "num_workers": 0, "eval_every": 2, "print_freq": 25,
}  # fmt: skip
_CPU_DATA = {"image_size": 64, "num_train": 2000, "num_val": 200}
_GPU = {
    "image_size": 96, "hidden_dim": 128, "dim_feedforward": 512, "nheads": 8, "batch_size": 16, "epochs": 30,
    "num_workers": 4, "eval_every": 5, "print_freq": 50,
}  # fmt: skip
_GPU_DATA = {"image_size": 96, "num_train": 4000, "num_val": 400}


def demo(output_dir: str, device: str = "auto", max_steps: int = 0) -> float:
    """Generates the data, trains, evaluates and draws; says where everything is.

    Args:
        output_dir: gets ``data/``, the files of a training run, and ``predictions/``.
        device: "auto", "cuda" or "cpu".
        max_steps: fewer optimiser steps; 0: as many as the demonstration takes.

    Returns:
        AP50 on the generated validation set.
    """
    if max_steps < 0:
        raise UsageError(f"--max_steps must be not negative, got {max_steps}")
    device = choose_device(device)
    on_gpu = torch.device(device).type == "cuda"
    root = make_output_dir(output_dir)
    data = make_shapes_dataset(root / "data", **(_GPU_DATA if on_gpu else _CPU_DATA))
    settings = {**_COMMON, **(_GPU if on_gpu else _CPU)}
    shown = " ".join(f"--{name} {value}" for name, value in settings.items())
    print(f"detr-fast train --coco_path {data} --output_dir {root} {shown}", flush=True)
    config = Config(**settings, coco_path=data, output_dir=root, device=device, max_steps=max_steps)
    try:
        stats = train(config)["test_coco_eval_bbox"]
    except InterruptedRun as stop:
        advice = "To go on: the command above, detr-fast train …, with --resume auto"
        raise InterruptedRun(stop.where, stop.signal, advice) from None

    if is_main_process():
        images = sorted((data / "val2017").glob("*.jpg"))[:8]
        checkpoint = root / "checkpoint.pth"
        prediction = Config(weights=checkpoint, device=device, output_dir=root / "predictions", batch_size=4)
        predict(prediction, [str(path) for path in images])
        print(f"AP50 {stats[1]:.3f}, AP {stats[0]:.3f} on {data / 'val2017'}")
        print(f"pictures: {root / 'samples'} (annotated beside predicted), {root / 'predictions'}")
        print(f"curves:   {root / 'curves.png'}")
        print(f"model:    {checkpoint}  (detr-fast predict --weights {checkpoint} IMAGE)")
    return stats[1]
