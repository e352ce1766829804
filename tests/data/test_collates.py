import json
import shutil
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from detr_fast.data import (
    CocoDetection,
    DetectionCollate,
    DropMissing,
    EpochLoader,
    SkipUnreadable,
    UnpaddedDistributedSampler,
    build_loader,
    make_coco_transforms,
)

GOOD = [1, 3, 4, 6, 7, 8, 9, 11, 12, 13]  # of 13 images: 2 is truncated, 5 is missing, 10 is not an image; 4 is empty


class WithId(Dataset):
    """(image id, image, target) of a CocoDetection."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, target = self.dataset[index]
        return int(target["image_id"]), image, target


@pytest.fixture(scope="module")
def damaged(shapes, tmp_path_factory):
    """The generated images, one listed twice, with missing and corrupt files and an image without objects."""
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(shapes / "train2017", root / "images")
    content = json.loads((shapes / "annotations" / "instances_train2017.json").read_text())
    content["images"].append({**content["images"][0], "id": 13})
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 4]
    (root / "ann.json").write_text(json.dumps(content))
    file = {entry["id"]: root / "images" / entry["file_name"] for entry in content["images"]}
    file[2].write_bytes(file[2].read_bytes()[:500])
    file[5].unlink()
    file[10].write_text("not an image")
    transforms = make_coco_transforms("train", scales=48)
    return SkipUnreadable(WithId(CocoDetection(root / "images", root / "ann.json", transforms)))


pytestmark = pytest.mark.filterwarnings("ignore:sample .* is left out")


def delivered(loader):
    return [image_id for ids, *_ in loader for image_id in ids]


SAMPLERS = {
    "sequential": lambda data: {"sampler": SequentialSampler(data)},
    "shuffle": lambda data: {"shuffle": True},
    "random": lambda data: {"sampler": RandomSampler(data)},
    "subset": lambda data: {"sampler": SubsetRandomSampler(range(13))},
    "list": lambda data: {"sampler": list(range(12, -1, -1))},
    "weighted": lambda data: {"sampler": WeightedRandomSampler(torch.rand(13) + 0.1, 13, replacement=False)},
    "batch": lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 4, drop_last=False), "batch_size": 1},
    "distributed": lambda data: {"sampler": DistributedSampler(data, 1, 0)},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_good_sample_once_per_epoch_with_every_sampler(damaged, name):
    loader = EpochLoader(damaged, **{"batch_size": 4, **SAMPLERS[name](damaged)}, collate_fn=DetectionCollate(32))
    first, second = delivered(loader), delivered(loader)
    assert sorted(first) == sorted(second) == GOOD
    assert (first == second) == (name in ("sequential", "list"))
    loader.set_epoch(0)
    assert delivered(loader) == first


@pytest.mark.parametrize("collate", [DetectionCollate(32, multiscale=True, every=2, min_size=32, max_size=96), None])
def test_workers_deliver_the_same_batches_as_none(damaged, collate):
    collate = collate or DropMissing(
        lambda samples: (tuple(s[0] for s in samples), torch.stack([s[1][:, :9, :9] for s in samples]))
    )
    plain = EpochLoader(damaged, 2, shuffle=True, collate_fn=collate)
    workers = EpochLoader(
        damaged,
        2,
        shuffle=True,
        collate_fn=collate,
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=3,
        timeout=60,
    )
    sizes = set()
    for _ in range(2):
        expected, got = list(plain), list(workers)
        assert sorted(i for ids, *_ in got for i in ids) == GOOD and len(expected) == len(got)
        for (ids, *tensors), (worker_ids, *worker_tensors) in zip(expected, got, strict=True):
            assert ids == worker_ids and all(map(torch.equal, tensors, worker_tensors))
            sizes.add(tensors[0].shape[-1])
    assert len(sizes) > 1 if isinstance(collate, DetectionCollate) else sizes == {9}


def _process(rank, init_file, damaged, complete, folder):
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    loader = EpochLoader(
        damaged, 2, sampler=UnpaddedDistributedSampler(damaged), num_workers=1, collate_fn=DetectionCollate(32)
    )
    epochs = [delivered(loader), delivered(loader)]
    grouped = build_loader(complete, 2, train=True, distributed=True, pin_memory=False)
    ids = [[int(target["image_id"]) for target in targets] for _, targets in grouped]
    (folder / f"{rank}.json").write_text(json.dumps([*epochs, ids]))
    dist.destroy_process_group()


def test_two_processes_share_the_good_samples(damaged, shapes, tmp_path):
    complete = CocoDetection(
        shapes / "train2017",
        shapes / "annotations" / "instances_train2017.json",
        make_coco_transforms("train", scales=48),
    )
    torch.multiprocessing.start_processes(
        _process, (tmp_path / "init", damaged, complete, tmp_path), nprocs=2, start_method="fork"
    )
    epochs = list(zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)), strict=True))
    *epochs, grouped = epochs
    assert epochs[0] != epochs[1]
    assert [len(batches) for batches in grouped] == [3, 3]
    assert sorted(image_id for batches in grouped for batch in batches for image_id in batch) == list(range(1, 13))
    for first, second in epochs:
        assert first and second and sorted(first + second) == GOOD


def test_unpadded_sampler_differs_from_torchs_in_the_repetition_only():
    data = range(7)
    ours = [UnpaddedDistributedSampler(data, 3, rank, shuffle=False) for rank in range(3)]
    assert [list(s) for s in ours] == [[0, 3, 6], [1, 4], [2, 5]] and [len(s) for s in ours] == [3, 2, 2]
    shuffled = [list(UnpaddedDistributedSampler(data, 2, rank, seed=4)) for rank in range(2)]
    assert sorted(sum(shuffled, [])) == list(data) and sum(shuffled, []) != list(data)


def boxes(n):
    return torch.cat([torch.zeros(n, 1), torch.arange(5.0 * n).reshape(n, 5)], dim=1)


def test_detection_collate_numbers_boxes_after_dropping():
    image = torch.arange(3 * 8 * 6.0).reshape(3, 8, 6)
    target = {"labels": torch.tensor([7]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.1]])}
    samples = [("a", image, boxes(2)), None, ("b", image, None), ("c", image, boxes(1)[:, 1:]), ("d", image, target)]
    paths, images, rows = DetectionCollate(4)(samples)
    assert paths == ("a", "b", "c", "d") and images.shape == (4, 3, 4, 4)
    assert torch.equal(images[0], image[:, ::2][:, :, [0, 1, 3, 4]])  # nearest: pixels floor(i · 6 / 4)
    assert rows[:, 0].tolist() == [0, 0, 2, 3] and rows.dtype == torch.float32
    assert torch.equal(rows[:3, 1:], torch.cat([boxes(2), boxes(1)])[:, 1:])
    assert rows[3, 1:].tolist() == pytest.approx([7, 0.5, 0.5, 0.2, 0.1])
    assert torch.equal(samples[0][2], boxes(2))  # the dataset's own tensor is left alone
    assert DetectionCollate(4)([None, None]) is None
    _, none = DetectionCollate(4, mode="bilinear")([(image, torch.zeros(0, 6))])
    assert none.shape == (0, 6)


def test_multiscale_changes_the_size_every_tenth_batch():
    data = [(torch.zeros(3, 8, 8), None)] * 47
    collate = DetectionCollate(96, multiscale=True)
    sizes = {}
    for workers in (0, 2):
        loader = EpochLoader(data, 1, num_workers=workers, collate_fn=collate)
        sizes[workers] = [images.shape[-1] for _ in range(2) for images, _ in loader]
    assert sizes[0] == sizes[2] and len(sizes[0]) == 94
    runs = [sizes[0][:9], *(sizes[0][i : i + 10] for i in range(9, 94, 10))]
    assert all(len(set(run)) == 1 for run in runs) and runs[0][0] == 96
    assert {run[0] for run in runs} <= set(range(32, 193, 32)) and len({run[0] for run in runs}) > 3
    # Without numbers: the same counting in one process, an error in workers, which cannot know.
    assert [images.shape[-1] for images, _ in DataLoader(data, 1, collate_fn=collate)] == sizes[0][:47]
    with pytest.raises(ValueError, match="EpochLoader"):
        next(iter(DataLoader(data, 1, num_workers=1, collate_fn=collate)))


@pytest.mark.parametrize(
    "samples, error, message",
    [([(torch.zeros(3, 4, 4), torch.zeros(2, 4))], ValueError, r"\(2, 4\)"),
     ([(torch.zeros(4, 4), None)], ValueError, r"\(4, 4\)"),
     ([(torch.zeros(3, 4, 4), None), (torch.zeros(1, 4, 4), None)], ValueError, "of one C"),
     ([("path", None)], TypeError, r"\(str, NoneType\)"), ([torch.zeros(3, 4, 4)], TypeError, "a Tensor"),
     ([(torch.zeros(3, 4, 4), {"boxes": None})], TypeError, "labels and boxes")],
)  # fmt: skip
def test_detection_collate_rejects(samples, error, message):
    with pytest.raises(error, match=message):
        DetectionCollate(32)(samples)


@pytest.mark.parametrize(
    "options", [{"image_size": 0}, {"min_size": 64, "max_size": 32}, {"mode": "cubic"}, {"step": 0}]
)
def test_detection_collate_rejects_options(options):
    with pytest.raises(ValueError, match="expected|must be"):
        DetectionCollate(**options)


def test_drop_missing_is_default_collate_of_what_is_left():
    samples = [{"x": torch.tensor([1.0]), "name": "a"}, None, {"x": torch.tensor([2.0]), "name": "b"}]
    got, expected = DropMissing()(samples), default_collate([samples[0], samples[2]])
    assert torch.equal(got["x"], expected["x"]) and got["name"] == ["a", "b"] and DropMissing()([None]) is None


def test_skip_unreadable_warns_and_lets_other_errors_through():
    class Broken(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise FileNotFoundError("gone.jpg") if index == 0 else KeyError("a mistake")

    data = SkipUnreadable(Broken())
    with pytest.warns(UserWarning, match=r"sample 0 .*gone\.jpg"):
        assert data[0] is None
    with pytest.raises(KeyError):
        data[1]


def numbers(loader):
    return [value for (batch,) in loader for value in batch.tolist()]


def test_weighted_sampler_repeats_and_gives_each_repetition_its_own_draws():
    class Draws(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return (torch.tensor([float(index), torch.rand(()).item()]),)

    loader = EpochLoader(Draws(), 8, sampler=WeightedRandomSampler([0.0, 1.0, 2.0, 0.0], 16), num_workers=2)
    rows = [tuple(row) for (batch,) in loader for row in batch.tolist()]
    assert len(set(rows)) == 16 and Counter(int(index) for index, _ in rows).keys() == {1, 2}


def test_drop_last_subset_and_single_samples():
    data = TensorDataset(torch.arange(10))
    assert len(EpochLoader(data, 4, drop_last=True)) == 2 and len(EpochLoader(data, 4)) == 3
    assert numbers(EpochLoader(Subset(data, [3, 1]), 2)) == [3, 1]
    loader = EpochLoader(data, batch_size=None, shuffle=True)
    values = [int(value) for (value,) in loader]
    assert sorted(values) == list(range(10)) and values != sorted(values) and len(loader) == 10


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_pinned_batches_are_the_same():
    data = TensorDataset(torch.arange(10))
    loader = EpochLoader(data, 3, pin_memory=True, num_workers=1)
    assert numbers(loader) == list(range(10))
    assert next(iter(loader))[0].is_pinned() == torch.cuda.is_available()


def test_batch_sampler_without_a_length():
    class Pairs:
        def __iter__(self):
            return iter([[4, 2], [1, 0]])

    loader = EpochLoader(TensorDataset(torch.arange(10)), batch_sampler=Pairs())
    assert numbers(loader) == numbers(loader) == [4, 2, 1, 0]


def test_a_generator_given_by_the_user_is_kept():
    data = TensorDataset(torch.arange(10))
    order = numbers(EpochLoader(data, 2, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(3))))
    assert order == list(RandomSampler(data, generator=torch.Generator().manual_seed(3)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


DATA = TensorDataset(torch.arange(10))
BATCHES = [[0, 1], [2]]


@pytest.mark.parametrize(
    "options, message",
    [({"batch_sampler": BATCHES, "batch_size": 2}, "batch_sampler .* excludes batch_size"),
     ({"batch_sampler": BATCHES, "shuffle": True}, "excludes shuffle"),
     ({"batch_sampler": BATCHES, "sampler": [0]}, "excludes sampler"),
     ({"batch_sampler": BATCHES, "drop_last": True}, "excludes drop_last"),
     ({"sampler": [0], "shuffle": True}, "sampler .* excludes shuffle"),
     ({"batch_size": None, "drop_last": True}, "excludes drop_last"),
     ({"batch_size": 0}, "batch_size must be at least 1"),
     ({"num_workers": -1}, "num_workers"), ({"timeout": -1}, "timeout"),
     ({"prefetch_factor": 2}, "prefetch_factor: only with worker"),
     ({"persistent_workers": True}, "persistent_workers: only with worker"),
     ({"timeout": 5}, "timeout: only with worker"),
     ({"multiprocessing_context": "fork"}, "multiprocessing_context: only with worker"),
     ({"num_workers": 1, "prefetch_factor": 0}, "prefetch_factor must be at least 1"),
     ({"seed": -1}, "seed must be"),
     ({"sampler": WeightedRandomSampler([1.0, 0.0], 2, replacement=False)}, "only 1 have a positive weight")],
)  # fmt: skip
def test_loader_rejects_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        EpochLoader(DATA, **options)


def test_loader_rejects_other_datasets():
    with pytest.raises(TypeError, match="map-style .* Stream"):
        EpochLoader(Stream())
    with pytest.raises(ValueError, match="empty"):
        EpochLoader([])
    with pytest.raises(TypeError, match="colour"):
        EpochLoader(DATA, colour="red")
