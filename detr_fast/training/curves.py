"""Training curves as a picture."""

import os
from pathlib import Path

from detr_fast.training.log import read_log, scalars

_CURVES = (
    ("loss", ("loss",)),
    (
        "losses, unweighted",
        (
            "loss_ce_unscaled",
            "loss_bbox_unscaled",
            "loss_giou_unscaled",
            "loss_mask_unscaled",
            "loss_dice_unscaled",
            "loss_line_unscaled",
        ),
    ),
    ("class error [%]", ("class_error",)),
    (
        "COCO average precision, panoptic quality",
        ("coco_eval_bbox_AP", "coco_eval_bbox_AP50", "coco_eval_masks_AP", "PQ_all_pq", "line_eval_sAP10"),
    ),
)


def draw_curves(output_dir: str | os.PathLike) -> bool:
    """Draws ``output_dir/curves.png`` from ``log.txt``: training solid, validation dashed, over epochs.

    Returns:
        False if matplotlib is not installed: nothing is drawn then.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    rows = [scalars(row) for row in read_log(output_dir)]
    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, _CURVES, strict=True):
        for colour, name in enumerate(names):
            for prefix, style in (("train", "-"), ("test", "--")):
                points = [(row["epoch"], row[f"{prefix}_{name}"]) for row in rows if f"{prefix}_{name}" in row]
                if points:
                    label = f"{prefix} {name.removeprefix('coco_eval_').removesuffix('_unscaled')}"
                    marker = "." if prefix == "train" else "x"  # tells them apart when there is one epoch
                    axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=label, marker=marker)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if title.startswith("COCO"):  # all zeros at first: without a range the axis would show rounding
            axes.set_ylim(bottom=0, top=max(0.01, axes.get_ylim()[1]))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(Path(output_dir) / "curves.png", dpi=90)
    return True
