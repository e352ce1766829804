"""The report: what it says is what was evaluated, names cannot break out, and a browser shows it without a network."""

import contextlib
import html
import io
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from detr_fast.config import Config
from detr_fast.evaluation import CocoEvaluator, LineEvaluator, coco_page, rust
from detr_fast.evaluation.panoptic import Tally, average
from detr_fast.evaluation.report import render
from detr_fast.tasks import task_of
from detr_fast.tasks.panoptic import _panoptic_tables
from detr_fast.training.report import annotated_image, write_report

COCO = pytest.importorskip("pycocotools.coco").COCO
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval

EVIL = "<script>document.title='broken'</script>"
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": EVIL}, {"id": 9, "name": "bird"}]
BOXES = {1: (3, [10, 10, 40, 40]), 2: (3, [20, 30, 50, 20]), 3: (7, [0, 0, 60, 60]), 4: (7, [5, 5, 40, 50])}
NAMES = {1: "1.jpg", 2: "2.jpg", 3: "3.jpg", 4: "<img src=x>.jpg"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def found(*detections):
    """A prediction from (score, category, x, y, w, h), with masks that fill the boxes."""
    boxes = torch.tensor([d[2:] for d in detections], dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 1, 80, 100)
    for mask, (x, y, w, h) in zip(masks, boxes.int().tolist(), strict=True):
        mask[0, y : y + h, x : x + w] = 1
    return {
        "scores": torch.tensor([d[0] for d in detections]),
        "labels": torch.tensor([d[1] for d in detections], dtype=torch.int64),
        "boxes": torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1),
        "masks": masks,
    }


