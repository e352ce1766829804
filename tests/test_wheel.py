"""The wheel and the source distribution, installed beside nothing of this repository: `make check-wheel`."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.inference.tiny_models import checkpoint_of

ROOT = Path(__file__).parents[1]
IMPORTS = """
import importlib, pkgutil, sys
import detr_fast
assert detr_fast.__file__.startswith(sys.argv[1]), detr_fast.__file__
names = [module.name for module in pkgutil.walk_packages(detr_fast.__path__, "detr_fast.")]
assert "detr_fast.kernels.attention" in names and "detr_fast.training.trainer" in names
for name in names:
    if name.startswith(("detr_fast.kernels.", "detr_fast.benchmarks")) or name == "detr_fast.__main__":
        continue  # they need Triton, or start a program
    importlib.import_module(name)
for name in detr_fast.__all__:
    getattr(detr_fast, name)
"""


def run(*arguments, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_wheel_and_sdist_install_and_work(tmp_path):
    """The source distribution is built, a wheel is built from it, and that is what gets installed."""
    build = "from setuptools import build_meta; print(build_meta.{}({!r}))"
    run("-c", build.format("build_sdist", str(tmp_path)), cwd=ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    run("-c", build.format("build_wheel", str(tmp_path)), cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"detr_fast"}

    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-c", IMPORTS, site, cwd=elsewhere, PYTHONPATH=str(site))
    assert "check-data" in run("-m", "detr_fast", "--help", cwd=elsewhere, PYTHONPATH=str(site))
    script = site / "bin" / "detr-fast"
    assert "predict" in run(script, "--help", cwd=elsewhere, PYTHONPATH=str(site))

    torch.save(checkpoint_of(), elsewhere / "tiny.pth")
    from PIL import Image

    Image.new("RGB", (90, 70), "red").save(elsewhere / "photo.jpg")
    argv = [
        "predict",
        "photo.jpg",
        "--weights",
        "tiny.pth",
        "--device",
        "cpu",
        "--threshold",
        "0",
        "--output_dir",
        "out",
    ]
    assert "5 detections" in run(script, *argv, cwd=elsewhere, PYTHONPATH=str(site))
    assert (elsewhere / "out" / "predictions.json").is_file()
