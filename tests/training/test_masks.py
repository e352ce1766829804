"""Masks and panoptic data through the command line and `evaluate`."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.cli import main
from detr_fast.criterion import HungarianMatcher, PostProcess, PostProcessPanoptic, PostProcessSegm, SetCriterion
from detr_fast.data import CocoPanoptic, build_loader, make_shapes_dataset
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Compose, Normalize, ToTensor
from detr_fast.inference.huggingface_names import to_huggingface
from detr_fast.training.checkpoint import read_checkpoint
from detr_fast.training.engine import evaluate

mask_utils = pytest.importorskip("pycocotools.mask")
COCO = pytest.importorskip("pycocotools.coco").COCO

TINY = [
    "--backbone", "resnet18", "--backbone_weights", "none", "--backbone_level", "1", "--hidden_dim", "128",
    "--nheads", "8", "--enc_layers", "1", "--dec_layers", "1", "--dim_feedforward", "16", "--num_queries", "5",
    "--image_size", "32", "--batch_size", "2", "--num_workers", "0", "--lr", "1e-3", "--lr_backbone", "1e-3",
    "--device", "cpu", "--print_freq", "1000", "--epochs", "1", "--output_dir", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """4 training and 3 validation images with masks and panoptic segments."""
    return make_shapes_dataset(
        tmp_path_factory.mktemp("panoptic"), num_train=4, num_val=3, image_size=(32, 48), panoptic=True
    )


@pytest.fixture(scope="module")
def detector(data, tmp_path_factory):
    """The checkpoint of a detector without masks."""
    output = tmp_path_factory.mktemp("detector")
    assert main(["train", *TINY, "--coco_path", str(data), "--output_dir", str(output), "--sample_images", "0"]) == 0
    return output / "checkpoint.pth"


@pytest.fixture(scope="module")
def trained(data, detector, tmp_path_factory):
    """The output folder of a run that trained the mask head of a frozen detector."""
    output = tmp_path_factory.mktemp("masks")
    flags = ["--masks", "--frozen_weights", str(detector), "--coco_path", str(data), "--output_dir", str(output)]
    assert main(["train", *TINY, *flags]) == 0
    return output


def rows(output):
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def test_frozen_weights_train_the_mask_head_alone(trained, detector):
    (row,) = rows(trained)
    assert len(row["test_coco_eval_masks"]) == len(row["test_coco_eval_bbox"]) == 12
    assert row["train_loss_mask"] > 0 and row["train_loss_dice"] > 0 and row["test_loss_dice_unscaled"] > 0
    before, after = read_checkpoint(detector)["model"], read_checkpoint(trained / "checkpoint.pth")["model"]
    assert all(torch.equal(value, after[f"detr.{name}"]) for name, value in before.items())
    head = {name: value for name, value in after.items() if not name.startswith("detr.")}
    assert set(name.split(".")[0] for name in head) == {"bbox_attention", "mask_head"}
    assert sum(value.numel() for value in head.values()) == row["n_parameters"]
    assert all((head[f"mask_head.gn{i}.weight"] != 1).any() for i in range(1, 6))
    assert read_checkpoint(trained / "checkpoint.pth")["best"] == row["test_coco_eval_masks"][0]
    with Image.open(trained / "samples" / "epoch0000.png") as image:
        assert len(image.convert("L").resize((64, 64)).getcolors(4096)) > 10


def test_a_trained_mask_head_is_contiguous_for_hugging_face(trained):
    """Training leaves its convolutions' weights channels-last, which safetensors does not write."""
    state = read_checkpoint(trained / "checkpoint.pth")["model"]
    converted = to_huggingface(state)
    assert all(value.is_contiguous() for value in converted.values())
    assert torch.equal(converted["mask_head.lay1.weight"], state["mask_head.lay1.weight"])


