"""CocoEvaluator: numbers by hand, which images count, several processes, and what it refuses."""

import contextlib
import copy
import importlib.util
import io
import json
import math

import numpy as np
import pytest
import torch

from detr_fast.evaluation import CocoEvaluator, rust
from detr_fast.evaluation import coco as coco_module

COCO = pytest.importorskip("pycocotools.coco").COCO
mask_utils = pytest.importorskip("pycocotools.mask")
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "bird"}]
# One object per image: (image id, category, box x, y, w, h). The boxes are exact in float32.
OBJECTS = [(1, 3, [10, 10, 40, 40]), (2, 3, [20, 30, 50, 20]), (3, 7, [0, 0, 60, 60]), (5, 7, [5, 5, 40, 50])]


@pytest.fixture(autouse=True, params=["pycocotools", "faster_coco_eval", "hotcoco"])
def backend(request, monkeypatch):
    """Every test of this file with each."""
    if request.param != "pycocotools":
        pytest.importorskip(request.param)
    monkeypatch.setattr(coco_module, "resolved_backend", lambda asked: request.param)
    return request.param


def make_coco(objects=OBJECTS, categories=CATEGORIES):
    """The annotations as a COCO object, with object masks that fill their boxes."""
    annotations = []
    for i, (image, category, (x, y, w, h)) in enumerate(objects, 1):
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotation = {"id": i, "image_id": image, "category_id": category, "bbox": [x, y, w, h], "area": w * h}
        annotations.append({**annotation, "iscrowd": 0, "segmentation": [outline]})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": 80, "width": 100} for i in (5, 1, 2, 3)],
        "annotations": annotations,
        "categories": categories,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def predict(*detections):
    """A prediction from (score, category, (x, y, w, h)), with masks that fill the boxes."""
    boxes = [[x, y, x + w, y + h] for _, _, (x, y, w, h) in detections]
    masks = torch.zeros(len(boxes), 1, 80, 100)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[0, y0:y1, x0:x1] = 1
    return {
        "scores": torch.tensor([score for score, _, _ in detections]),
        "labels": torch.tensor([category for _, category, _ in detections], dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "masks": masks,
    }


def perfect(image):
    [(_, category, box)] = [o for o in OBJECTS if o[0] == image]
    return predict((0.9, category, box))


def run(batches, iou_types=("bbox",), coco=None):
    evaluator = CocoEvaluator(coco or make_coco(), list(iou_types))
    for batch in batches:
        evaluator.update(batch)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluator.summarize()
    evaluator.printed = printed.getvalue()
    return evaluator


def ap50(evaluator, iou_type="bbox"):
    return evaluator.coco_eval[iou_type].stats[1]


def test_perfect_predictions_print_the_twelve_lines(capsys):
    evaluator = run([{i: perfect(i) for i in (1, 2)}, {i: perfect(i) for i in (3, 5)}])
    stats = evaluator.coco_eval["bbox"].stats
    assert stats.shape == (12,)
    assert stats[0] == pytest.approx(1) and stats[8] == pytest.approx(1)
    lines = evaluator.printed.splitlines()
    assert lines[0] == "IoU metric: bbox" and len(lines) == 13
    assert lines[1].strip().startswith("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 1.000")
    assert capsys.readouterr().out == ""  # loading, evaluating and accumulating are silent


def test_average_precision_by_hand():
    """Two objects, one found at score 0.8, a false alarm at 0.9: precision 1/2 up to recall 1/2, 0 beyond."""
    batch = {1: predict((0.9, 3, (60, 60, 20, 10)), (0.8, 3, OBJECTS[0][2])), 2: {}}
    evaluator = run([batch])
    assert ap50(evaluator) == pytest.approx(51 / 101 * 0.5)  # the recalls 0, 0.01, …, 0.5 of 101
    assert set(evaluator.coco_eval["bbox"].eval) >= {"precision", "recall", "scores", "counts"}


def test_iou_threshold_by_hand():
    """Right half of the box missing: IoU 0.6 counts at 0.5, 0.55 and 0.6 of the ten thresholds."""
    evaluator = run([{3: predict((0.9, 7, (0, 0, 36, 60)))}])
    assert ap50(evaluator) == pytest.approx(1)
    assert evaluator.coco_eval["bbox"].stats[0] == pytest.approx(0.3)


@pytest.mark.parametrize("empty", [{}, {k: v[:0] for k, v in perfect(2).items()}], ids=["empty-dict", "no-detections"])
def test_images_without_predictions_count(empty):
    assert ap50(run([{1: perfect(1)}, {2: empty}])) == pytest.approx(51 / 101)
    assert ap50(run([{1: perfect(1)}])) == pytest.approx(1)  # unseen images do not


def test_nothing_detected_at_all():
    stats = run([{1: {}, 2: {}}]).coco_eval["bbox"].stats
    assert stats[0] == 0 and stats[8] == 0


def test_the_first_predictions_of_an_image_stay():
    wrong = predict((0.9, 3, (60, 60, 20, 10)))
    assert ap50(run([{1: perfect(1)}, {1: wrong}])) == pytest.approx(1)
    assert ap50(run([{1: wrong}, {1: perfect(1)}])) == 0
    assert ap50(run([{1: {}}, {1: perfect(1)}])) == 0
    assert run([{1: perfect(1), 5: {}}, {1: wrong}]).img_ids == [1, 5]


def test_labels_without_a_category_are_ignored():
    assert ap50(run([{1: predict((0.99, 4, OBJECTS[0][2]), (0.9, 3, OBJECTS[0][2]))}])) == pytest.approx(1)


def test_segmentation():
    evaluator = run([{1: perfect(1), 3: predict((0.9, 7, (0, 0, 36, 60)))}], ("bbox", "segm"))
    for iou_type in ("bbox", "segm"):
        assert evaluator.coco_eval[iou_type].stats[0] == pytest.approx((1 + 0.3) / 2)
    assert evaluator.printed.count("IoU metric: segm") == 1
    without_channel = {1: {**perfect(1), "masks": perfect(1)["masks"][:, 0] > 0}}
    assert ap50(run([without_channel], ["segm"]), "segm") == pytest.approx(1)


def test_segmentation_sees_the_masks_not_the_boxes():
    prediction = perfect(1)
    prediction["masks"] = prediction["masks"].flip(-1)
    evaluator = run([{1: prediction}], ("bbox", "segm"))
    assert ap50(evaluator) == pytest.approx(1) and ap50(evaluator, "segm") == 0


def test_per_class():
    table = run([{1: perfect(1), 2: {}, 3: predict((0.9, 7, (0, 0, 36, 60)))}]).per_class()
    assert list(table) == ["cat", "dog", "bird"]
    assert table["cat"] == pytest.approx({"AP": 51 / 101, "AP50": 51 / 101})
    assert table["dog"] == pytest.approx({"AP": 0.3, "AP50": 1.0})
    assert math.isnan(table["bird"]["AP"]) and math.isnan(table["bird"]["AP50"])


def test_per_class_tells_equal_names_apart():
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "cat"}, {"id": 9, "name": "bird"}]
    evaluator = run([{1: perfect(1), 3: {}}], coco=make_coco(categories=categories))
    values = {name: row["AP50"] for name, row in evaluator.per_class().items()}
    assert list(values) == ["cat (3)", "cat (7)", "bird"]
    assert values["cat (3)"] == pytest.approx(1) and values["cat (7)"] == 0


