"""What the command line asks for, done: suites measured, printed, saved and drawn."""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from detr_fast.ops._dispatch import kernels_chosen

from . import SUITES, plan
from .harness.case import Row, Settings
from .harness.ceilings import measure_ceilings
from .harness.markers import NOTES, replace_between
from .harness.measure import run_case
from .harness.provenance import device_name, provenance, slug
from .harness.results import load, load_record, save, suite_record
from .harness.spec import PADDINGS, Spec
from .harness.table import print_case, print_ceilings

# Shares of the time that a whole run has for measuring (of what the training step leaves), and the seconds a process
# takes before it measures.
TRAIN_SHARE = 0.3
SHARES = {
    "pad_collate": 0.12, "sine_position": 0.1, "attention": 0.36, "multihead_attention": 0.17, "folded_conv": 0.08,
    "matching_cost": 0.03, "assign": 0.04, "joint_softmax": 0.05, "pointwise_conv": 0.05,
}  # fmt: skip
START_UP = 6.0


def run(args: argparse.Namespace) -> int:
    """Runs what `args` asks for.

    Returns:
        The exit status: 1 if a provider of ours is wrong or fails, else 0.

    Raises:
        ValueError: `--device cuda` where there is none, an unknown padding or kind.
    """
    _validate(args)
    if args.suite == "report":
        return _report(args)
    if args.suite == "static":
        from .studies.static import run_static

        return run_static(not args.no_save)
    if args.suite in ("train", "infer", "latency") and args.interpret:
        raise ValueError(f"{args.suite}: not through the interpreter; expected a GPU, or a CPU without --interpret")
    if args.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        # The interpreter must be chosen before Triton is imported.
        return _again(args, args.suite, {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"})
    if args.suite == "all":
        return _run_all(args)
    if args.suite == "tune":
        from .studies.tune import run_tune

        return run_tune(args, _device(args))
    if args.suite == "train":
        from .studies.train import run_train

        return run_train(args, _device(args))
    if args.suite == "infer":
        from .studies.infer import run_infer

        return run_infer(args, _device(args))
    if args.suite == "latency":
        from .studies.latency import run_latency

        return run_latency(args, _device(args))
    return _run_suite(args)


def _report(args: argparse.Namespace) -> int:
    from . import goals
    from .report import cpu_training, padding_share, same_training, update_readme, versions

    results = args.output or Path("benchmarks/results")
    notes = replace_between(NOTES, "predictions", goals.table(load(results)))
    notes = replace_between(NOTES, "padding-share", padding_share(results)) and notes
    notes = replace_between(NOTES, "cpu-training", cpu_training(results)) and notes
    notes = replace_between(NOTES, "same-training", same_training(results)) and notes
    notes = replace_between(NOTES, "versions", versions(results)) and notes
    return update_readme(args.readme, results) or int(not notes)


def _validate(args: argparse.Namespace) -> None:
    for padding in args.padding or ():
        share = padding[5:] if padding.startswith("valid") else ""
        if padding not in PADDINGS and not (share.isdigit() and 1 <= int(share) <= 100):
            raise ValueError(f"--padding {padding}: expected one of {', '.join(PADDINGS)}, or valid1 to valid100")
    kinds = {kind for suite in SUITES for kind in plan.suite_module(suite).KINDS if kind}
    for kind in args.kind or ():
        if kind not in kinds:
            raise ValueError(f"--kind {kind}: expected one of {', '.join(sorted(kinds))}")
    for batch in args.batch or ():
        if batch < 1:
            raise ValueError(f"--batch {batch}: expected at least 1")
    for dropout in args.dropout or ():
        if not 0 <= dropout < 1:
            raise ValueError(f"--dropout {dropout}: expected 0 <= p < 1")


def _argv(args: argparse.Namespace, suite: str) -> list[str]:
    """The command line that gives `args` again, for `suite`."""
    argv = [suite]
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if name in _OWN_OPTIONS and value is not None and value is not False:
            argv += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    return argv


_OWN_OPTIONS = {
    "quick", "device", "budget", "interpret", "check_only", *plan.CHOICES, "provider", "launch", "compile", "seed",
    "output", "no_plots", "no_save",
}  # fmt: skip


def _again(args: argparse.Namespace, suite: str, environment: dict[str, str], timeout: float | None = None) -> int:
    """Runs one suite in a process of its own; 124 if it did not end in `timeout` seconds."""
    command = [sys.executable, "-m", __package__, *_argv(args, suite)]
    try:
        return subprocess.run(command, env=os.environ | environment, timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        print(
            f"{suite}: stopped after {timeout:.0f} s; what was measured until then is in its results file", flush=True
        )
        return 124


def _run_all(args: argparse.Namespace) -> int:
    """Every suite in a process of its own, so that a broken kernel does not take the other suites with it."""
    status = {}
    shares = {suite: (1 - TRAIN_SHARE) * SHARES.get(suite, 0.03) for suite in SUITES} | {"train": TRAIN_SHARE}
    if args.interpret:
        del shares["train"]  # no kernel of its own
    for suite, share in shares.items():
        budget = timeout = None
        if args.budget is not None:
            budget = max(1.0, share * (args.budget - START_UP * len(shares)))
            # A case that has begun may end.
            timeout = START_UP + 1.1 * budget + 8.0
        status[suite] = _again(argparse.Namespace(**vars(args) | {"budget": budget}), suite, {}, timeout)
    for suite, code in status.items():
        if code:
            print(f"{suite}: exit status {code}")
    return int(any(status.values()))


def _device(args: argparse.Namespace) -> torch.device:
    """The device asked for; a CUDA one with its index."""
    cuda = torch.cuda.is_available()
    device = torch.device(args.device or ("cuda" if cuda and not args.interpret else "cpu"))
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {args.device}: expected cuda or cpu")
    if device.type == "cuda":
        if not cuda:
            raise ValueError("--device cuda: PyTorch finds no CUDA GPU here")
        device = torch.device("cuda", device.index or 0)
    return device


def _specs(args: argparse.Namespace, device: torch.device) -> list[Spec]:
    if args.interpret:
        base = plan.interpreter_plan(args.suite)
    elif device.type == "cuda":
        base = plan.gpu_plan(args.suite, args.quick)
    else:
        base = plan.cpu_plan(args.suite, args.quick)
    chosen = {name: getattr(args, name) for name in plan.CHOICES if getattr(args, name) is not None}
    return plan.chosen_plan(args.suite, base, chosen)


def _announce(args: argparse.Namespace, device: torch.device) -> None:
    if args.interpret:
        print(
            "Triton's interpreter: the kernels' results on tiny shapes. Not shown: time, memory, anything in bfloat16 "
            "(the interpreter rounds it wrongly), races, what only the compiler refuses."
        )
    elif device.type == "cpu":
        print(
            f"CPU ({device_name(device)}): the ops run in plain PyTorch, on small shapes. Not measured without "
            "a GPU: the kernels, CUDA graphs, peers that exist on CUDA only, peak memory. Other work on the machine "
            "shows in the times."
        )


def _run_suite(args: argparse.Namespace) -> int:
    started = time.monotonic()
    device = _device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _announce(args, device)
    specs = _specs(args, device)
    check_only = args.check_only or args.interpret
    settings = Settings(
        device=device,
        launches=tuple(launch for launch in args.launch if launch == "eager" or device.type == "cuda"),
        seconds_per_case=0.2 if args.quick else 0.5,
        min_rounds=5 if device.type == "cuda" else 3,
        check_only=check_only,
        seed=args.seed,
    )
    compile_peers = device.type == "cuda" if args.compile == "auto" else args.compile == "yes"
    ceilings = None
    if not check_only and specs:
        ceilings = measure_ceilings(device, sorted({spec.precision for spec in specs}), args.quick)
        print_ceilings(ceilings, device_name(device))
    scale = plan.scale_for(device, args.quick, args.interpret)
    record = suite_record(args.suite, provenance(device), _argv(args, args.suite), ceilings)
    folder = args.output or Path("benchmarks/results") / slug(device_name(device))
    saving = not args.no_save and not check_only
    for spec in specs:
        if args.budget is not None and time.monotonic() - started > args.budget:
            record["not_measured"].append({"case": str(spec), "reason": f"time budget of {args.budget:g} s"})
            continue
        rows = _run_spec(spec, args, settings, ceilings, scale, compile_peers)
        record["rows"] += rows
        print_case(rows)
        if saving:
            save(record, folder)
    if saving and specs:
        saved = save(record, folder)
        print(f"results: {saved}")
        if not args.no_plots:
            from .plots import plot_suite

            for path in plot_suite(load_record(saved), folder):
                print(f"plot: {path}")
    for left in record["not_measured"]:
        print(f"not measured: {left['case']}: {left['reason']}")
    return int(
        any(row.status in ("wrong", "failed") and row.provider.startswith("detr_fast") for row in record["rows"])
    )


def _run_spec(spec, args, settings, ceilings, scale, compile_peers) -> list[Row]:
    if compile_peers:
        torch._dynamo.reset()  # or the recompilation limit is reached after a few shapes
    case, providers = plan.build(spec, scale, settings.device, compile=compile_peers, quick=args.quick)
    if not kernels_chosen(settings.device):
        providers = [dataclasses.replace(p, label=f"plain PyTorch; {p.label}") if p.ours else p for p in providers]
    if args.provider:
        providers = [p for p in providers if any(part.lower() in p.name.lower() for part in args.provider)]
    return run_case(case, providers, ceilings, settings)
