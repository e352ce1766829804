"""docs/predict.md runs as printed, in a folder with the files that it names."""

import json
import re
from pathlib import Path

from PIL import Image

from detr_fast.inference.sources import SOURCES
from detr_fast.models.hub import published

PAGE = (Path(__file__).parents[2] / "docs" / "predict.md").read_text(encoding="utf-8")


def test_the_page_runs(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    Path("outputs/mine").symlink_to(run_folder)
    Path("photos").mkdir()
    Image.new("RGB", (90, 70), (200, 30, 30)).save("photo.jpg")
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 90, "height": 70} for number in (1, 2)]
    for image in images:
        Image.open("photo.jpg").save(f"photos/{image['file_name']}")
    annotations = [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [5, 6, 20, 22]}]
    categories = [{"id": 5, "name": "dot"}, {"id": 9, "name": "bar"}]
    Path("val.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    # Loader processes would cost more time than the page.
    page = PAGE.replace("val_images=", "num_workers=0, val_images=")
    scope: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(snippet, scope)
    assert len(scope["several"]) == 4 and len(scope["everything"]) == 2
    assert len(scope["entries"]) == len(scope["found"]) == 5 and len(scope["stats"]["coco_eval_bbox"]) == 12
    assert Path("found.jpg").is_file() and Path("better.pth").is_file() and Path("outputs/better/log.txt").is_file()


def test_the_page_names_every_source():
    assert all(f'"{name}"' in PAGE and name in SOURCES for name in published())
