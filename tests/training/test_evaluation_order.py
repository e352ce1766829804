"""Evaluation in the order of the images' sizes: the same images under the same ids, with less padding."""

import pytest
import torch

from detr_fast.cli import main
from detr_fast.data import make_shapes_dataset
from detr_fast.inference import evaluation


@pytest.fixture(scope="module")
def results_of(trained, tmp_path_factory):
    """Flags → ({image id: result}, padded shapes, pycocotools' numbers) of an evaluation of 12 images."""
    folder = tmp_path_factory.mktemp("twelve")
    data = make_shapes_dataset(folder / "data", num_train=0, num_val=12, image_size=48)

    def run(monkeypatch, *flags):
        seen, padded, evaluate = {}, [], evaluation.evaluate

        def watched(model, *args, **kwargs):
            model.register_forward_hook(lambda module, inputs, outputs: padded.append(inputs[0].tensors.shape))
            return evaluate(model, *args, **kwargs, on_results=seen.update)

        monkeypatch.setattr(evaluation, "evaluate", watched)
        argv = ["eval", "--weights", str(trained / "checkpoint.pth"), "--coco_path", str(data), "--num_workers", "0"]
        assert main([*argv, "--device", "cpu", "--output_dir", str(folder / "out"), *flags]) == 0
        monkeypatch.undo()
        return seen, padded, torch.load(folder / "out" / "eval.pth", weights_only=True)["stats"]

    return run


def test_one_by_one_the_order_changes_nothing(results_of, monkeypatch):
    ordered, shapes, stats = results_of(monkeypatch, "--batch_size", "1")
    plain, plain_shapes, plain_stats = results_of(monkeypatch, "--batch_size", "1", "--no_group_by_size")
    assert shapes == sorted(shapes, reverse=True) and sorted(plain_shapes, reverse=True) == shapes != plain_shapes
    assert ordered.keys() == plain.keys() and len(plain) == 12
    for image_id, result in plain.items():
        for name, value in result.items():
            assert torch.equal(ordered[image_id][name], value)
    assert stats == plain_stats


def test_batches_have_less_padding_and_results_stay_with_their_images(results_of, monkeypatch):
    alone, _, _ = results_of(monkeypatch, "--batch_size", "1")
    ordered, shapes, _ = results_of(monkeypatch, "--batch_size", "4")
    _, plain_shapes, _ = results_of(monkeypatch, "--batch_size", "4", "--no_group_by_size")
    assert sum(shape.numel() for shape in shapes) < sum(shape.numel() for shape in plain_shapes)
    assert ordered.keys() == alone.keys()
    # Padding moves an image's numbers a little; another image's are far away.
    ids = sorted(alone)
    far = torch.stack([torch.stack([distance(ordered[a], alone[b]) for b in ids]) for a in ids])
    assert far.argmin(dim=1).tolist() == list(range(len(ids)))


def distance(one, other):
    return (one["scores"] - other["scores"]).abs().sum() + (one["boxes"] - other["boxes"]).abs().mean()
