"""The command line: `python -m benchmarks` and `detr-fast bench`. Imports nothing heavy until something runs."""

import argparse
import sys
from pathlib import Path

from . import PRECISIONS, SUITES

SHORT = {"collate": "pad_collate", "position": "sine_position", "mha": "multihead_attention"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's arguments to `parser`; `run` takes what it parses."""
    parser.add_argument(
        "suite", choices=[*SUITES, "train", "infer", "latency", "all", "report", "static", "tune"],
        type=lambda name: SHORT.get(name, name),
        help="the op to measure (collate, position and mha are short for three of them); train: the whole training "
        "step, ours beside the original's; infer: inference on a CPU, ours beside others'; latency: one image, call "
        "by call and as a CUDA graph; all: every op and the step; report: write "
        "the tables of README and NOTES from the results; static: what the "
        "compiler says; tune: which tile sizes are fastest on this GPU",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few cases, short measurements")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument(
        "--budget", type=float, metavar="S", help="seconds; cases that no longer fit are listed as such"
    )
    parser.add_argument(
        "--interpret", action="store_true",
        help="only check the kernels, through Triton's interpreter on tiny shapes (no GPU needed, nothing is timed)",
    )  # fmt: skip
    parser.add_argument("--check-only", "--check_only", action="store_true", help="check every provider, time none")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="only these")
    parser.add_argument("--mode", nargs="+", choices=["forward", "backward", "both"], help="only these")
    parser.add_argument("--batch", nargs="+", type=int, help="images per batch, only these sizes")
    parser.add_argument("--model", nargs="+", choices=["R50", "R101", "DC5"], help="only these; R101: for train")
    parser.add_argument(
        "--padding", nargs="+", help="none, coco, coco-dense, or validNN: about NN %% of the tokens valid"
    )
    parser.add_argument(
        "--kind", nargs="+",
        help="attention: encoder, cross, decoder; pad_collate: float, uint8, packed; assign: boxes, lines; "
        "folded_conv: 3x3, residual, stem; pointwise_conv: reduce, expand, expand-deep, input-grad",
    )  # fmt: skip
    parser.add_argument("--dropout", nargs="+", type=float, help="probabilities, only these")
    parser.add_argument("--provider", nargs="+", help="only providers whose name contains one of these")
    parser.add_argument(
        "--launch", nargs="+", choices=["eager", "graph"], default=["eager", "graph"],
        help="call by call, or as a CUDA graph; default: both where there is a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--compile", choices=["auto", "yes", "no"], default="auto",
        help="measure providers that need torch.compile; auto: on a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--case", nargs="+", choices=["one", "four", "mixed"], help="infer: only these; the others stay in the results"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--output", type=Path, help="folder of the results; default: benchmarks/results/<device>")
    parser.add_argument("--no-plots", "--no_plots", action="store_true", help="no pictures beside the results")
    parser.add_argument("--no-save", "--no_save", action="store_true", help="print only")
    parser.add_argument("--write", action="store_true", help="tune: put what is faster into kernels/_configurations.py")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="the file that report writes to")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["annotations"]:  # it has options of its own
        from .studies import annotations

        return annotations.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        allow_abbrev=False,
        description="Microbenchmarks of the fused ops. `annotations` measures how a large json is opened.",
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except ValueError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> int:
    """Runs what `args` (of `add_arguments`) asks for; returns the exit status, see `runner.run`.

    Raises:
        ValueError: options that cannot be honoured, such as a device that is not there.
    """
    from . import runner

    return runner.run(args)
