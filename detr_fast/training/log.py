"""What a run tells: a progress bar or lines, averages of its losses, and its log files.

Source of the names in log.txt: facebookresearch/detr, main.py and util/misc.py.
"""

import csv
import datetime
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from detr_fast.distributed import get_world_size, is_main_process

try:
    import resource
except ImportError:  # Windows
    resource = None

# pycocotools' twelve numbers, in its order.
COCO_STATS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


class Metrics:
    """Averages of values that come once per step.

    Values on a device stay there, one small tensor per step, until somebody asks: no step waits for them.
    """

    def __init__(self):
        self._names: list[str] | None = None
        self._earlier: Tensor | None = None  # [steps, names] of a checkpoint
        self._pending: list[tuple[Tensor, list[float]]] = []  # of each step what is on the device, and what is not
        self._known: list[int] = []  # places of the latter among the names
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._latest: dict[str, float] = {}

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor | float]) -> None:
        """Takes one step's values.

        Args:
            values: 0-dimensional tensors on one device, and numbers; every step with the same names.

        Raises:
            ValueError: other names than in the first step.
        """
        if self._names is None:
            self._names = list(values)
        elif self._names != list(values):
            raise ValueError(f"the metrics of a step are {sorted(values)}, those of the first were {self._names}")
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        self._known = [i for i, value in enumerate(values.values()) if not isinstance(value, Tensor)]
        known = [value for value in values.values() if not isinstance(value, Tensor)]
        self._pending.append((torch.stack(tensors), known))

    def latest(self) -> dict[str, float]:
        """Means over the steps since the last call, in this process. Waits for the device."""
        rows = self._rows()
        if rows is not None:
            self._earlier = None
            self._pending.clear()
            for name, value in zip(self._names, rows.sum(dim=0).tolist(), strict=True):
                self._sums[name] = self._sums.get(name, 0.0) + value
            self._steps += len(rows)
            self._latest = dict(zip(self._names, rows.mean(dim=0).tolist(), strict=True))
        return self._latest

    def _rows(self) -> Tensor | None:
        """[steps, names] float64 of the steps that nobody has read yet; None if there are none."""
        parts = [] if self._earlier is None else [self._earlier]
        if self._pending:
            rows = torch.empty(len(self._pending), len(self._names), dtype=torch.float64)
            computed = [i for i in range(len(self._names)) if i not in self._known]
            rows[:, computed] = torch.stack([row for row, _ in self._pending]).cpu().double()
            rows[:, self._known] = torch.tensor([known for _, known in self._pending], dtype=torch.float64)
            parts.append(rows)
        return torch.cat(parts) if parts else None

    def averages(self, device: torch.device) -> dict[str, float]:
        """Means over all steps of all processes; every process has to call it.

        Args:
            device: where the processes' process group exchanges tensors.
        """
        self.latest()
        names = list(self._sums)
        values = torch.tensor([self._sums[name] for name in names] + [self._steps], dtype=torch.float64)
        if get_world_size() > 1:
            values = values.to(device)
            dist.all_reduce(values)
        *sums, steps = values.tolist()
        return {name: value / steps for name, value in zip(names, sums, strict=True)} if steps else {}

    def state(self) -> dict:
        """For a checkpoint: sums, and the steps that nobody has read yet, as they are. Waits for the device."""
        return {"names": self._names, "pending": self._rows(), "sums": dict(self._sums), "steps": self._steps}

    def load_state(self, state: Mapping) -> None:
        """Sets what `state` returned."""
        self._names, self._sums, self._steps = state["names"], dict(state["sums"]), state["steps"]
        # Added up later in the same groups of steps, and so to the same last bit, as without the interruption.
        self._earlier, self._pending = state["pending"], []


