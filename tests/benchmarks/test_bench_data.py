import importlib.util
import json

import numpy as np
import pytest

from benchmarks.shapes import coco_sizes
from benchmarks.studies import data, evaluation, padding


def test_padding_table_shows_what_grouping_saves(tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert padding.main(["--images", "640", "--batch", "2", "16", "--output", str(out)]) == 0
    found = json.loads(out.read_text())
    rows = {(row["batch"], row["order"]): row for row in found["orders"]}
    for batch in (2, 16):
        random, ratio, planned = (rows[batch, order]["pixels"] for order in padding.ORDERS)
        assert random < ratio < planned and planned > 0.88
    assert rows[16, "random"]["batches"] == rows[16, "planned size"]["batches"] == 40
    assert f"{rows[16, 'planned size']['pixels']:.1%}" in capsys.readouterr().out
    exact, *rounded = found["divisors"]
    assert exact["divisor"] == 1 and exact["more_pixels"] == 0
    for row in rounded:
        assert row["shapes"] <= exact["shapes"] and 0 < row["more_pixels"] < row["divisor"] / 800 * 2.5
        assert row["pixels"] == pytest.approx(exact["pixels"] / (1 + row["more_pixels"]))


@pytest.mark.parametrize("order", padding.ORDERS)
def test_padding_orders_use_an_image_at_most_once(order):
    images = padding.AnnotatedSizes(padding.resampled(coco_sizes(), 200, 0))
    planned = np.array([images.planned_size(index) for index in range(200)])
    batches = padding.batches_of(order, images, planned, 8, 0, 4096)
    assert batches.shape[1] == 8 and len(np.unique(batches)) == batches.size >= 8 * 20


def test_data_benchmark_compares_then_times(capsys, monkeypatch):
    arguments = ["--images", "2", "--batch", "2", "--workers", "1"]
    assert data.main(arguments) == 0
    assert "ratio:" in (printed := capsys.readouterr().out) and "loader with 1 workers" in printed
    monkeypatch.setattr(data, "TOLERANCE", -1.0)
    assert data.main(arguments) == 1 and "\nnot timed: " in "\n" + capsys.readouterr().out


@pytest.mark.parametrize(
    "images, detections", [(12, 20), pytest.param(5000, 100, marks=pytest.mark.slow)], ids=["small", "as-coco"]
)
def test_the_evaluation_study_compares_then_prints(tmp_path, capsys, images, detections):
    pytest.importorskip("faster_coco_eval")
    out = tmp_path / "rows.json"
    assert evaluation.main(["--images", str(images), "--detections", str(detections), "--output", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    installed = [name for name in evaluation.BACKENDS if importlib.util.find_spec(name) is not None]
    assert [row["backend"] for row in rows] == installed and rows[0]["stats"][0] > 0.1
    assert f"{images} images, {images * detections} detections" in capsys.readouterr().out
