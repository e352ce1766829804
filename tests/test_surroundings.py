"""Programs whose surroundings are odd: closed, full and ASCII streams, few open files, a killed process."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from detr_fast.cli import main
from detr_fast.data import EpochLoader

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags of a data set of one image whose class has a name that ASCII lacks."""
    folder = tmp_path_factory.mktemp("data")
    Image.fromarray(np.zeros((48, 64, 3), dtype=np.uint8)).save(folder / "0.png")
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 10], "area": 200, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "0.png", "width": 64, "height": 48}],
        "annotations": [box],
        "categories": [{"id": 1, "name": "茶碗"}],
    }
    (folder / "ann.json").write_text(json.dumps(content))
    return ["--train_ann", str(folder / "ann.json"), "--train_images", str(folder)]


def test_an_ascii_terminal_gets_escapes(data, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert main(["check-data", *data]) == 0
    assert rb"\u8336\u7897" in written.getvalue() and written.getvalue().endswith(b"ok\n\n")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "redirect, code, says",
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("> /dev/full", 2, "No space left"),
        ("| true; exit ${PIPESTATUS[0]}", 2, "Broken pipe"),
    ],
)
def test_output_that_is_closed(data, redirect, code, says):
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "bash", sys.executable, "-m", "detr_fast", "check-data", *data],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_closed_streams_of_a_program(monkeypatch, data):
    """As Python has them for a closed descriptor: nothing is printed, and nothing fails."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["check-data", *data]) == 0
    assert main(["check-data", "--train_ann", "absent.json"]) == 1
    assert main(["no-such-command"]) == 2


class Numbers(Dataset):
    """Item i is a tensor; `end` says what its reading does first."""

    def __init__(self, end=lambda: None, length=4):
        self.end, self.length = end, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.end()
        return torch.full((1000,), index)


def killed():
    time.sleep(0.1)
    os.kill(os.getpid(), 9)


def test_a_killed_loader_process_ends_the_run_with_a_sentence():
    with pytest.raises(ChildProcessError, match="DataLoader worker .*lacks memory most of the time"):
        list(EpochLoader(Numbers(killed), batch_size=2, num_workers=1))


FEW_FILES = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_surroundings import EpochLoader, Numbers
loader = EpochLoader(Numbers(length=60), batch_size=1, num_workers=2)
used = len(__import__("os").listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 18, used + 18))
kept = list(loader)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_too_few_open_files_are_said():
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES.format(tests=str(Path(__file__).parent))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "loader processes need more open files than `ulimit -n`" in done.stderr, done.stderr