def test_eval_and_predict_know_that_a_checkpoint_has_masks(trained, data, tmp_path, capsys):
    weights = ["--weights", str(trained / "checkpoint.pth"), "--device", "cpu"]
    assert main(["eval", *weights, "--coco_path", str(data), "--num_workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "IoU metric: segm" in out and "category (masks)" in out
    assert main(["predict", str(data / "val2017"), *weights, "--threshold", "0", "--output_dir", str(tmp_path)]) == 0
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    images = {image["id"]: image for image in json.loads((tmp_path / "images.json").read_text())}
    assert len(predictions) == 15 and len(images) == 3
    for prediction in predictions:
        image = images[prediction["image_id"]]
        assert mask_utils.decode(prediction["segmentation"]).shape == (image["height"], image["width"])
    # pycocotools reads them as results with masks.
    truth = COCO(str(data / "annotations" / "instances_val2017.json"))
    assert len(truth.loadRes(predictions).anns) == 15


def test_weights_of_a_detector_get_a_fresh_mask_head(detector, data, tmp_path, capsys):
    flags = ["--masks", "--weights", str(detector), "--coco_path", str(data), "--max_steps", "1"]
    assert main(["train", *TINY, *flags, "--output_dir", str(tmp_path)]) == 0
    assert "starts fresh: the mask head" in capsys.readouterr().out
    before, after = read_checkpoint(detector)["model"], read_checkpoint(tmp_path / "checkpoint.pth")["model"]
    moved = (after["detr.input_proj.weight"] - before["input_proj.weight"]).abs().max()
    assert 0 < moved <= 0.002  # one AdamW step of 1e-3


def test_panoptic_run(data, tmp_path, capsys, monkeypatch):
    """Neither training nor evaluation reads a panoptic json whole, or a second time."""
    for module in ("data.panoptic", "data.segments", "evaluation.panoptic"):
        monkeypatch.setattr(f"detr_fast.{module}.read_panoptic", lambda _: pytest.fail("the json was read whole"))
    monkeypatch.setattr("detr_fast.data.store.SMALLEST", 0)
    cache = tmp_path / "cache"
    panoptic = ["--dataset_file", "coco_panoptic", "--coco_path", str(data), "--coco_panoptic_path", str(data)]
    panoptic += ["--cache_dir", str(cache)]
    assert main(["train", *TINY, "--masks", *panoptic, "--output_dir", str(tmp_path)]) == 0
    (row,) = rows(tmp_path)
    assert {"panoptic_train2017", "panoptic_val2017"} <= {path.name.rpartition("-")[0] for path in cache.iterdir()}
    monkeypatch.setattr("detr_fast.data.segments.read_segments", lambda _: pytest.fail("the cache was not used"))
    for name in ("PQ_all", "PQ_th", "PQ_st"):
        assert set(row[f"test_{name}"]) == {"pq", "sq", "rq", "n"}
    assert row["test_PQ_all"]["n"] >= 3
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["test_PQ_st_pq"]) == row["test_PQ_st"]["pq"]
    assert len(list((tmp_path / "panoptic_eval").glob("*.png"))) == 3
    report = (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    assert "panoptic quality of each class" in report and report.count("data:image/jpeg") == 6
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    assert checkpoint["args"]["thing_classes"] == [1, 2, 3] and checkpoint["args"]["num_classes"] == 6
    capsys.readouterr()
    weights = ["--weights", str(tmp_path / "checkpoint.pth"), "--device", "cpu", "--num_workers", "0"]
    assert main(["eval", *weights, *panoptic]) == 0
    assert f"All      | {100 * row['test_PQ_all']['pq']:5.1f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--frozen_weights", "d.pth"], "--frozen_weights is about masks; it needs --masks"),
        (["--dice_loss_coef", "2"], "--dice_loss_coef is about masks"),
        (["--masks", "--frozen_weights", "a.pth", "--weights", "b.pth"], "give one of them"),
        (["--dataset_file", "coco_panoptic"], "needs --coco_path .images. and --coco_panoptic_path"),
        (["--coco_panoptic_path", "p"], "only read with --dataset_file coco_panoptic"),
    ],
)
def test_flags_that_need_others(flags, message, data, capsys):
    assert main(["train", *TINY, "--coco_path", str(data), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_weights_that_do_not_fit_are_refused(trained, detector, data, capsys):
    flags = ["train", *TINY, "--coco_path", str(data), "--masks"]
    assert main([*flags, "--frozen_weights", str(trained / "checkpoint.pth")]) == 2
    assert "does not fit this model" in capsys.readouterr().err
    assert main([*flags, "--resume", str(detector)]) == 2
    assert "--masks was False and is True" in capsys.readouterr().err
    evaluate_flags = ["eval", "--weights", str(detector), "--coco_path", str(data), "--device", "cpu", "--masks"]
    assert main(evaluate_flags) == 2
    assert "has no mask head" in capsys.readouterr().err


class Oracle(torch.nn.Module):
    """Says what is written in the targets, image after image."""

    def __init__(self, dataset, classes):
        super().__init__()
        self.dataset, self.classes, self.next = dataset, classes, 0

    def forward(self, samples):
        batch, _, height, width = samples.tensors.shape
        logits = torch.zeros(batch, 8, self.classes + 1)
        logits[..., -1] = 30
        boxes, masks = torch.full((batch, 8, 4), 0.5), torch.full((batch, 8, height, width), -10.0)
        for b in range(batch):
            target = self.dataset[self.next][1]
            self.next += 1
            n = len(target["labels"])
            logits[b, torch.arange(n), target["labels"]] = 60
            boxes[b, :n] = target["boxes"]
            h, w = target["masks"].shape[-2:]
            masks[b, :n, :h, :w] = target["masks"] * 20.0 - 10
        return {"pred_logits": logits, "pred_boxes": boxes, "pred_masks": masks}


def test_evaluate_finds_a_perfect_model_perfect(data, tmp_path):
    """Batches of images of different sizes: every mask has to arrive at its own image's size and place."""
    dataset = CocoPanoptic(
        data / "train2017",
        data / "panoptic_train2017",
        data / "annotations" / "panoptic_train2017.json",
        Compose([ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)]),
    )
    sizes = {tuple(target["size"].tolist()) for _, target in dataset}
    assert len(sizes) > 1
    # Boxes and masks of things, with the very pixels of the segments.
    truth = COCO()
    annotations = []
    for _, target in dataset:
        for label, mask in zip(target["labels"].tolist(), target["masks"].numpy(), strict=True):
            if label <= 3:
                rle = mask_utils.encode(np.asfortranarray(mask))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": int(target["image_id"]),
                        "category_id": label,
                        "iscrowd": 0,
                        "area": int(mask.sum()),
                        "segmentation": rle,
                        "bbox": mask_utils.toBbox(rle).tolist(),
                    }
                )
    truth.dataset = {**dataset.coco, "annotations": annotations}
    truth.createIndex()

    matcher = HungarianMatcher(1, 5, 2)
    criterion = SetCriterion(
        6, matcher, {"loss_ce": 1, "loss_dice": 1}, 0.1, ["labels", "boxes", "cardinality", "masks"]
    )
    postprocessors = {
        "bbox": PostProcess(),
        "segm": PostProcessSegm(),
        "panoptic": PostProcessPanoptic({i: 1 <= i <= 3 for i in range(6)}),
    }
    # The oracle answers in the order of the ids.
    loader = build_loader(dataset, 2, train=False, group_by_size=False)
    stats, _ = evaluate(
        Oracle(dataset, 6), criterion, postprocessors, loader, truth, torch.device("cpu"), str(tmp_path)
    )
    assert stats["coco_eval_masks"][0] == pytest.approx(1)
    for name in ("PQ_all", "PQ_th", "PQ_st"):
        assert stats[name]["pq"] == pytest.approx(1)
    assert stats["loss_dice"] < 1e-3 and stats["class_error"] == 0
    with pytest.raises(ValueError, match="evaluated on a CocoPanoptic"):
        evaluate(Oracle(dataset, 6), criterion, postprocessors, build_loader([0], 1, train=False), truth, "cpu")


def test_masks_of_real_images(coco_mini, tmp_path):
    """Polygons, crowd regions in run lengths, and an image without objects."""
    flags = []
    for split in ("train", "val"):
        content = json.loads((coco_mini / "annotations" / f"instances_{split}2017.json").read_text())
        crowded = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
        images = sorted(content["images"], key=lambda image: (image["id"] not in crowded, image["id"]))[:8]
        used = {image["id"] for image in images[:-1]}
        annotations = [a for a in content["annotations"] if a["image_id"] in used]
        assert any(a["iscrowd"] and isinstance(a["segmentation"], dict) for a in annotations)
        assert any(isinstance(a["segmentation"], list) for a in annotations)
        ann = tmp_path / f"{split}.json"
        ann.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
        flags += [f"--{split}_ann", str(ann), f"--{split}_images", str(coco_mini / f"{split}2017")]
    flags += ["--masks", "--image_size", "64", "--num_queries", "20", "--sample_images", "1"]
    assert main(["train", *TINY, *flags, "--output_dir", str(tmp_path / "out")]) == 0
    (row,) = rows(tmp_path / "out")
    assert 0 < row["train_loss_dice"] < 2 and len(row["test_coco_eval_masks"]) == 12
