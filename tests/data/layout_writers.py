"""A folder in COCO's layout, written as other tools would: for tests of the readers."""

import json
import shutil
from pathlib import Path


def coco_sets(source):
    """ "train" and "val" → (image folder, json's content)."""
    return {
        name: (source / f"{name}2017", json.loads((source / "annotations" / f"instances_{name}2017.json").read_text()))
        for name in ("train", "val")
    }


def objects_of(content, image):
    return [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]


def write_roboflow(source: Path, target: Path) -> Path:
    """Roboflow's COCO export: a json in each folder, ids from 0 on, and category 0 for the whole project."""
    for name, (images, content) in coco_sets(source).items():
        folder = target / {"train": "train", "val": "valid"}[name]
        shutil.copytree(images, folder)
        for entry in content["categories"]:
            entry["supercategory"] = "shapes"
        content["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
        for number, entry in enumerate(content["annotations"]):
            entry["id"] = number
        for entry in content["images"]:
            entry["id"] -= 1
        for entry in content["annotations"]:
            entry["image_id"] -= 1
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return target


def yolo_line(entry, image, polygons=False):
    width, height = image["width"], image["height"]
    if polygons:
        points = entry["segmentation"][0]
        values = [v / (height if i % 2 else width) for i, v in enumerate(points)]
    else:
        x, y, w, h = entry["bbox"]
        values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
    return " ".join([str(entry["category_id"] - 1), *(f"{value:.9f}" for value in values)])


def write_yolo(source: Path, target: Path, *, polygons=False, yaml=True) -> Path:
    """Ultralytics' layout. Images without objects have no label file if their number is odd, else an empty one."""
    names = []
    for name, (images, content) in coco_sets(source).items():
        names = [entry["name"] for entry in content["categories"]]
        shutil.copytree(images, target / "images" / name)
        (target / "labels" / name).mkdir(parents=True)
        for image in content["images"]:
            lines = [yolo_line(entry, image, polygons) for entry in objects_of(content, image)]
            if lines or image["id"] % 2 == 0:
                file = target / "labels" / name / (Path(image["file_name"]).stem + ".txt")
                file.write_text("".join(line + "\n" for line in lines))
    if yaml:
        (target / "data.yaml").write_text(
            f"path: .\ntrain: images/train\nval: images/val\nnc: {len(names)}\nnames: {names}\n"
        )
    else:
        (target / "classes.txt").write_text("\n".join(names) + "\n")
    return target


def voc_xml(image, objects, names, origin=1):
    boxes = []
    for entry in objects:
        x, y, w, h = entry["bbox"]
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + origin, y + origin, x + w, y + h), strict=True)
        box = "".join(f"<{key}>{value:.4f}</{key}>" for key, value in corners)
        difficult = entry.get("difficult", 0)
        name = names[entry["category_id"]]
        boxes.append(f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>")
    size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
    return f"<annotation><filename>{image['file_name']}</filename>{size}{''.join(boxes)}</annotation>"


def write_voc(source: Path, target: Path) -> Path:
    """VOC's own layout; train and val have their image names apart."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (target / folder).mkdir(parents=True)
    for name, (images, content) in coco_sets(source).items():
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        stems = []
        for image in content["images"]:
            stem = f"{name}_{Path(image['file_name']).stem}"
            shutil.copy(images / image["file_name"], target / "JPEGImages" / f"{stem}.jpg")
            (target / "Annotations" / f"{stem}.xml").write_text(voc_xml(image, objects_of(content, image), names))
            stems.append(stem)
        (target / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")
    return target


WRITERS = {"roboflow": write_roboflow, "yolo": write_yolo, "voc": write_voc}
