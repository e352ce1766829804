"""The command line: ``detr-fast train | eval | predict | convert | export | check-data | bench | doctor | demo``."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from detr_fast import __version__
from detr_fast.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    flag_names,
    get_args_parser,
    usage_errors,
)
from detr_fast.errors import CallbackError, InterruptedRun, NonFiniteLossError, UsageError
from detr_fast.flags import add_flags, command_parser, did_you_mean, normalise_options, parse_with_given

_TRACEBACK = "DETR_FAST_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        The exit code: 0; 1 if `check-data` found errors, `predict` could not read an image, `doctor` found a wrong
        kernel, or what `export` made differs from the model; 2 for a user's error, whose message is printed to stderr;
        128 + its number after a signal (SIGINT 130, SIGTERM 143, SIGHUP 129). With DETR_FAST_TRACEBACK=1 in the
        environment errors are raised instead, to see where they come from.
    """
    _ready_streams()
    argv = normalise_options(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] == "--print_completion":
        return _print_completion(argv[1:])
    if argv[0] not in _COMMANDS:
        guess = did_you_mean(argv[0], _COMMANDS)
        return _complain(f"unknown command {argv[0]!r}{guess or '; the commands are ' + ', '.join(_COMMANDS)}")
    make_parser, run, _ = _COMMANDS[argv[0]]
    try:
        args, given = parse_with_given(make_parser(), argv[1:])
        code = run(args, given)
        _leave_processes()
        return code
    except SystemExit as error:  # argparse, after --help
        return int(error.code or 0)
    except KeyboardInterrupt:
        print("detr-fast: interrupted", file=sys.stderr)
        return 130
    except InterruptedRun as stop:
        print(f"detr-fast: {stop}", file=sys.stderr, flush=True)
        _leave_processes()
        return 128 + stop.signal
    except (ValueError, OSError, NotImplementedError, NonFiniteLossError, CallbackError) as error:
        if os.environ.get(_TRACEBACK) == "1":
            raise
        return _complain(_message(error))


