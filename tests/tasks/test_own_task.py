"""A task from outside the package, unlike all of its own: nobody had to be told of it but `register`."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from detr_fast.cli import main
from detr_fast.data import CocoDetection, make_coco_transforms, make_shapes_dataset
from detr_fast.tasks import Task, register, registry, task_of_postprocessors, task_of_weights
from detr_fast.tasks.paths import dataset_paths


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(3, 1)

    def forward(self, samples):
        inside = ~samples.mask
        colour = (samples.tensors * inside[:, None]).sum((2, 3)) / inside.sum((1, 2))[:, None]
        return {"pred_count": self.weight(colour)[:, 0]}


class CountCriterion(nn.Module):
    weight_dict = {"loss_count": 1.0}

    def forward(self, outputs, targets):
        wanted = torch.stack([torch.tensor(float(len(target["labels"]))) for target in targets])
        return {"loss_count": nn.functional.mse_loss(outputs["pred_count"], wanted)}


class CountPostProcess(nn.Module):
    def forward(self, outputs):
        one = torch.ones(1)
        return [{"scores": one, "labels": one.long(), "count": count} for count in outputs["pred_count"]]


class CountEvaluator:
    def __init__(self, coco):
        self.coco, self.errors = coco, []

    def update(self, predictions):
        for image_id, result in predictions.items():
            self.errors.append(abs(float(result["count"]) - len(self.coco.getAnnIds(image_id))))

    def synchronize_between_processes(self): ...

    def accumulate(self): ...

    def summarize(self):
        print(f"mean error of the count: {sum(self.errors) / len(self.errors):.3f} of {len(self.errors)} images")

    def log_row(self):
        return {"count_error": sum(self.errors) / len(self.errors)}

    def state(self):
        return {"errors": torch.tensor(self.errors)}


class Count(Task):
    """How many objects there are."""

    name = "count"
    dataset_file = "objects_counted"
    postprocessor_names = ("count",)
    found = "counts"

    def build(self, config):
        return Counter(), CountCriterion(), {"count": CountPostProcess()}

    def recognises(self, state):
        return set(state) == {"weight.weight", "weight.bias"}

    def settings_of(self, state):
        return {"dataset_file": self.dataset_file}

    def build_dataset(self, image_set, config, *, categories=None, uint8=False):
        return CocoDetection(*dataset_paths(image_set, config), self.transforms(image_set, config, uint8=uint8))

    def resize(self, config, *, uint8=False):
        return make_coco_transforms("val", scales=config.image_size, uint8=uint8)

    augment = resize

    def evaluator(self, annotations, dataset, output_dir=""):
        return CountEvaluator(annotations)

    def postprocess(self, postprocessors, outputs, orig_sizes, sizes, padded_size):
        return postprocessors["count"](outputs)

    def score(self, stats):
        return -stats["count_error"] if "count_error" in stats else None

    def describe(self, result, threshold):
        return [{"count": float(result["count"])}]

    def draw(self, image, result, names, threshold):
        return Image.new("RGB", image.size)

    def draw_sample(self, image, truth, result, names, threshold, coco):
        return image, self.draw(image, result, names, threshold)

    def report(self, evaluator):
        return ["counted"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes_dataset(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=5, image_size=48)


@pytest.fixture
def count(monkeypatch):
    registry.tasks()  # the package's own are there first
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    return register(Count())


@pytest.fixture
def trained(count, shapes, tmp_path):
    flags = ["--dataset_file", "objects_counted", "--coco_path", str(shapes), "--image_size", "48", "--device", "cpu"]
    flags += ["--num_workers", "0", "--epochs", "2", "--output_dir", str(tmp_path / "run"), "--ema_decay", "0.5"]
    assert main(["train", *flags]) == 0
    return tmp_path / "run"


def test_it_trains_resumes_evaluates_and_predicts(count, trained, shapes, tmp_path, capsys):
    rows = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[1]["train_loss"] < rows[0]["train_loss"] and rows[1]["train_loss_count"] == rows[1]["train_loss"]
    assert (trained / "checkpoint_best.pth").is_file() and list((trained / "samples").glob("*.png"))
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    assert checkpoint["best"] == max(-row["test_count_error"] for row in rows)

    flags = ["--dataset_file", "objects_counted", "--coco_path", str(shapes), "--image_size", "48", "--device", "cpu"]
    flags += ["--num_workers", "0", "--output_dir", str(trained), "--ema_decay", "0.5"]
    assert main(["train", *flags, "--epochs", "3", "--resume", str(trained / "checkpoint.pth")]) == 0
    assert len((trained / "log.txt").read_text().splitlines()) == 3

    # The checkpoint says which task it is of: no flag does.
    capsys.readouterr()
    data = ["--coco_path", str(shapes), "--image_size", "48", "--device", "cpu", "--num_workers", "0"]
    assert main(["eval", *data, "--resume", str(trained / "checkpoint.pth")]) == 0
    printed = capsys.readouterr().out
    assert "mean error of the count" in printed and "counted" in printed

    out = tmp_path / "found"
    weights = ["--weights", str(trained / "checkpoint.pth"), "--image_size", "48", "--device", "cpu"]
    assert main(["predict", str(Path(shapes) / "val2017"), *weights, "--output_dir", str(out)]) == 0
    found = json.loads((out / "predictions.json").read_text())
    assert len(found) == 5 and all({"image_id", "file_name", "count"} == set(entry) for entry in found)


def test_a_backend_that_its_evaluator_does_not_take_is_refused(trained, shapes, capsys):
    data = ["--coco_path", str(shapes), "--image_size", "48", "--device", "cpu", "--num_workers", "0"]
    data += ["--eval_backend", "pycocotools"]
    assert main(["train", "--dataset_file", "objects_counted", *data]) == 2
    assert main(["eval", *data, "--weights", str(trained)]) == 2
    assert capsys.readouterr().err.count("--eval_backend does nothing with --dataset_file objects_counted") == 2


def test_a_backend_that_is_not_installed_is_refused_before_training(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (["train"], ["eval", "--weights", "nowhere.pth"]):
        assert main([*command, "--coco_path", "nowhere", "--device", "cpu", "--eval_backend", "hotcoco"]) == 2
        assert "--eval_backend: backend='hotcoco': it is not installed" in capsys.readouterr().err


def test_its_weights_and_post_processors_are_known_by_it(count):
    state = Counter().state_dict()
    assert task_of_weights(state, None, None) is count
    assert task_of_postprocessors(["count"]) is count


def test_a_name_that_no_task_has_names_those_there_are(count, shapes, tmp_path, capsys):
    flags = ["--dataset_file", "objects_count", "--coco_path", str(shapes), "--output_dir", str(tmp_path / "none")]
    assert main(["train", *flags]) != 0
    assert "--dataset_file must be one of" in (said := capsys.readouterr().err) and "objects_counted" in said


def test_of_several_tasks_the_one_asked_for_then_the_one_trained_then_the_first():
    """A panoptic model is one of masks as well; its data need paths of their own, so it is evaluated if asked."""
    state = {"detr.class_embed.bias": torch.zeros(3), "detr.bbox_embed.layers.0.weight": torch.zeros(1)}
    assert task_of_weights(state, None, None).name == "masks"
    assert task_of_weights(state, None, "coco_panoptic").name == "masks"
    assert task_of_weights(state, "coco_panoptic", "coco").name == "panoptic"
    with pytest.raises(ValueError, match="the weights are of no model that is known here"):
        task_of_weights({"fc.weight": torch.zeros(1)}, None, None)
