"""A step never waits for the GPU, nor mixes devices.

Without a GPU the forward pass and the criterion run on fake CUDA tensors, which have no values: whatever reads one, or
mixes one with a CPU tensor, raises.
"""

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data._utils.pin_memory import pin_memory

from detr_fast.config import Config
from detr_fast.data import PackedCollate
from detr_fast.models import build_model
from detr_fast.training.engine import train_one_epoch

TINY = [
    "--backbone", "resnet18", "--backbone_weights", "none", "--backbone_norm", "frozen", "--hidden_dim", "128",
    "--enc_layers", "1", "--dec_layers", "2", "--dim_feedforward", "32", "--num_queries", "9",
]  # fmt: skip
KINDS = {"detection": [], "masks": ["--masks"], "lines": ["--dataset_file", "lines"]}


def make_batch(kind, sizes=((40, 64), (64, 33))):
    """A packed batch as the loader sends it, and targets of 3 and 0 objects."""
    samples = []
    for i, (height, width) in enumerate(sizes):
        count = 3 * (i == 0)
        target = {"labels": torch.randint(0, 1 if kind == "lines" else 3, (count,))}
        target["lines" if kind == "lines" else "boxes"] = torch.rand(count, 4) * 0.4 + 0.3
        if kind == "masks":
            target["masks"] = torch.rand(count, height, width) < 0.5
        samples.append((torch.randint(0, 256, (3, height, width), dtype=torch.uint8), target))
    return PackedCollate()(samples)


@contextlib.contextmanager
def fake_cuda():
    """Everything made within, and what goes in, are tensors without values, on CUDA where it says so."""
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(torch.Tensor, "pin_memory", lambda self: self),
            # A model of fake tensors cannot be moved; it is made where it belongs.
            mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self),
        ):
            stack.enter_context(patch)
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_losses_read_nothing_from_the_gpu(kind):
    args = Config.from_arguments([*TINY, *KINDS[kind], "--device", "cuda"])
    samples, targets = make_batch(kind)
    with fake_cuda(), torch.random.fork_rng(devices=[]):
        with torch.device("cuda"):
            model, criterion, _ = build_model(args)
        outputs = model.train()(samples.to("cuda", non_blocking=True))
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        losses = criterion(outputs, [{k: v.to("cuda") for k, v in target.items()} for target in targets])
        assert {"loss_ce", "loss_ce_0"} <= losses.keys()
        assert all(value.device.type == "cuda" for value in losses.values())
        with pytest.raises(Exception, match="item|_local_scalar_dense"):  # so that reading a value does raise
            losses["loss_ce"].item()


def train_six_steps(kind, device, set_sync_debug_mode):
    """A loss of training on pinned batches, of which the later ones are trained on in the mode "error"."""
    args = Config.from_arguments([*TINY, *KINDS[kind], "--device", device.type])
    model, criterion, _ = build_model(args)
    model, criterion = model.to(device), criterion.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    class Loader:
        def __len__(self):
            return 6

        def __iter__(self):
            for i in range(6):
                # The first step may compile kernels and plan convolutions.
                set_sync_debug_mode("error" if i >= 2 else "default")
                yield pin_memory(make_batch(kind))  # as DataLoader does it
            set_sync_debug_mode("default")

    try:
        stats = train_one_epoch(model, criterion, Loader(), optimizer, device, 0, 0.1, precision="bf16", print_freq=100)
    finally:
        set_sync_debug_mode("default")
    return stats["loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_steps_wait_for_nothing(kind):
    """Whole steps, logging apart, while torch turns every wait into an error."""
    assert train_six_steps(kind, torch.device("cuda"), torch.cuda.set_sync_debug_mode) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_steps_run_without_a_gpu(kind):
    """The test above can do its work: on a CPU, where nothing can be pinned."""
    modes = []
    with mock.patch.object(torch.Tensor, "pin_memory", lambda self: self):
        assert train_six_steps(kind, torch.device("cpu"), modes.append) > 0
    assert modes == ["default"] * 2 + ["error"] * 4 + ["default"]