def _ready_streams() -> None:
    """Output that was closed (`>&-`) is dropped, and a character that the terminal's encoding lacks is written as an
    escape: neither ends a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Else the next file that is opened gets the closed one's number, and what C libraries print.
            setattr(sys, name, open(os.devnull, "w"))
        elif getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _leave_processes() -> None:
    # Most commands are done without torch; whoever has joined a process group has imported it.
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _train_parser() -> argparse.ArgumentParser:
    return command_parser(
        "train",
        "Trains DETR on labelled images: a folder in COCO's, Roboflow's, YOLO's or Pascal VOC's layout.\n"
        "For several GPUs:\n  torchrun --nproc-per-node N -m detr_fast train …",
        help_all=True,
        usage="detr-fast train --data DIR [--weights detr_resnet50 --preset finetune] [--output_dir DIR] [FLAG …]\n"
        "       detr-fast train --coco_path DIR …, with COCO's own ids as labels, as the original\n"
        "       detr-fast train --train_ann JSON --train_images DIR --val_ann JSON --val_images DIR …",
        parents=[get_args_parser()],
    )


def _train(args: argparse.Namespace, given: set[str]) -> int:
    config = Config.from_mapping({name: getattr(args, name) for name in given})
    if not config.eval:
        from detr_fast.inference.starting import weights_reader
        from detr_fast.training.trainer import train

        train(config, read_weights=weights_reader(given))
        return 0
    path = config.resume or config.weights
    if not path or path == "auto" or (config.resume and config.weights):
        raise UsageError(
            "--eval needs one checkpoint, --resume PATH or --weights PATH; got "
            f"--resume {config.resume!r} and --weights {config.weights!r}"
        )
    from detr_fast.inference.evaluation import evaluate_checkpoint

    evaluate_checkpoint(config, given, path)
    return 0


# Of data and run only what evaluation reads; where the flags of a part are all offered, the idle ones say so.
_TRAIN_DATA = ("remove_difficult", "augmentation", "train_ann", "train_images")


def _eval_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "eval",
        "Evaluates a checkpoint: COCO's numbers (of lines: their structural average precision), and a report.\n"
        "The flags of model and loss are the checkpoint's own; give them for bare weights only.",
        help_all=True,
        usage="detr-fast eval --weights PATH (--data DIR | --coco_path DIR | --val_ann JSON --val_images DIR) [FLAG …]",
    )
    _add_weights(parser, "--checkpoint", "--resume")
    add_flags(parser, DataConfig, without=_TRAIN_DATA, inference=True)
    parser.add_argument("--batch_size", default=2, type=int, help="images per process")
    parser.add_argument(
        "--output_dir",
        default="",
        metavar="DIR",
        help="gets eval.pth, eval/report.html and, for COCO's server, results.json; without it nothing is saved",
    )
    run = ("eval_backend", "print_freq", "seed", "world_size", "dist_url", "device", "precision", "compile")
    add_flags(parser, RunConfig, only=run, inference=True)
    add_flags(parser, ModelConfig, inference=True)
    add_flags(parser, LossConfig, inference=True)
    return parser


def _eval(args: argparse.Namespace, given: set[str]) -> int:
    config = Config.from_mapping({name: getattr(args, name) for name in given})
    from detr_fast.inference.evaluation import evaluate_checkpoint

    evaluate_checkpoint(config, given, config.weights)
    return 0


def _predict_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "predict",
        "Detects objects, or lines, in images: a picture for each, and a json with all.\n"
        "The model's flags are the checkpoint's own; for bare weights give what their shapes do not show (--nheads,\n"
        "--dilation).",
        help_all=True,
        usage="detr-fast predict IMAGE_OR_FOLDER … --weights PATH [--output_dir DIR] [FLAG …]",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, and folders, which are searched for them"
    )
    _add_weights(parser)
    parser.add_argument(
        "--output_dir", default="outputs/predict", metavar="DIR", help="gets the pictures and predictions.json"
    )
    parser.add_argument("--threshold", default=0.5, type=float, help="lowest score; 0 keeps all")
    parser.add_argument(
        "--ann", default=None, metavar="JSON", help="COCO json to take the image ids from; without it they are 1, 2, …"
    )
    parser.add_argument("--batch_size", default=1, type=int, help="images at a time, of one size once they are resized")
    parser.add_argument(
        "--ignore_exif",
        action="store_true",
        help="take the pixels as they are stored; otherwise images are turned upright as their EXIF data say",
    )
    parser.add_argument(
        "--low_latency",
        action="store_true",
        help="on a GPU: replay a CUDA graph of the network for each size of image that comes again",
    )
    add_flags(parser, DataConfig, only=("image_size", "max_size"))
    add_flags(parser, RunConfig, only=("device", "precision", "compile"))
    add_flags(parser, ModelConfig, inference=True)
    return parser


def _predict(args: argparse.Namespace, given: set[str]) -> int:
    config = Config.of(args)
    from detr_fast.inference.prediction import predict

    failed = predict(
        config,
        args.inputs,
        given=given,
        threshold=args.threshold,
        ann=args.ann,
        ignore_exif=args.ignore_exif,
        low_latency=args.low_latency,
    )
    return 1 if failed else 0


def _convert_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "convert",
        "Writes a checkpoint of ours or of the original as a Hugging Face folder (model.safetensors, config.json,\n"
        "preprocessor_config.json, model card), or such a folder as a checkpoint. Needs the extra hf.",
        usage="detr-fast convert CHECKPOINT NEW_FOLDER [--dilation] [--nheads N], or back\n"
        "       detr-fast convert FOLDER NEW_CHECKPOINT",
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint, a file or an https address; or a folder")
    parser.add_argument("destination", metavar="DST", help="the folder, or the checkpoint; nothing is overwritten")
    parser.add_argument(
        "--dilation",
        action="store_true",
        default=None,
        help="the last stage is dilated (DC5); for checkpoints of the original, which do not say it",
    )
    parser.add_argument("--nheads", type=int, help="attention heads, likewise (default 8)")
    return parser


def _convert(args: argparse.Namespace, given: set[str]) -> int:
    from detr_fast.integrations.huggingface import convert

    convert(args.source, args.destination, dilation=args.dilation, nheads=args.nheads)
    return 0


def _export_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "export",
        "Writes a model as a file that runs without this package, with batch, height and width free, and\n"
        "compares it with the model on three other shapes: a file that differs is not kept, and the exit code is 1.",
        help_all=True,
        usage="detr-fast export --weights PATH --format onnx|torch|aoti --output FILE [FLAG …]",
    )
    _add_weights(parser)
    parser.add_argument(
        "--format",
        required=True,
        choices=("onnx", "torch", "aoti"),
        help="ONNX (.onnx), torch.export's program (.pt2), or a package compiled by AOTInductor for CPUs (.pt2)",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the file")
    parser.add_argument("--mask", action="store_true", help="a second input: the padding mask of a batch")
    parser.add_argument(
        "--postprocess",
        action="store_true",
        help="give boxes or lines in pixels, scores, labels instead of raw outputs",
    )
    add_flags(parser, DataConfig, only=("image_size", "max_size"))
    add_flags(parser, ModelConfig, inference=True)
    return parser


def _export(args: argparse.Namespace, given: set[str]) -> int:
    config = Config.of(args)
    from detr_fast.inference.export import ExportDiffersError, export
    from detr_fast.inference.loading import load_for_inference

    with usage_errors():
        loaded = load_for_inference(replace(config, device="cpu"), given, config.weights)
    try:
        export(loaded, args.output, args.format, mask=args.mask, postprocess=args.postprocess)
    except ExportDiffersError as error:
        print(f"detr-fast: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _check_data_parser() -> argparse.ArgumentParser:
    parser = command_parser("check-data", "Reads annotations and all images, and lists what is wrong with them.")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder in COCO's, Roboflow's, YOLO's or Pascal VOC's layout: both sets are checked",
    )
    parser.add_argument("--coco_path", metavar="DIR", help="folder in COCO's layout: both sets are checked")
    parser.add_argument(
        "--coco_panoptic_path",
        metavar="DIR",
        help="with --coco_path, whose images they are of: check panoptic segments, and the boxes of the validation set",
    )
    for name, text in (("train", "training"), ("val", "validation")):
        parser.add_argument(f"--{name}_ann", metavar="JSON", help=f"own data: annotations of the {text} images")
        parser.add_argument(
            f"--{name}_images",
            metavar="DIR",
            help=f"own data: folder of the {text} images; without it only the json is read",
        )
    add_flags(parser, DataConfig, only=("allow_outside",))
    parser.add_argument(
        "--num_workers",
        type=int,
        metavar="N",
        help="processes that decode images (default: one for each core; 0: none, threads of this one)",
    )
    parser.add_argument(
        "--fix",
        metavar="OUT.json",
        help="of one set: write its annotations with what can be mended without guessing, and list that",
    )
    return parser


def _check_data(args: argparse.Namespace, given: set[str]) -> int:
    from detr_fast.data import check_coco, check_panoptic, mend_file

    if args.coco_panoptic_path and not args.coco_path:
        raise UsageError("--coco_panoptic_path needs --coco_path, the folder of the images")
    always = {"fix", "allow_outside", "num_workers"}
    pairs: list[tuple[Any, Any]] = []
    if args.data:
        from detr_fast.data.layouts import find_layout

        if given - always != {"data"}:
            raise UsageError("give either --data or the other folders and jsons, not both")
        with usage_errors():
            layout = find_layout(args.data)
        print("\n".join([*layout.lines, ""]))
        pairs = [(split.images, split.annotations) for split in layout.splits.values()]
    if args.coco_path:
        if given - always - {"coco_panoptic_path"} != {"coco_path"}:
            raise UsageError("give either --coco_path or the folders and jsons of own data, not both")
        for name in ("val",) if args.coco_panoptic_path else ("train", "val"):
            pairs.append((f"{args.coco_path}/{name}2017", f"{args.coco_path}/annotations/instances_{name}2017.json"))
    for name in ("train", "val"):
        images, annotations = getattr(args, f"{name}_images"), getattr(args, f"{name}_ann")
        if images and not annotations:
            raise UsageError(f"--{name}_images and --{name}_ann belong together, only one is given")
        if annotations:
            pairs.append((images, annotations))
    if not pairs:
        raise UsageError("nothing to check: give --data, --coco_path, or --train_images and --train_ann (or val)")
    if args.fix:
        if len(pairs) > 1 or args.coco_panoptic_path:
            raise UsageError("--fix mends one file: give the folder and json of one set")
        images, annotations = pairs[0]
        if not images:
            raise UsageError("--fix needs the folder of the images, too: it compares names and sizes with the files")
        done = mend_file(images, annotations, args.fix)
        print("\n".join([f"{args.fix}: {annotations} with {len(done)} kinds of mending", *done, ""]))
        pairs = [(images, args.fix)]
    options: dict[str, Any] = {"allow_outside": args.allow_outside, "num_workers": args.num_workers, "progress": True}
    panoptic = ("train", "val") if args.coco_panoptic_path else ()
    several = len(pairs) + len(panoptic) > 1  # then the verdicts come together, last
    reports: list[Any] = []
    for images, annotations in pairs:
        # The second file, of validation, is judged by the classes of the first.
        categories = reports[0].categories if reports else None
        reports.append(check_coco(images, annotations, categories=categories, **options))
        print(reports[-1].details if several else reports[-1], end="\n\n", flush=True)
    for name in panoptic:
        root = args.coco_panoptic_path
        paths = f"{root}/panoptic_{name}2017", f"{root}/annotations/panoptic_{name}2017.json"
        reports.append(check_panoptic(f"{args.coco_path}/{name}2017", *paths, **options))
        print(reports[-1].details, end="\n\n", flush=True)
    if several:
        print("\n".join(f"{report.ann_file}: {report.verdict}" for report in reports))
    return max(report.exit_code for report in reports)


def _demo_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "demo",
        "Generates a small data set of JPEG files, trains DETR on it, evaluates, and leaves pictures and curves.\n"
        "Without a GPU it is smaller: a few minutes on two cores.",
    )
    parser.add_argument(
        "--output_dir", default="outputs/demo", metavar="DIR", help="gets the data, the run's files and the predictions"
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cuda, cuda:N or cpu")
    parser.add_argument(
        "--max_steps",
        default=0,
        type=int,
        help="stop after so many optimiser steps, for a quick look (default 0: the whole way)",
    )
    return parser


def _demo(args: argparse.Namespace, given: set[str]) -> int:
    from detr_fast.demo import demo

    demo(args.output_dir, args.device, args.max_steps)
    return 0


def _bench_parser() -> argparse.ArgumentParser:
    from detr_fast.benchmarks.cli import add_arguments

    parser = command_parser("bench", "Checks and measures the fused ops beside their peers and the physical limit.")
    add_arguments(parser)
    return parser


def _bench(args: argparse.Namespace, given: set[str]) -> int:
    from detr_fast.benchmarks.cli import run

    return run(args)


def _doctor_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "doctor",
        "Prints what is installed and compares every kernel with plain PyTorch on this machine. The exit status is 1 "
        "if one fails or gives other numbers.",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where (default %(default)s)")
    return parser


def _doctor(args: argparse.Namespace, given: set[str]) -> int:
    from detr_fast.doctor import doctor

    return doctor(args.device)


def _add_weights(parser: argparse.ArgumentParser, *aliases: str) -> None:
    parser.add_argument(
        "--weights",
        *aliases,
        required=True,
        metavar="PATH",
        help="a run's folder, a checkpoint of ours or of the original (a file or an https address), or a published "
        "name such as detr_resnet50",
    )


_COMMANDS: dict[str, tuple[Callable, Callable, str]] = {
    "train": (_train_parser, _train, "train DETR on labelled images"),
    "eval": (_eval_parser, _eval, "evaluate a checkpoint: COCO's numbers and a report"),
    "predict": (_predict_parser, _predict, "detect objects or lines in images: pictures and a json"),
    "convert": (_convert_parser, _convert, "between checkpoints and Hugging Face folders, both ways"),
    "export": (_export_parser, _export, "write a detector as ONNX or for torch, to run without this package"),
    "check-data": (_check_data_parser, _check_data, "find what is wrong with a data set"),
    "bench": (_bench_parser, _bench, "measure the fused ops beside their peers and the physical limit"),
    "doctor": (_doctor_parser, _doctor, "compare every kernel with plain PyTorch on this machine"),
    "demo": (_demo_parser, _demo, "generate data, train, evaluate, draw: the whole way in minutes"),
}


def _overview() -> str:
    lines = ["usage: detr-fast COMMAND …", ""]
    lines += [f"  {name:12}{text}" for name, (_, _, text) in _COMMANDS.items()]
    more = [
        "detr-fast COMMAND --help lists a command's flags; - and _ are alike in them.",
        "detr-fast --version; detr-fast --print-completion bash|zsh for the completion of commands and flags.",
    ]
    return "\n".join([*lines, "", *more])


def _print_completion(argv: Sequence[str]) -> int:
    if len(argv) != 1 or argv[0] not in ("bash", "zsh"):
        return _complain(f"--print-completion takes bash or zsh, got {' '.join(argv) or 'nothing'}")
    try:
        import shtab
    except ImportError:
        return _complain("--print-completion needs the package shtab: pip install detr_fast[completion]")
    root = argparse.ArgumentParser(prog="detr-fast")
    root.add_argument("--version", action="store_true", help="the version")
    commands = root.add_subparsers()
    for name, (make_parser, _, text) in _COMMANDS.items():
        commands.add_parser(name, help=text, parents=[make_parser()], add_help=False)
    print(shtab.complete(root, shell=argv[0]))
    return 0


def _complain(message: str) -> int:
    print(f"detr-fast: error: {message}", file=sys.stderr, flush=True)
    return 2


def _message(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" in text:
        # From a loader's worker: its whole traceback is in the text, the message in its last line.
        text = text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    # The parts name settings as their callers in Python know them.
    text = flag_names(text)
    expected = isinstance(error, (UsageError, OSError, NonFiniteLossError, CallbackError))
    return text if expected else f"{text} ({_TRACEBACK}=1 shows where)"


if __name__ == "__main__":
    sys.exit(main())
