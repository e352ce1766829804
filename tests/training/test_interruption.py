"""Runs that are stopped, killed or out of space in the middle of an epoch end as if nothing had happened."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_run import ENVIRONMENT, equal_states, rows

from detr_fast.cli import main
from detr_fast.config import Config
from detr_fast.data.loader import EpochLoader
from detr_fast.errors import UsageError
from detr_fast.training import engine, folder, interrupt, trainer
from detr_fast.training.checkpoint import read_checkpoint, save_checkpoint
from detr_fast.training.folder import LOCK, check_space, locked, space_needed
from detr_fast.training.interrupt import GO_ON, Interruption, NoBatch, signal_of

# Eight batches in an epoch, four optimiser steps; sums of the metrics in groups of three; a schedule per step.
FLAGS = [
    "--epochs", "2", "--dropout", "0.2", "--sample_images", "0", "--ema_decay", "0.5", "--accumulate_steps", "2",
    "--print_freq", "3", "--warmup_steps", "3", "--lr_drop", "1", "--batch_size", "1",
]  # fmt: skip
STATE = ("model", "optimizer", "lr_scheduler", "epoch", "steps", "best", "rng", "ema", "categories", "inside")
NAMES = ("checkpoint.pth", "checkpoint_best.pth", "checkpoint0000.pth", "checkpoint0001.pth")
TIMING = {"train_time", "train_data"}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module")
def flags(tiny_flags):
    return [*tiny_flags, *FLAGS]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    assert main(["train", *flags, "--output_dir", str(output)]) == 0
    return output


def assert_equal_runs(one, other):
    for name in NAMES:
        a, b = read_checkpoint(one / name), read_checkpoint(other / name)
        for key in STATE:
            assert equal_states(a[key], b[key]), f"{other.name}, {name}: {key}"
    logs = [[{k: v for k, v in row.items() if k not in TIMING} for row in rows(output)] for output in (one, other)]
    assert logs[0] == logs[1]
    assert not list(other.rglob("*.tmp")) and not (other / LOCK).exists()


# Signals


@pytest.mark.parametrize(
    "step, number, batches",
    [
        pytest.param(3, signal.SIGTERM, 6, id="first_epoch"),
        pytest.param(4, signal.SIGINT, 8, id="its_last_step", marks=pytest.mark.slow),
        pytest.param(7, signal.SIGHUP, 6, id="second_epoch", marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal_and_resumed_equals_undisturbed(
    flags, whole, tmp_path, monkeypatch, capsys, step, number, batches
):
    argv, handlers = ["train", *flags, "--output_dir", str(tmp_path)], [signal.getsignal(n) for n in SIGNALS]
    count, real = itertools.count(1), engine._optimizer_step

    def step_and_signal(*args):
        if next(count) == step:
            os.kill(os.getpid(), number)
        return real(*args)

    with monkeypatch.context() as context:
        context.setattr(engine, "_optimizer_step", step_and_signal)
        assert main(argv) == 128 + number
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    said = capsys.readouterr().err
    assert f"{number.name} after step {step}; saved in" in said and "--resume auto" in said
    stopped = read_checkpoint(tmp_path / "checkpoint.pth")
    assert stopped["steps"] == step and stopped["inside"]["batches"] == batches
    assert main([*argv, "--resume", "auto"]) == 0
    assert_equal_runs(whole, tmp_path)


@pytest.mark.slow
def test_signal_in_an_evaluation_ends_it(flags, whole, tmp_path, monkeypatch):
    argv, count, real = ["train", *flags, "--output_dir", str(tmp_path)], itertools.count(), engine.outputs_of

    def signalled(model, samples):
        if not model.training and next(count) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, samples)

    with monkeypatch.context() as context:
        context.setattr(engine, "outputs_of", signalled)
        assert main(argv) == 143
    assert next(count) == 2 and rows(tmp_path) == []
    assert main([*argv, "--resume", "auto"]) == 0
    assert_equal_runs(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_to_all_processes_of_a_run(flags, whole, tmp_path, ranks, workers, number):
    """The signal goes to the whole process group, loader workers included, as a terminal and a batch system send it."""
    argv = ["train", *flags, "--output_dir", str(tmp_path), "--num_workers", workers, "--epochs", "200"]
    argv += ["--eval_every", "1000", "--lr_drop", "1000"]
    environments = [
        {**ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(ranks)
    ]  # fmt: skip
    for environment in environments:
        environment["MASTER_PORT"] = environments[0]["MASTER_PORT"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "detr_fast", *argv], env=environment if ranks > 1 else ENVIRONMENT,
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        for environment in environments
    ]  # fmt: skip
    try:
        wait_for(lambda: (tmp_path / "checkpoint.pth").exists(), 120)
        for process in processes:
            os.killpg(process.pid, number)
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [128 + number] * ranks, outputs[0][-3000:]
    assert "Traceback" not in outputs[0] and "--resume auto" in outputs[0]
    stopped = read_checkpoint(tmp_path / "checkpoint.pth")
    assert stopped["inside"]["processes"] == ranks and len(stopped["rng"]) == ranks
    assert len(list(tmp_path.glob("*.tmp"))) == 0


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# Checkpoints within an epoch, and kills


@pytest.mark.parametrize("text", ["-1", "10s", "1.5", "nanm", "-3m", "m"])
def test_checkpoint_every_says_what_it_expects(text):
    with pytest.raises(UsageError, match="--checkpoint_every must be steps, such as 500, or minutes"):
        Config(checkpoint_every=text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "every, expected", [("3", [3, 4, 6, 8]), ("0.000001m", [1, 2, 3, 4, 5, 6, 7, 8]), ("0", [4, 8])]
)
def test_checkpoint_every_saves_between_the_epochs_ends(flags, tmp_path, monkeypatch, every, expected):
    saved = []

    def note(state, path):
        if Path(path).name == "checkpoint.pth":
            saved.append(state["steps"])

    monkeypatch.setattr(trainer, "save_checkpoint", note)
    assert main(["train", *flags, "--output_dir", str(tmp_path), "--checkpoint_every", every]) == 0
    assert sorted(set(saved)) == expected


def test_position_in_an_epoch_of_other_batches_is_not_taken(flags, tmp_path, capsys):
    argv = ["train", *flags, "--output_dir", str(tmp_path), "--checkpoint_every", "1"]
    checkpoint = make_stopped(argv, tmp_path)
    assert checkpoint["inside"]["batches"] == 2
    assert main([*argv, "--resume", "auto", "--batch_size", "2", "--epochs", "1"]) == 0
    assert "batch_size was 1 and is 2: epoch 0 begins anew with the weights of step 1" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "checkpoint.pth")["steps"] == 1 + 2


@pytest.mark.parametrize("change", [["--augmentation", "flip"], ["--no_aux_loss"]], ids=lambda change: change[0])
def test_position_in_an_epoch_of_other_batches_or_losses_is_not_taken(flags, tmp_path, capsys, change):
    argv = ["train", *flags, "--dec_layers", "2", "--output_dir", str(tmp_path), "--checkpoint_every", "1"]
    make_stopped(argv, tmp_path)
    assert main([*argv, "--resume", "auto", "--epochs", "1", *change]) == 0
    assert "epoch 0 begins anew with the weights of step 1" in capsys.readouterr().out


def test_what_is_ignored_stays_ignored():
    """As SIGHUP under nohup, so that the run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.after_step(1) == GO_ON
            signal.raise_signal(signal.SIGTERM)
            assert signal_of(interruption.after_step(2)) == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def make_stopped(argv, output):
    """Leaves the checkpoint of the first step."""
    with pytest.MonkeyPatch.context() as context:
        count, real = itertools.count(), engine._optimizer_step

        def fail_later(*args):
            if next(count) == 1:
                raise KeyboardInterrupt
            return real(*args)

        context.setattr(engine, "_optimizer_step", fail_later)
        assert main(argv) == 130
    return read_checkpoint(output / "checkpoint.pth")


