"""Loader processes that fail or end: a sentence in the first process, which waits for nothing."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import detr_fast
from detr_fast.data import CocoDetection, EpochLoader, PackedCollate, build_loader, make_coco_transforms, workers


class Zeros(torch.utils.data.Dataset):
    """Tensors of so many bytes, the first of one byte."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.zeros(self.length if index else 1, dtype=torch.uint8)


class Unsendable:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


def only(batch):
    return batch[0]


def unsendable(error):
    return lambda batch: Unsendable(error) if len(batch[0]) > 1 else batch[0]


def killed_by_bus_error(batch):
    os.kill(os.getpid(), signal.SIGBUS)


def test_a_batch_that_cannot_be_pickled_is_an_error_and_not_waited_for():
    loader = EpochLoader(Zeros(2), 1, num_workers=1, collate_fn=unsendable(TypeError("has no pickle")))
    batches = iter(loader)
    assert len(next(batches)) == 1
    with pytest.raises(TypeError, match="has no pickle"):
        next(batches)
    assert loader.waits_since is None


@pytest.mark.parametrize("collate", [
    unsendable(RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")),
    killed_by_bus_error,
], ids=["no_space", "bus_error"])  # fmt: skip
def test_full_shared_memory_is_one_sentence(collate):
    with pytest.raises(OSError, match=r"^/dev/shm was full, .* 1 loader processes .*--num_workers 0\)$"):
        list(EpochLoader(Zeros(2), 1, num_workers=1, collate_fn=collate))


FULL = """
import os, sys
os.system("mount -t tmpfs -o size=300k tmpfs /dev/shm") == 0 or sys.exit(77)
import test_workers
from detr_fast.data import EpochLoader
try:
    list(EpochLoader(test_workers.Zeros(10**6), 1, num_workers=2, persistent_workers=True))
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_small_shared_memory_indeed():
    """In a mount namespace of its own, where that is allowed."""
    argv = ["unshare", "-m", sys.executable, "-c", FULL]
    path = os.pathsep.join([str(Path(detr_fast.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    if done.returncode in (1, 77) and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip("no mount namespace here")
    assert done.returncode == 0 and done.stdout.startswith("/dev/shm was full, "), done.stderr
    assert "of 307.2 kB are free now" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.slow
def test_spawned_processes_end_quietly_while_they_send():
    """The batch that is being copied to shared memory when the loader is closed is large: that takes a while."""
    loader = EpochLoader(
        Zeros(3 * 10**8), 1, num_workers=1, persistent_workers=True, multiprocessing_context="spawn", collate_fn=only
    )
    batches = iter(loader)
    next(batches)
    processes = loader._iterator._workers
    loader.close()
    assert [process.exitcode for process in processes] == [0]


def loader_with_free(root, free, monkeypatch, **options):
    found = SimpleNamespace(f_bavail=free // 1000, f_frsize=1000, f_blocks=10**6)
    monkeypatch.setattr(workers.os, "statvfs", lambda path: found)
    dataset = CocoDetection(root / "train2017", root / "annotations" / "instances_train2017.json",
                            make_coco_transforms("train", scales=48, uint8=True))  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        build_loader(dataset, 4, train=True, **options)
    return [str(warning.message) for warning in said]


def test_shared_memory_is_judged_when_the_loader_is_made(shapes, monkeypatch):
    """Batches of four images: 23 kB in uint8, four times that in float32."""
    assert loader_with_free(shapes, 10**5, monkeypatch, num_workers=2, collate_fn=PackedCollate()) == []
    (said,) = loader_with_free(shapes, 6 * 10**4, monkeypatch, num_workers=2, collate_fn=PackedCollate())
    assert "/dev/shm has 60.0 kB free" in said and "may have 4 on their way" in said and "--shm-size" in said
    assert loader_with_free(shapes, 10**3, monkeypatch, num_workers=0) == []
    with pytest.raises(ValueError, match=r"cannot send any\. Give it more .*--num_workers 0"):
        loader_with_free(shapes, 10**4, monkeypatch, num_workers=2, collate_fn=PackedCollate())
    with pytest.raises(ValueError, match="cannot send any"):
        loader_with_free(shapes, 6 * 10**4, monkeypatch, num_workers=1)


def test_systems_without_such_a_folder_are_not_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SHARED_MEMORY", str(tmp_path / "none"))
    workers.check_shared_memory(10**15, 2)
