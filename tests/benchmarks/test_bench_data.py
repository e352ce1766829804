import importlib.util
import json

import numpy as np
import pytest

from benchmarks.shapes import coco_sizes
from benchmarks.studies import annotations, data, evaluation, padding
from detr_fast.data import read_panoptic
from detr_fast.data.segments import columns_of, read_segments


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


def test_the_generated_panoptic_json_is_as_cocos(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "_AT_A_TIME", 16)
    path = tmp_path / "ann.json"
    annotations.generate_panoptic(path, 50, 600, seed=3)
    content = read_panoptic(path)
    assert [image["id"] for image in content["images"]] == list(range(1, 51))
    listed = [segment for entry in content["annotations"] for segment in entry["segments_info"]]
    assert len(listed) == 600 and set(listed[0]) == {"id", "category_id", "iscrowd", "bbox", "area"}
    assert {segment["id"] for segment in listed} <= set(annotations.colours(3).tolist())
    for entry in content["annotations"]:
        ids = [segment["id"] for segment in entry["segments_info"]]
        assert len(set(ids)) == len(ids)
    assert len(content["categories"]) == 133 and sum(c["isthing"] for c in content["categories"]) == 80
    expected = columns_of(content).arrays  # and nothing in it is odd
    assert all(np.array_equal(values, expected[name]) for name, values in read_segments(path).arrays.items())


@pytest.mark.parametrize(
    "flags", [["--panoptic"], pytest.param(["--boxes"], marks=pytest.mark.slow)], ids=["panoptic", "boxes"]
)
def test_the_annotations_study_measures_each_kind(tmp_path, capsys, flags):
    out = tmp_path / "rows.json"
    sizes = ["--images", "400", "--annotations", "3000", "--workers", "1"]
    assert annotations.main([*flags, *sizes, "--folder", str(tmp_path), "--output", str(out)]) == 0
    record = json.loads(out.read_text())
    is_panoptic = flags == ["--panoptic"]
    assert record["panoptic"] == is_panoptic and not record["polygons"] and record["annotations"] == 3000
    rows = record["rows"]
    assert list(rows) == ["first time", "mapped", *(() if is_panoptic else ("first batch, first time",
                                                                           "first batch, mapped"))]  # fmt: skip
    assert rows["mapped"]["seconds"] > 0 and "growth of a worker" in rows["mapped"]
    assert "400 images, 3000 " + ("segments" if is_panoptic else "annotations") in capsys.readouterr().out
