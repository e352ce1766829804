"""Shared test set-up. One thread per process: the suite runs in two processes side by side (`make test`)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without it numpy's BLAS threads slow Triton's interpreter down 10 to 20 times.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
COCO_MINI = Path(os.environ.get("DETR_FAST_COCO_MINI", Path(__file__).parents[2] / "shared" / "coco_mini"))


def pytest_collection_modifyitems(items):
    # Of the GPU's tests the kernels' come first: `make gpu` has a time limit.
    items.sort(key=lambda item: item.get_closest_marker("gpu") is not None and item.path.parent.name != "ops")
    for item in items:
        if item.get_closest_marker("interpret") and not INTERPRET:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (`make test` runs it so)"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _skipped_without_pycocotools(item):
    """Evaluation needs it, and on a bare machine it may be absent."""
    try:
        return (yield)
    except ImportError as error:
        missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        if isinstance(missing, ModuleNotFoundError) and (missing.name or "").startswith("pycocotools"):
            pytest.skip("needs pycocotools")
        raise


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_skipped_without_pycocotools)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_skipped_without_pycocotools)


def pytest_sessionfinish(session, exitstatus):
    # Interrupted with failures is failed: pytest alone says 2 either way.
    if exitstatus == pytest.ExitCode.INTERRUPTED and session.testsfailed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def coco_mini() -> Path:
    """Directory of the small real COCO set; the test is skipped where it is absent."""
    if not COCO_MINI.is_dir():
        pytest.skip(f"no COCO images at {COCO_MINI} (set DETR_FAST_COCO_MINI)")
    return COCO_MINI