@pytest.mark.slow
def test_killed_at_fifty_moments_and_resumed_equals_undisturbed(flags, whole, tmp_path):
    script = Path(__file__).with_name("killed_runs.py")
    argv = [sys.executable, str(script), str(tmp_path), "50", *flags, "--checkpoint_every", "1"]
    subprocess.run(argv, env=ENVIRONMENT, check=True, timeout=1800)
    outputs = sorted(tmp_path.glob("killed*"))
    assert len(outputs) == 50
    for output in outputs:
        assert_equal_runs(whole, output)


ELASTIC = """
import os, signal, sys
from pathlib import Path
from detr_fast import cli
from detr_fast.training import engine
marker, victim, *argv = sys.argv[1:]
steps, real = 0, engine._optimizer_step
def step(*args):
    global steps
    steps += 1
    if steps == 3 and os.environ["RANK"] == victim and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
engine._optimizer_step = step
sys.exit(cli.main(argv))
"""


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_restarts_after_a_killed_rank_and_the_weights_are_the_same(flags, tmp_path, nodes):
    (tmp_path / "worker.py").write_text(ELASTIC)
    outputs, environment = [], {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for name, victim in (("undisturbed", "none"), ("killed", "1")):
        outputs.append(tmp_path / name)
        argv = ["train", *flags, "--output_dir", str(outputs[-1]), "--checkpoint_every", "1", "--resume", "auto"]
        port = free_port()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node",
                    str(2 // nodes), "--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-id", name,
                    "--rdzv-endpoint", f"127.0.0.1:{port}"]  # fmt: skip
        worker = [str(tmp_path / "worker.py"), str(tmp_path / f"{name}.died"), victim, *argv]
        agents = [
            subprocess.Popen([*torchrun, *worker], env=environment, cwd=tmp_path, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
            for _ in range(nodes)
        ]  # fmt: skip
        try:
            texts = [agent.communicate(timeout=400)[0] for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
        assert [agent.returncode for agent in agents] == [0] * nodes, "\n".join(text[-3000:] for text in texts)
    assert (tmp_path / "killed.died").exists()
    assert_equal_runs(*outputs)


# Disk


@pytest.fixture(scope="module")
def checkpoint_bytes(whole):
    return (whole / "checkpoint.pth").stat().st_size


def full_disk_run(argv, output, limit, capsys):
    """Trains with files limited to so many bytes: what is beyond them is refused as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("share", [0.5, pytest.param(0.0001, marks=pytest.mark.slow), *(
    pytest.param(share, marks=pytest.mark.slow) for share in (0.01, 0.3, 0.9, 0.999)
)])  # fmt: skip
def test_full_disk_ends_with_a_sentence_and_keeps_the_checkpoint(
    flags, whole, tmp_path, capsys, checkpoint_bytes, share
):
    argv = ["train", *flags, "--output_dir", str(tmp_path), "--checkpoint_every", "1"]
    make_stopped(argv, tmp_path)
    kept = (tmp_path / "checkpoint.pth").read_bytes()
    capsys.readouterr()
    limit = int(share * checkpoint_bytes)
    code, said = full_disk_run([*argv, "--resume", "auto"], tmp_path, limit, capsys)
    assert code == 2 and len(said.splitlines()) == 1, said
    assert f"the disk of {tmp_path} is full" in said and "checkpoint.pth is kept. Make" in said and "MB free" in said
    assert (tmp_path / "checkpoint.pth").read_bytes() == kept and not list(tmp_path.glob("*.pth.tmp"))
    assert main([*argv, "--resume", "auto"]) == 0
    assert_equal_runs(whole, tmp_path)


@pytest.mark.slow
def test_full_disk_without_a_checkpoint_says_so(flags, tmp_path, capsys, checkpoint_bytes):
    argv = ["train", *flags, "--output_dir", str(tmp_path), "--max_steps", "1"]
    code, said = full_disk_run(argv, tmp_path, checkpoint_bytes // 2, capsys)
    assert code == 2 and "after step 1; no checkpoint is kept" in said


def test_too_little_space_is_refused_before_training(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10, 10))
    assert main(["train", *flags, "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "0.0 MB are free and" in said and "nothing was trained" in said


def test_space_for_the_first_checkpoints_only_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 40 * 10**6))
    assert check_space(tmp_path, 10**7, 0) is None  # one that is being written, the last, the best, and 1 MB
    assert "3 numbered checkpoints, 61.0 MB are needed" in check_space(tmp_path, 10**7, 3)
    with pytest.raises(UsageError, match="40.0 MB are free and 61.0 MB are needed"):
        check_space(tmp_path, 2 * 10**7, 0)


def test_left_overs_are_removed_and_other_files_stay(tmp_path):
    (tmp_path / "eval").mkdir()
    for name in ("checkpoint_best.pth.tmp", "log.txt.tmp", "eval/latest.pth.tmp", "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    folder.remove_left_overs(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.tmp")] == ["mine.tmp"]


# Damage


def saved(tmp_path):
    path = tmp_path / "checkpoint.pth"
    generator = torch.Generator().manual_seed(0)
    model = {f"layer{i}.weight": torch.randn(40, 30, generator=generator) for i in range(8)}
    save_checkpoint({"model": model, "epoch": 3, "args": {"lr": 0.1}}, path)
    return path


def test_a_flipped_bit_or_a_zeroed_block_in_a_weight_is_refused(tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    weight = data.index(read_checkpoint(path)["model"]["layer3.weight"].numpy().tobytes())
    for start, block in ((weight + 2, bytes([data[weight + 2] ^ 1])), (weight + 1000, bytes(512))):
        path.write_bytes(data[:start] + block + data[start + len(block) :])
        with pytest.raises(ValueError, match="checkpoint.pth' is damaged: the checksum of .*data/"):
            read_checkpoint(path)


@pytest.mark.parametrize("flips", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_flipped_bits_are_refused_or_harmless(tmp_path, flips):
    path = saved(tmp_path)
    expected, data, draw = read_checkpoint(path), path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(flips):
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            assert equal_states(read_checkpoint(path), expected), place
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > flips // 2


def test_resuming_names_the_damaged_file(flags, whole, tmp_path, capsys):
    data = bytearray((whole / "checkpoint.pth").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "checkpoint.pth").write_bytes(data)
    assert main(["train", *flags, "--output_dir", str(tmp_path), "--resume", "auto"]) == 2
    assert f"'{tmp_path}/checkpoint.pth' is damaged" in capsys.readouterr().err


# Two runs in one folder


HOLDER = """
import sys, time
from pathlib import Path
from detr_fast.training.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_in_use_is_refused_and_a_dead_runs_is_not(tmp_path, tiny_flags, capsys):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            assert main(["train", *tiny_flags, "--epochs", "1", "--output_dir", str(tmp_path)]) == 2
            said = capsys.readouterr().err
            assert f"in use by process {holder.pid} on {socket.gethostname()}, started 20" in said
        finally:
            holder.kill()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


# A worker that hangs


class Hanging(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            time.sleep(1)  # the batch before is sent by a thread of this process
            os.kill(os.getpid(), signal.SIGSTOP)
        return index


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_run_and_its_samples_are_named():
    loader = EpochLoader(Hanging(), 2, num_workers=2, timeout=5, persistent_workers=True)
    seen = []
    try:
        with pytest.raises(TimeoutError, match="no batch for 5 seconds; it is to read sample 4, sample 5"):
            for batch in loader:
                seen += batch.tolist()
        workers = loader._iterator._workers
    finally:
        loader.close()
    assert seen == [0, 1, 2, 3]
    for worker in workers:
        worker.join(5)
    assert not any(worker.is_alive() for worker in workers)


WAITS = """
import sys
from test_interruption import Hanging
from detr_fast import cli
from detr_fast.training import trainer
real = trainer.loader_for
def loader_for(task, dataset, config, train):
    class Hangs(type(dataset)):
        def __getitem__(self, index):
            Hanging()[5 if index == dataset_end else 0]
            return super().__getitem__(index)
    dataset_end = len(dataset) - 1
    if train:
        dataset.__class__ = Hangs
    return real(task, dataset, config, train)
trainer.loader_for = loader_for
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_signal_ends_a_run_that_waits_for_a_batch(flags, tmp_path):
    argv = ["train", *flags, "--output_dir", str(tmp_path), "--num_workers", "1", "--checkpoint_every", "1"]
    process = subprocess.Popen([sys.executable, "-c", WAITS, *argv], env=ENVIRONMENT, cwd=Path(__file__).parent,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    try:
        wait_for(lambda: (tmp_path / LOCK).exists(), 60)
        time.sleep(8)
        process.terminate()
        said = process.communicate(timeout=40)[0]
    finally:
        process.kill()
    assert process.returncode == 143 and "stopped by SIGTERM after step" in said and "while no batch came; " in said
    assert "Traceback" not in said and "--resume auto" in said


def test_a_signal_is_heeded_where_no_batch_comes(monkeypatch):
    """Not before `_WAIT` seconds, and not while a step is computed."""
    monkeypatch.setattr(interrupt, "_WAIT", 0.2)
    loader = EpochLoader(list(range(4)), 2)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(NoBatch) as stop, Interruption("", [loader]) as interruption:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.4)
        assert signal_of(interruption.after_step(1)) == signal.SIGTERM
        loader.waits_since = time.monotonic()
        time.sleep(5)
    assert stop.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


ENDS_BY_ITSELF = """
import torch
from test_interruption import Hanging
from detr_fast.data import EpochLoader
try:
    list(EpochLoader(Hanging(), 2, num_workers=2, timeout=3))
except TimeoutError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_program_ends_after_the_timeout_of_a_hanging_worker():
    done = subprocess.run(
        [sys.executable, "-c", ENDS_BY_ITSELF], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "it is to read sample 4, sample 5" in done.stdout, done.stderr


def test_the_disk_full_message_asks_for_what_a_resumed_run_needs(tmp_path, monkeypatch):
    needed = space_needed(tmp_path, 500)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    assert check_space(tmp_path, 500, 0) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    with pytest.raises(UsageError, match="are needed"):
        check_space(tmp_path, 500, 0)


def test_an_iteration_may_begin_within_its_epoch():
    loader = EpochLoader(list(range(11)), 2, shuffle=True, seed=3)
    loader.set_epoch(4)
    batches = [batch.tolist() for batch in loader]
    loader.set_epoch(4, 3)
    assert [batch.tolist() for batch in loader] == batches[3:]
    assert [batch.tolist() for batch in loader] != batches  # the next epoch, and whole
    assert loader.epoch_sampler.epoch == 6 and len(loader) == 6
