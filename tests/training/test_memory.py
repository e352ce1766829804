"""Steps that do not fit into memory, and the largest batch, which is tried before training starts."""

import re

import pytest
import torch
from test_interruption import FLAGS, STATE
from test_run import equal_states

import detr_fast
from detr_fast.cli import main
from detr_fast.errors import UsageError
from detr_fast.inference import detector
from detr_fast.nested_tensor import NestedTensor
from detr_fast.training import engine, memory
from detr_fast.training.checkpoint import read_checkpoint, rng_state
from detr_fast.training.step_errors import step_errors

STEP = r"padded to \d+x\d+ pixels \(height x width\), does not fit into the memory of cpu: lower "


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


@pytest.mark.parametrize(
    "name, what",
    [
        ("step.outputs_of", "a step with 2 images"),
        ("engine._optimizer_step", "the optimiser's step after a batch with 2 images"),
    ],
)
def test_a_step_that_does_not_fit_says_batch_and_size(tiny_flags, tmp_path, monkeypatch, capsys, name, what):
    monkeypatch.setattr(f"detr_fast.training.{name}", out_of_memory)
    assert main(["train", *tiny_flags, "--epochs", "1", "--output_dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        f"detr-fast: error: {what}, {STEP}--batch_size, --image_size or --max_size, or compute in --precision bf16. "
        r"\(CUDA out of memory. Tried to allocate 2.00 GiB.\)",
        line,
    )


def test_evaluation_and_prediction_say_it_too(trained, shapes, monkeypatch, capsys):
    weights = ["--weights", str(trained), "--device", "cpu"]
    with monkeypatch.context() as context:
        context.setattr(engine, "outputs_of", out_of_memory)
        assert main(["eval", "--coco_path", str(shapes), *weights, "--num_workers", "0", "--batch_size", "2"]) == 2
    assert re.search(f"the evaluation of a batch with 2 images, {STEP}--batch_size", capsys.readouterr().err)
    monkeypatch.setattr(detector, "outputs_of", out_of_memory)
    with pytest.raises(UsageError, match=f"a batch with 1 image, {STEP}--image_size or --max_size"):
        detr_fast.load(trained, device="cpu").predict(shapes / "val2017")


def test_the_cpus_own_message_and_no_other_error():
    samples = NestedTensor(torch.zeros(1, 3, 4, 5), torch.zeros(1, 4, 5, dtype=torch.bool))
    with pytest.raises(UsageError, match="1 image, padded to 4x5 pixels"), step_errors(samples):
        torch.empty(2**55)
    with pytest.raises(RuntimeError, match="size") as caught, step_errors(samples):
        torch.ones(2) @ torch.ones(3)
    assert not isinstance(caught.value, UsageError)


def test_training_is_the_same_whether_the_largest_batch_is_tried_or_not(tiny_flags, tmp_path, capsys):
    """Dropout, batch norm's statistics, averaged weights, augmentation: bit for bit."""
    for choice in ("on", "off"):
        argv = ["train", *tiny_flags, *FLAGS, "--backbone_norm", "batch", "--probe_memory", choice]
        argv += ["--epochs", "1", "--max_steps", "2"]
        assert main([*argv, "--output_dir", str(tmp_path / choice)]) == 0
        said = capsys.readouterr().out
        assert len(re.findall(r"the largest batch fits: 1 image, padded to \d+x\d+ pixels", said)) == (choice == "on")
    on, off = (read_checkpoint(tmp_path / choice / "checkpoint.pth") for choice in ("on", "off"))
    assert all(equal_states(on[key], off[key]) for key in STATE)


def test_a_largest_batch_that_does_not_fit_is_refused_before_training(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "outputs_of", out_of_memory)
    assert main(["train", *tiny_flags, "--probe_memory", "on", "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert re.search(f"error: the largest batch, with 2 images, {STEP}--batch_size", said.err)
    assert "loss" not in said.out and not (tmp_path / "checkpoint.pth").exists()


@pytest.mark.parametrize("grouped, batch_size", [(True, 2), (False, 2), (True, 1), (False, 1)])
def test_the_batch_that_is_tried_is_the_largest(grouped, batch_size):
    sizes = [(10, 40), (64, 20), (30, 30), (20, 60), (59, 20), (25, 10), (10, 10), (12, 12)]

    class Sizes(torch.utils.data.Dataset):
        def __len__(self):
            return len(sizes)

        def planned_size(self, index):
            return sizes[index]

    from detr_fast.data import build_loader

    if batch_size == 1:
        sizes.append((50, 50))
    loader = build_loader(Sizes(), batch_size, train=True, group_by_size=grouped)
    keys = memory._largest_batch(loader, 3)
    if batch_size == 1:
        assert keys == [(3, 8)]
    else:
        # Grouped, an upright image never meets a lying one here; in the original's order the highest may meet the
        # widest.
        assert sorted(keys) == ([(3, 1), (3, 4)] if grouped else [(3, 1), (3, 3)])


def test_a_failed_try_leaves_everything_as_it_was(tiny_flags, monkeypatch):
    from detr_fast.config import Config
    from detr_fast.training import setup, trainer

    config, device = setup.start(Config.from_arguments([*tiny_flags, "--epochs", "1", "--backbone_norm", "batch"]))
    run = trainer.Trainer(config, device)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    generators = rng_state(device)
    monkeypatch.setattr(run.criterion, "forward", out_of_memory)
    with pytest.raises(UsageError):
        memory.probe_memory(run.step, run.loader_train, 0)
    assert equal_states(before, run.model.state_dict()) and equal_states(generators, rng_state(device))
    assert all(p.grad is None for p in run.model.parameters()) and not run.optimizer.state


def test_a_batch_without_a_loss_is_not_said_to_fit(tiny_flags, monkeypatch):
    from detr_fast.config import Config
    from detr_fast.training import setup, trainer

    def refuse(*_):
        raise ValueError("NaN")

    run = trainer.Trainer(*setup.start(Config.from_arguments([*tiny_flags, "--epochs", "1"])))
    monkeypatch.setattr(run.criterion, "forward", refuse)
    assert "only its forward pass was tried" in memory.probe_memory(run.step, run.loader_train, 0)


@pytest.mark.gpu
def test_out_of_memory_on_a_gpu_is_said(tiny_flags, capsys):
    """The allocator is limited to a hundredth of what the batch needs."""
    free = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(300e6 / free)
    argv = ["train", *tiny_flags, "--device", "cuda", "--image_size", "1333", "--batch_size", "8", "--max_steps", "1"]
    try:
        for choice, what in (("auto", "the largest batch, with"), ("off", "a step with")):
            assert main([*argv, "--probe_memory", choice]) == 2
            assert f"{what} 8 images, padded to" in capsys.readouterr().err
            torch.cuda.empty_cache()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
