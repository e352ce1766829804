"""Panoptic quality by hand, and against a slow computation with one mask per segment."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from detr_fast.criterion import id2rgb
from detr_fast.evaluation import PanopticEvaluator, pq_compute
from detr_fast.evaluation.panoptic import Tally, average, count_image

CATEGORIES = [
    {"id": 1, "name": "dog", "isthing": 1},
    {"id": 2, "name": "cat", "isthing": 1},
    {"id": 9, "name": "sky", "isthing": 0},
]


def row(*runs):
    """[1, W]: (id, length), …"""
    return np.concatenate([np.full(length, i) for i, length in runs])[None]


def listed(**categories):
    """id → category, as s5=1."""
    return [{"id": int(name[1:]), "category_id": c, "iscrowd": 0} for name, c in categories.items()]


def counts(tally):
    return tally.tp, tally.fp, tally.fn


def test_matches_by_hand():
    # 10 pixels of dog and 10 of sky; the dog is found with 8 of its pixels, the sky with all and 2 more.
    truth, prediction = row((5, 10), (6, 10)), row((3, 8), (4, 12))
    tallies = count_image(truth, listed(s5=1, s6=9), prediction, listed(s3=1, s4=9))
    assert counts(tallies[1]) == counts(tallies[9]) == (1, 0, 0)
    assert tallies[1].iou == pytest.approx(8 / 10) and tallies[9].iou == pytest.approx(10 / 12)


def test_an_overlap_of_one_half_is_no_match():
    truth, prediction = row((5, 10), (6, 5)), row((3, 5), (4, 10))
    tallies = count_image(truth, listed(s5=1, s6=9), prediction, listed(s3=1, s4=9))
    assert counts(tallies[1]) == (0, 1, 1) and counts(tallies[9]) == (0, 1, 1)
    # One pixel more is one.
    tallies = count_image(row((5, 11), (6, 5)), listed(s5=1, s6=9), row((3, 6), (4, 10)), listed(s3=1, s4=9))
    assert counts(tallies[1]) == (1, 0, 0) and tallies[1].iou == pytest.approx(6 / 11)


def test_another_category_is_no_match():
    tallies = count_image(row((5, 10)), listed(s5=1), row((3, 10)), listed(s3=2))
    assert counts(tallies[1]) == (0, 0, 1) and counts(tallies[2]) == (0, 1, 0)


def test_void_does_not_count():
    # The prediction's 6 pixels on void leave the union: 10 / 10.
    tallies = count_image(row((5, 10), (0, 6)), listed(s5=1), row((3, 16)), listed(s3=1))
    assert counts(tallies[1]) == (1, 0, 0) and tallies[1].iou == 1
    # Mostly on void: neither a match nor wrong. Half on void: wrong.
    tallies = count_image(row((5, 10), (0, 6)), listed(s5=1), row((0, 5), (3, 11)), listed(s3=2))
    assert counts(tallies[1]) == (0, 0, 1) and 2 not in tallies
    tallies = count_image(row((5, 10), (0, 6)), listed(s5=1), row((0, 4), (3, 12)), listed(s3=2))
    assert counts(tallies[2]) == (0, 1, 0)


def test_crowds_are_no_misses_and_excuse_their_own_category():
    crowd = [{"id": 5, "category_id": 1, "iscrowd": 1}, {"id": 6, "category_id": 9, "iscrowd": 0}]
    truth = row((5, 10), (6, 10))
    tallies = count_image(truth, crowd, row((3, 10), (4, 10)), listed(s3=1, s4=9))
    assert 1 not in tallies and counts(tallies[9]) == (1, 0, 0)  # even if it covers it exactly
    tallies = count_image(truth, crowd, row((3, 10), (4, 10)), listed(s3=2, s4=9))
    assert counts(tallies[2]) == (0, 1, 0)  # another category is wrong there
    # Void and crowd together excuse it: 4 + 3 of 12 pixels, but not of 14.
    truth = row((5, 3), (0, 4), (6, 13))
    assert 1 not in count_image(truth, crowd, row((3, 12), (4, 8)), listed(s3=1, s4=9))
    tallies = count_image(truth, crowd, row((3, 14), (4, 6)), listed(s3=1, s4=9))
    assert counts(tallies[1]) == (0, 1, 0)


def test_a_predicted_segment_may_have_the_id_of_void():
    tallies = count_image(row((5, 10)), listed(s5=1), row((0, 10)), listed(s0=1))
    assert counts(tallies[1]) == (1, 0, 0)
    tallies = count_image(row((5, 10)), listed(s5=1), row((0, 10)), [])
    assert counts(tallies[1]) == (0, 0, 1)


def test_pictures_that_do_not_fit_their_lists():
    with pytest.raises(ValueError, match="pixels of segment 3, which is not listed"):
        count_image(row((5, 4)), listed(s5=1), row((3, 4)), [])
    with pytest.raises(ValueError, match="segment 8 is listed"):
        count_image(row((5, 4)), listed(s5=1), row((3, 4)), listed(s3=1, s8=1))
    with pytest.raises(ValueError, match="of one size"):
        count_image(row((5, 4)), listed(s5=1), row((3, 5)), listed(s3=1))


def test_averages_by_hand():
    tallies = {1: Tally(iou=1.5, tp=2, fp=1, fn=1), 9: Tally(iou=0.0, tp=0, fp=2, fn=1)}
    results = average(tallies, CATEGORIES)
    assert results["per_class"][1] == pytest.approx({"pq": 0.5, "sq": 0.75, "rq": 2 / 3})
    assert results["per_class"][2] == {"pq": 0, "sq": 0, "rq": 0}
    assert results["Things"] == pytest.approx({"pq": 0.5, "sq": 0.75, "rq": 2 / 3, "n": 1})  # the cat does not occur
    assert results["Stuff"] == {"pq": 0, "sq": 0, "rq": 0, "n": 1}
    assert results["All"] == pytest.approx({"pq": 0.25, "sq": 0.375, "rq": 1 / 3, "n": 2})
    assert average({}, CATEGORIES)["All"] == {"pq": 0, "sq": 0, "rq": 0, "n": 0}


def slow_count(truth, truth_segments, prediction, predicted_segments):
    """category → [iou, tp, fp, fn], mask by mask."""
    result = {c["id"]: [0.0, 0, 0, 0] for c in CATEGORIES}
    void = ~np.isin(truth, [s["id"] for s in truth_segments])
    matched = set()
    for t in truth_segments:
        found = False
        for p in predicted_segments:
            if t["iscrowd"] or t["category_id"] != p["category_id"]:
                continue
            a, b = truth == t["id"], (prediction == p["id"]) & ~void
            iou = (a & b).sum() / (a | b).sum()
            if iou > 0.5:
                result[t["category_id"]][0] += iou
                result[t["category_id"]][1] += 1
                matched.add(p["id"])
                found = True
        result[t["category_id"]][3] += not found and not t["iscrowd"]
    for p in predicted_segments:
        free = void.copy()
        for t in truth_segments:
            if t["iscrowd"] and t["category_id"] == p["category_id"]:
                free |= truth == t["id"]
        b = prediction == p["id"]
        result[p["category_id"]][2] += p["id"] not in matched and (b & free).sum() <= 0.5 * b.sum()
    return result


def random_picture(rng, void):
    """Blocks of segments, some of them void, and their list."""
    ids = np.kron(rng.integers(0 if void else 1, 9, (4, 5)), np.ones((7, 6), dtype=int))
    segments = [
        {"id": int(i), "category_id": int(rng.choice([1, 2, 9])), "iscrowd": int(void and rng.random() < 0.2)}
        for i in np.unique(ids)
        if i > 0
    ]
    return ids, segments


def disturbed(rng, ids, segments):
    """A prediction that resembles the truth."""
    shifted = np.roll(ids, rng.integers(0, 4), axis=rng.integers(2))
    shifted = np.where(shifted == 0, 1, shifted) * 300
    categories = {300 * s["id"]: s["category_id"] for s in segments}
    listed = [
        {"id": int(i), "category_id": categories.get(i, 1) if rng.random() < 0.8 else 2} for i in np.unique(shifted)
    ]
    return shifted, listed


def test_matches_a_slow_computation():
    rng = np.random.default_rng(0)
    total = np.zeros(4)
    for _ in range(60):
        ids, segments = random_picture(rng, void=True)
        prediction, predicted = disturbed(rng, ids, segments)
        tallies = count_image(ids, segments, prediction, predicted)
        for category, expected in slow_count(ids, segments, prediction, predicted).items():
            t = tallies.get(category, Tally())
            np.testing.assert_allclose([t.iou, t.tp, t.fp, t.fn], expected, rtol=1e-9)
            total += expected
    assert (total > 20).all()


@pytest.fixture
def written(tmp_path):
    """Six annotated images on disk, and predictions as a post-processor gives them."""
    rng = np.random.default_rng(1)
    (tmp_path / "gt").mkdir()
    images, annotations, predictions = [], [], []
    for i in range(1, 7):
        ids, segments = random_picture(rng, void=True)
        Image.fromarray(id2rgb(ids)).save(tmp_path / "gt" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.jpg", "height": ids.shape[0], "width": ids.shape[1]})
        annotations.append(
            {"image_id": i, "file_name": f"{i}.png", "segments_info": [{**s, "area": 1} for s in segments]}
        )
        picture, predicted = disturbed(rng, ids, segments)
        with io.BytesIO() as file:
            Image.fromarray(id2rgb(picture)).save(file, format="PNG")
            png = file.getvalue()
        predictions.append({"png_string": png, "segments_info": predicted, "image_id": i, "file_name": f"{i:012}.png"})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    return tmp_path, predictions


def test_evaluator_agrees_with_its_files(written, capsys):
    folder, predictions = written
    evaluator = PanopticEvaluator(folder / "gt.json", folder / "gt", folder / "out" / "panoptic_eval")
    evaluator.update(predictions[:4])
    evaluator.update(predictions[3:])  # image 4 comes twice and counts once
    evaluator.synchronize_between_processes()
    results = evaluator.summarize()
    assert "png_string" in predictions[0] and results["All"]["n"] == 3 and 0 < results["All"]["pq"] < 1
    assert f"All      | {100 * results['All']['pq']:5.1f}" in capsys.readouterr().out
    out = folder / "out" / "panoptic_eval"
    assert (out / "000000000001.png").read_bytes() == predictions[0]["png_string"]
    assert len(json.loads((out / "predictions.json").read_text())["annotations"]) == 6
    assert pq_compute(folder / "gt.json", out / "predictions.json", folder / "gt", out) == results
    assert pq_compute(folder / "gt.json", out / "predictions.json", pred_folder=out) == results


def test_evaluator_counts_the_images_seen(written):
    folder, predictions = written
    evaluator = PanopticEvaluator(folder / "gt.json", folder / "gt", None)
    with pytest.raises(ValueError, match="has seen no image"):
        evaluator.summarize()
    evaluator.update(predictions[:1])
    evaluator.synchronize_between_processes()
    assert evaluator.summarize()["All"]["n"] <= 3
    with pytest.raises(ValueError, match="image id 77"):
        evaluator.update([{**predictions[1], "image_id": 77}])
    with pytest.raises(ValueError, match="image 2: category 5 is not among the annotations' 3"):
        evaluator.update([{**predictions[1], "segments_info": [{"id": 300, "category_id": 5}]}])
    with pytest.raises(ValueError, match="image 2: .*is not listed"):
        evaluator.update([{**predictions[1], "segments_info": []}])


def test_all_annotated_images_need_a_prediction(written):
    folder, predictions = written
    (folder / "predictions.json").write_text(json.dumps({"annotations": []}))
    with pytest.raises(ValueError, match="no prediction for image 1"):
        pq_compute(folder / "gt.json", folder / "predictions.json")