class Progress:
    """Goes through `batches`, measuring time; shows a bar on a terminal and lines elsewhere, in the first process only.

    Args:
        batches: the loader, with a length.
        header: what stands in front, such as "Epoch: [3]".
        metrics: whose latest means are shown; its "loss", "class_error" and "padding" where it has them.
        print_freq: show (and therefore read) the metrics every so many steps.
        device: whose memory is shown.
        limit: stop after so many batches; None: after all.
        first: batches of this epoch that were gone through in an earlier process; `batches` yields those after them.
    """

    def __init__(
        self,
        batches: Iterable,
        header: str,
        metrics: Metrics,
        print_freq: int,
        device: torch.device,
        limit: int | None = None,
        first: int = 0,
    ):
        self._limit, self._first = limit, first
        self._batches, self._header, self._metrics = batches, header, metrics
        self._print_freq, self._device = print_freq, device
        self.seconds_per_step = 0.0
        self.data_seconds_per_step = 0.0

    def __iter__(self) -> Iterator:
        first = self._first
        total = len(self._batches) if self._limit is None else min(self._limit, len(self._batches))
        terminal = sys.stderr.isatty()
        bar = tqdm(
            total=total,
            initial=first,
            desc=self._header,
            disable=not (terminal and is_main_process()),
            dynamic_ncols=True,
        )
        start = shown_at = time.perf_counter()
        waited = waited_before = 0.0
        shown = first
        before = time.perf_counter()
        with bar:
            for step, batch in enumerate(itertools.islice(self._batches, total - first), first):
                waited += time.perf_counter() - before
                yield batch
                done = step + 1
                bar.update()
                if done % self._print_freq == 0 or done == total:
                    latest = self._metrics.latest()
                    now = time.perf_counter()
                    per_step, data = (now - shown_at) / (done - shown), (waited - waited_before) / (done - shown)
                    text = self._text(latest, per_step, data)
                    if terminal:
                        bar.set_postfix_str(text)
                    elif is_main_process():
                        eta = datetime.timedelta(seconds=int((now - start) / (done - first) * (total - done)))
                        print(f"{self._header} [{done:{len(str(total))}d}/{total}]  eta: {eta}  {text}", flush=True)
                    shown_at, shown, waited_before = now, done, waited
                before = time.perf_counter()
                self.seconds_per_step = (before - start) / (done - first)
                self.data_seconds_per_step = waited / (done - first)

    def _text(self, latest: Mapping[str, float], per_step: float, data: float) -> str:
        parts = [f"{name}: {latest[name]:.4g}" for name in ("lr", "loss", "class_error") if name in latest]
        parts += [f"time: {per_step:.3f}", f"data: {data:.3f}"]
        if "padding" in latest:
            parts.append(f"padding: {latest['padding']:.0%}")
        memory = max_memory_mb(self._device)
        if memory is not None:
            parts.append(f"max mem: {memory:.0f} MB")
        return "  ".join(parts)


def max_memory_mb(device: torch.device) -> float | None:
    """The most memory used so far, in MiB: of torch's allocator on a GPU, of the process on the CPU.

    None where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class RunLog:
    """The log files of a run: log.txt (JSON lines), metrics.csv (the same as a table) and, if asked for, TensorBoard.

    Only the first process makes one.

    Args:
        output_dir: an existing folder.
        start_epoch: lines of this epoch and later ones, which a resumed run writes again, are removed; 0 removes all.
        tensorboard: also write event files to ``output_dir/tensorboard``.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
    """

    def __init__(self, output_dir: str | os.PathLike, start_epoch: int, tensorboard: bool = False):
        self.output_dir = Path(output_dir)
        self.rows = [row for row in read_log(self.output_dir) if row["epoch"] < start_epoch]
        self._write()
        self._writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
            self._writer = SummaryWriter(self.output_dir / "tensorboard", purge_step=start_epoch)

    def append(self, row: Mapping) -> None:
        """Adds an epoch's numbers: "epoch" and whatever else, as the original names it."""
        self.rows.append(dict(row))
        self._write()
        if self._writer is not None:
            for name, value in scalars(row).items():
                if name != "epoch":
                    self._writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            self._writer.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        _replace(self.output_dir / "log.txt", "".join(json.dumps(row) + "\n" for row in self.rows))
        rows = [scalars(row) for row in self.rows]
        names = list(dict.fromkeys(["epoch", *(name for row in rows for name in row)]))
        temporary = self.output_dir / "metrics.csv.tmp"
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, names)
            table.writeheader()
            table.writerows(rows)
        os.replace(temporary, self.output_dir / "metrics.csv")


def scalars(row: Mapping) -> dict[str, float]:
    """A log row with COCO's lists of twelve numbers and its panoptic dicts taken apart: ``test_coco_eval_bbox_AP50``,
    ``test_PQ_all_pq`` and so on."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat.update({f"{name}_{stat}": v for stat, v in zip(COCO_STATS, value, strict=True)})
        elif isinstance(value, dict):
            flat.update({f"{name}_{key}": v for key, v in value.items()})
        else:
            flat[name] = value
    return flat


def read_log(output_dir: str | os.PathLike) -> list[dict]:
    """The rows of ``output_dir/log.txt``; none if there is no such file.

    Raises:
        ValueError: a line is not a log line.
    """
    path = Path(output_dir) / "log.txt"
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or "epoch" not in row:
            raise ValueError(f"{path}, line {number} has no 'epoch'; expected a line of a training log")
        rows.append(row)
    return rows


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