def test_per_class_takes_categories_without_names():
    categories = [{"id": 3}, {"id": 7, "name": None}, {"id": 9, "name": 5}, {"id": 12, "name": "\ud800"}]
    assert list(run([{1: perfect(1)}], coco=make_coco(categories=categories)).per_class()) == ["3", "7", "5", "\\ud800"]


def test_the_given_annotations_stay_untouched():
    coco = make_coco()
    before = json.dumps(coco.dataset)
    run([{i: perfect(i) for i in (1, 2, 3)}], ("bbox", "segm"), coco)
    assert json.dumps(coco.dataset) == before


def test_equals_pycocotools_on_a_result_file(coco_mini, tmp_path, backend):
    """Real annotations, crowds among them, jittered boxes: the same numbers as evaluating a file of results."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(coco_mini / "annotations" / "instances_val2017.json"))
    predictions, results = {}, []
    for image_id in coco.getImgIds():
        annotations = coco.imgToAnns[image_id]
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4).repeat(2, 1)
        boxes = boxes + torch.randn_like(boxes) * boxes[:, 2:].repeat(1, 2) * 0.08
        labels = torch.tensor([a["category_id"] for a in annotations] * 2, dtype=torch.int64)
        scores = (torch.rand(len(boxes)) * 20).round() / 20  # ties
        corners = torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1)
        predictions[image_id] = {"scores": scores, "labels": labels, "boxes": corners}
        for score, label, (x0, y0, x1, y1) in zip(scores, labels, corners, strict=True):
            box = [x0.item(), y0.item(), (x1 - x0).item(), (y1 - y0).item()]
            results.append({"image_id": image_id, "category_id": label.item(), "bbox": box, "score": score.item()})
    ids = list(predictions)
    evaluator = run([{i: predictions[i] for i in ids[k : k + 3]} for k in range(0, len(ids), 3)], coco=coco)

    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCOeval(coco, coco.loadRes(str(file)), "bbox")
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
    assert 0.1 < expected.stats[0] < 0.9
    # faster-coco-eval divides in another order: a few values of the curves differ in the last digit.
    tolerance = 1e-14 if backend == "faster_coco_eval" else 0
    for name in ("precision", "recall", "scores"):
        np.testing.assert_allclose(evaluator.coco_eval["bbox"].eval[name], expected.eval[name], rtol=0, atol=tolerance)
    np.testing.assert_allclose(evaluator.coco_eval["bbox"].stats, expected.stats, rtol=0, atol=tolerance)


def test_equals_the_evaluation_of_all_categories_at_once(backend):
    """Boxes and masks of 20 categories with crowds, scores that tie, labels without a category, and repeated images."""
    rng = np.random.default_rng(0)
    ids = [40, 7, 12, 1003, 5, 88]
    objects = [(i, int(c) * 3, rng.integers(5, 40, 4).tolist()) for i in ids for c in rng.integers(1, 21, 12)]
    coco = make_coco(objects, [{"id": 3 * n, "name": str(n)} for n in range(1, 21)])
    coco.dataset["images"] = [{"id": i, "height": 80, "width": 100} for i in [*ids, 2]]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    for entry in coco.dataset["annotations"][::9]:
        entry["iscrowd"] = 1
        entry["segmentation"] = coco.annToRLE(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    predictions, results = {2: {}}, {"bbox": [], "segm": []}
    for image in ids:
        near = [(c, [*(rng.integers(-2, 3, 2) + box[:2]), *box[2:]]) for i, c, box in objects if i == image]
        near += [(int(rng.integers(1, 62)), rng.integers(1, 40, 4).tolist()) for _ in range(8)]
        predictions[image] = predict(*((float(rng.integers(1, 20)) / 20, c, box) for c, box in near))
    for image in sorted(ids):
        kept = predictions[image]
        for score, label, (x0, y0, x1, y1), mask in zip(*kept.values(), strict=True):
            row = {"image_id": image, "category_id": int(label), "score": float(score)}
            results["bbox"].append({**row, "bbox": [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]})
            rle = mask_utils.encode(np.asfortranarray(mask[0].to(torch.uint8).numpy()))
            results["segm"].append({**row, "segmentation": rle})
    evaluator = run([predictions, {7: {}, 40: predictions[12]}], ("bbox", "segm"), coco)
    for kind, entries in results.items():
        assert evaluator.results(kind) == entries
        assert evaluator.results(kind, 0.5) == [entry for entry in entries if entry["score"] >= 0.5]
        with contextlib.redirect_stdout(io.StringIO()):
            expected = COCOeval(coco, coco.loadRes(copy.deepcopy(entries)), kind)
            expected.params.imgIds = sorted(predictions)
            expected.evaluate()
            expected.accumulate()
            expected.summarize()
        assert 0.1 < expected.stats[0] < 0.9
        tolerance = 1e-14 if backend == "faster_coco_eval" else 0
        got = evaluator.coco_eval[kind]
        assert got.eval["counts"] == expected.eval["counts"]
        for name in ("precision", "recall", "scores"):
            np.testing.assert_allclose(got.eval[name], expected.eval[name], rtol=0, atol=tolerance)
        np.testing.assert_allclose(got.stats, expected.stats, rtol=0, atol=tolerance)
    for name, values in evaluator.result_of(12).items():
        assert torch.equal(values, predictions[12][name].to(values.dtype)), name
    assert evaluator.result_of(2)["masks"].shape == (0, 1, 80, 100)


def merging_process(rank, folder, backend):
    coco_module.resolved_backend = lambda asked: backend  # this process ends with it
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Image 1 comes to both, right in the first process and wrong in the second; 2 is empty in both.
    batches = ([{5: perfect(5), 1: perfect(1)}], [{2: {}, 1: predict((0.9, 3, (60, 60, 20, 10)))}, {3: perfect(3)}])
    evaluator = run(batches[rank])
    coco_eval = evaluator.coco_eval["bbox"]
    state = (coco_eval.stats.tolist(), [int(i) for i in coco_eval.params.imgIds], evaluator.printed)
    torch.save(state, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def check_merging(folder, backend, start_method):
    torch.multiprocessing.start_processes(merging_process, (str(folder), backend), nprocs=2, start_method=start_method)
    alone = run([{i: perfect(i) for i in (1, 3, 5)}, {2: {}}])
    for rank in range(2):
        stats, image_ids, printed = torch.load(folder / f"{rank}.pt", weights_only=True)
        assert stats == alone.coco_eval["bbox"].stats.tolist()
        assert image_ids == [1, 2, 3, 5]
        assert printed == (alone.printed if rank == 0 else "")


def test_two_processes_are_merged(tmp_path, backend):
    if backend == "hotcoco":
        pytest.skip("its threads do not survive a fork; spawned processes are tested below")
    # Forked: two processes that import torch anew take seconds.
    check_merging(tmp_path, backend, "fork")


def test_a_forked_process_does_not_wait_for_threads_it_does_not_have(monkeypatch):
    pytest.importorskip("hotcoco")
    monkeypatch.undo()
    monkeypatch.setattr(rust, "_started_in", -1)  # another process
    assert CocoEvaluator(make_coco(), ["bbox"]).backend != "hotcoco"
    evaluator = CocoEvaluator(make_coco(), ["bbox"], backend="hotcoco")
    evaluator.update({1: perfect(1)})
    with pytest.raises(RuntimeError, match="forked"):
        evaluator.synchronize_between_processes()


@pytest.mark.slow
def test_two_spawned_processes_are_merged(tmp_path, backend):
    check_merging(tmp_path, backend, "spawn")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.pop("scores"), r"image 1 lack \['scores'\]"),
        (lambda p: p.pop("masks"), r"image 1 lack \['masks'\]"),
        (lambda p: p.update(boxes=p["boxes"][:, :3]), r"scores \[n\], labels \[n\] and boxes \[n, 4\]"),
        (lambda p: p.update(labels=p["labels"][:0]), r"shapes \(1,\), \(0,\) and \(1, 4\)"),
        (lambda p: p["scores"].fill_(math.nan), "NaN or infinity in scores or boxes"),
        (lambda p: p["boxes"].fill_(math.inf), "NaN or infinity in scores or boxes"),
        (lambda p: p.update(masks=p["masks"][..., :50]), r"masks of image 1 must be \[1, 1, 80, 100\]"),
    ],
    ids=["scores", "masks", "box-columns", "lengths", "nan", "inf", "mask-size"],
)
def test_update_rejects(change, message):
    evaluator = CocoEvaluator(make_coco(), ["bbox", "segm"])
    prediction = perfect(1)
    change(prediction)
    with pytest.raises(ValueError, match=message):
        evaluator.update({1: prediction})


def test_update_rejects_an_unknown_image():
    with pytest.raises(ValueError, match="image id 4 is not among the 4 annotated images"):
        CocoEvaluator(make_coco(), ["bbox"]).update({4: {}})


def test_rejects_iou_types():
    with pytest.raises(TypeError, match="must be a list or tuple"):
        CocoEvaluator(make_coco(), "bbox")
    with pytest.raises(ValueError, match="must be taken from"):
        CocoEvaluator(make_coco(), ["boxes"])
    with pytest.raises(ValueError, match="iou_type must be one of"):
        run([{1: {}}]).per_class("segm")


def test_rejects_the_wrong_order():
    evaluator = CocoEvaluator(make_coco(), ["bbox"])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluator.synchronize_between_processes()
    evaluator.update({1: perfect(1)})
    with pytest.raises(RuntimeError, match="synchronize_between_processes"):
        evaluator.accumulate()
    with pytest.raises(RuntimeError, match="accumulate"):
        evaluator.summarize()
    with pytest.raises(RuntimeError, match="accumulate"):
        evaluator.per_class()


def test_the_backend_can_be_chosen(monkeypatch):
    monkeypatch.undo()
    assert CocoEvaluator(make_coco(), ["bbox"], backend="pycocotools").backend == "pycocotools"
    for name in ("hotcoco", "faster_coco_eval"):
        if importlib.util.find_spec(name) is not None:
            assert CocoEvaluator(make_coco(), ["bbox"], backend=name).backend == name
    names = "auto, pycocotools, faster_coco_eval, hotcoco"
    with pytest.raises(ValueError, match=f"backend must be one of {names}, got 'fast'"):
        CocoEvaluator(make_coco(), ["bbox"], backend="fast")


@pytest.mark.parametrize(
    "installed, chosen",
    [
        ((), "pycocotools"),
        (("faster_coco_eval",), "faster_coco_eval"),
        (("faster_coco_eval", "hotcoco"), "hotcoco"),
    ],
    ids=["none", "faster", "both"],
)
def test_auto_takes_the_fastest_backend_that_is_installed(monkeypatch, installed, chosen):
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert CocoEvaluator(make_coco(), ["bbox"]).backend == chosen
    for absent in {"faster_coco_eval", "hotcoco"} - set(installed):
        with pytest.raises(ImportError, match=rf"'{absent}': it is not installed \(pip install detr_fast\[eval\]\)"):
            CocoEvaluator(make_coco(), ["bbox"], backend=absent)


def test_auto_takes_pycocotools_where_an_annotation_has_id_0(monkeypatch):
    """It counts a match with it as none, which the original's numbers are made of."""
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    coco = make_coco()
    assert CocoEvaluator(coco, ["bbox"]).backend == "hotcoco"
    coco.dataset["annotations"][0]["id"] = 0
    coco.createIndex()
    assert CocoEvaluator(coco, ["bbox"]).backend == "pycocotools"
    assert CocoEvaluator(coco, ["bbox"], backend="hotcoco").backend == "hotcoco"