# 1 and 4 right; 2 missed, with a false alarm; 3 found, but as a cat.
PREDICTIONS = {
    1: found((0.9, 3, 10, 10, 40, 40)),
    2: found((0.8, 3, 0, 60, 12, 12), (0.2, 3, 20, 30, 50, 20)),
    3: found((0.7, 3, 0, 0, 60, 60)),
    4: found((0.95, 7, 5, 5, 40, 50)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images and their annotations."""
    folder = tmp_path_factory.mktemp("report")
    annotations = []
    for image_id, (category, (x, y, w, h)) in BOXES.items():
        Image.new("RGB", (100, 80), (60 * image_id, 120, 90)).save(folder / NAMES[image_id])
        entry = {"id": image_id, "image_id": image_id, "category_id": category, "bbox": [x, y, w, h], "area": w * h}
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append({**entry, "iscrowd": 0, "segmentation": [outline], "line": [x, y, w, h]})
    images = [{"id": i, "file_name": name, "width": 100, "height": 80} for i, name in NAMES.items()]
    (folder / "ann.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    return folder


def coco_of(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(folder / "ann.json"))


def summarised(evaluator, predictions=PREDICTIONS):
    evaluator.update(predictions)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


def written(folder, tmp_path, masks=False):
    """The report's path, and the evaluator."""
    coco = coco_of(folder)
    evaluator = summarised(CocoEvaluator(coco, ["bbox", "segm"] if masks else ["bbox"]))
    dataset = SimpleNamespace(img_folder=str(folder))
    return write_report(tmp_path, task_of(Config(masks=masks)), evaluator, dataset, coco, "a & b"), evaluator


def test_what_the_page_counts_is_what_was_found(folder):
    page = task_of(Config()).page(summarised(CocoEvaluator(coco_of(folder), ["bbox"])))
    numbers, classes = page.tables
    assert len(numbers.rows) == 12
    rows = {row[0]: row[4:] for row in classes.rows}  # objects, found, missed, false alarms
    assert rows == {"cat": [2, 1, 1, 2], EVIL: [2, 1, 1, 0], "bird": [0, 0, 0, 0]}
    assert page.scores == {1: 1.0, 2: 0.0, 3: 0.0, 4: 1.0}
    general = [curve.name for curve in page.charts[0].curves if not curve.of_class]
    assert general == ["IoU 0.50", "IoU 0.75", "IoU 0.50:0.95"]
    assert [curve.name for curve in page.charts[0].curves if curve.of_class] == ["cat", EVIL]


def test_confusion_counts_what_was_taken_for_what(folder):
    pytest.importorskip("hotcoco")
    confusion = task_of(Config()).page(summarised(CocoEvaluator(coco_of(folder), ["bbox"]))).confusion
    # Rows: annotated cat, the other, bird, nothing. A cat was missed, one of the others taken for a cat.
    assert confusion.counts.tolist() == [[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_confusion_is_written_as_data_and_as_a_picture(folder, tmp_path):
    pytest.importorskip("hotcoco")
    pytest.importorskip("matplotlib")
    path, _ = written(folder, tmp_path)
    saved = json.loads((path.parent / "confusion.json").read_text())
    assert saved["names"] == ["cat", EVIL, "bird", "nothing"]
    assert saved["counts"] == [[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    picture = Image.open(path.parent / "confusion.png").convert("RGB")
    assert len(picture.getcolors(picture.width * picture.height)) > 20


def test_names_in_the_picture_are_text(tmp_path, capfd, caplog):
    pytest.importorskip("hotcoco")
    pytest.importorskip("matplotlib")
    counts = torch.tensor([[3, 1, 0], [0, 2, 1], [1, 0, 0]]).numpy()
    assert rust.draw_confusion(["$\\frac{", "猫 $"], counts, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").width > 300
    captured = capfd.readouterr()
    assert "findfont" not in captured.err and "findfont" not in caplog.text


def test_an_earlier_confusion_does_not_stay(folder, tmp_path, monkeypatch):
    (tmp_path / "eval").mkdir()
    for name in ("confusion.json", "confusion.png"):
        (tmp_path / "eval" / name).write_text("of another evaluation")
    monkeypatch.setattr(rust, "is_usable", lambda: False)
    coco = coco_of(folder)
    evaluator = summarised(CocoEvaluator(coco, ["bbox"], backend="pycocotools"))
    write_report(tmp_path, task_of(Config()), evaluator, SimpleNamespace(img_folder=str(folder)), coco)
    assert [file.name for file in (tmp_path / "eval").iterdir()] == ["report.html"]


def test_without_hotcoco_the_page_says_what_is_missing(folder, monkeypatch):
    monkeypatch.setattr(rust, "is_usable", lambda: False)
    page = coco_page.coco_page(summarised(CocoEvaluator(coco_of(folder), ["bbox"], backend="pycocotools")))
    assert page.confusion is None and "pip install hotcoco" in render("t", "s", page, {})


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_the_page_needs_nothing_beside_it_and_names_are_text(folder, tmp_path, masks):
    path, _ = written(folder, tmp_path, masks)
    assert path == tmp_path / "eval" / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "<script>document" not in text and "<img src=x>" not in text and "a &amp; b" in text
    assert not re.findall(r'(?:src|href)="(?!data:image/jpeg;base64,)', text) and "://" not in text
    assert text.count("data:image/jpeg") == 2 * len(PREDICTIONS)
    assert text.count("COCO&#x27;s numbers") == (2 if masks else 1)
    # The worst come first.
    assert text.index("2.jpg") < text.index("3.jpg") < text.index("1.jpg")


def test_pictures_are_turned_as_their_annotations_are(tmp_path):
    """A photo that lies on its side in the file, annotated as it is shown; and one of 16 bits, which is not white."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 80)).save(tmp_path / "side.jpg", exif=exif)
    Image.new("I;16", (80, 100), 257 * 99).save(tmp_path / "wide.png")
    entries = {1: "side.jpg", 2: "wide.png"}
    images = [{"id": i, "file_name": name, "width": 80, "height": 100} for i, name in entries.items()]
    coco = SimpleNamespace(loadImgs=lambda image_id: [images[image_id - 1]])
    dataset = SimpleNamespace(img_folder=tmp_path)
    for image_id, name in entries.items():
        given, image = annotated_image(image_id, dataset, coco)
        assert given == name and image.size == (80, 100) and image.mode == "RGB"
    assert image.getpixel((5, 5)) == (99, 99, 99)


def test_names_that_no_file_takes_are_written_in_another_way(folder, tmp_path):
    data = json.loads((folder / "ann.json").read_text())
    del data["categories"][0]["name"]
    data["categories"][1]["name"] = "half of a pair: \ud800"
    coco = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        coco.dataset = data
        coco.createIndex()
    evaluator = summarised(CocoEvaluator(coco, ["bbox"]))
    dataset, task = SimpleNamespace(img_folder=str(folder)), task_of(Config())
    text = write_report(tmp_path, task, evaluator, dataset, coco, "\udcff").read_text(encoding="utf-8")
    assert '<td data-value="3">3</td>' in text and r"half of a pair: \ud800" in text and r"Evaluation of \udcff" in text
    "\n".join(task.report(evaluator)).encode()


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome")
def test_a_browser_sorts_filters_and_shows_it(folder, tmp_path):
    path, _ = written(folder, tmp_path)
    # What a user does, appended to the page: the second class is chosen, then the table sorted by objects missed.
    page = tmp_path / "used.html"
    script = """<script>
      const heads = document.querySelectorAll("table.sortable")[1].querySelectorAll("thead th");
      heads[7].click(); const order = [...heads[7].closest("table").tBodies[0].rows].map(r => r.cells[7].innerText);
      choice.value = "1"; choice.dispatchEvent(new Event("change"));
      const shown = [...document.querySelectorAll("figure:not(.hidden) figcaption")].map(f => f.innerText);
      const curves = document.querySelectorAll("polyline[data-only-filtered]:not(.hidden)").length;
      document.body.dataset.result = JSON.stringify({order, shown, curves, title: document.title,
        pictures: [...document.images].every(i => i.complete && i.naturalWidth > 0)});
    </script>"""
    page.write_text(path.read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    result = json.loads(html.unescape(re.search(r'data-result="([^"]*)"', done.stdout).group(1)))
    assert result["order"] == ["2", "0", "0"]
    assert [caption.split(" · ")[0] for caption in result["shown"]] == ["3.jpg", "<img src=x>.jpg"]
    assert result["curves"] == 1 and result["pictures"] and result["title"] == "Evaluation of a & b"

    picture = tmp_path / "page.png"
    command = [BROWSER, *flags, f"--screenshot={picture}", "--window-size=1200,1600", path.as_uri()]
    subprocess.run(command, capture_output=True, timeout=60, check=True)
    with Image.open(picture) as image:
        assert image.size == (1200, 1600) and len(image.convert("RGB").getcolors(1 << 24)) > 200


@pytest.mark.parametrize("kind, name", [("bbox", "results.json"), ("segm", "results_segm.json")])
def test_the_results_file_gives_the_same_numbers(folder, tmp_path, kind, name):
    _, evaluator = written(folder, tmp_path, masks=True)
    results = task_of(Config(masks=True)).results(evaluator)
    (tmp_path / name).write_text(json.dumps(results[name]))
    coco = coco_of(folder)
    again = COCOeval(coco, coco.loadRes(str(tmp_path / name)), kind)
    again.evaluate()
    again.accumulate()
    again.summarize()
    assert again.stats.tolist() == pytest.approx(evaluator.coco_eval[kind].stats.tolist(), abs=1e-6)
    assert 0 < again.stats[0] < 1


def test_panoptic_quality_has_tables():
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "sky", "isthing": 0}]
    quality = average({1: Tally(iou=0.8, tp=1, fp=2)}, categories)
    evaluator = SimpleNamespace(quality=quality, panoptic=SimpleNamespace(categories=categories))
    means, classes = _panoptic_tables(evaluator)
    assert means.rows[0] == ["All", pytest.approx(0.4), pytest.approx(0.8), pytest.approx(0.5), 1]
    assert [row[0] for row in classes.rows] == ["cat (1)", "sky (2)"] and classes.rows[1][1:] == [0, 0, 0]


def test_lines_have_a_page_with_pictures(folder, tmp_path):
    coco = coco_of(folder)
    lines = {i: torch.tensor([[x, y, x + w, y + h]]) for i, (_, (x, y, w, h)) in BOXES.items()}
    lines[2] = lines[2] + 30
    predictions = {i: {"scores": torch.tensor([0.9]), "lines": line} for i, line in lines.items()}
    evaluator = summarised(LineEvaluator(coco), predictions)
    dataset = SimpleNamespace(img_folder=str(folder))
    task = task_of(Config(dataset_file="lines"))
    assert task.page(evaluator).scores == {1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0}
    text = write_report(tmp_path, task, evaluator, dataset, coco).read_text(encoding="utf-8")
    assert "sAP10" in text and text.count("data:image/jpeg") == 8
