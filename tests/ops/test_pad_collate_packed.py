"""`pack_images` and `pad_collate_packed`: one flat uint8 buffer gives what the list of images gives."""

import random

import pytest
import torch
from pad_collate_cases import INTERPRET, LAYOUTS, either, image, small_tiles

from detr_fast.ops import pad_collate, pad_collate_packed
from detr_fast.ops.pad_collate import pack_images


def bytes_like(shapes, layout="chw", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [image(shape, torch.uint8, layout, generator) for shape in shapes]


@either
@pytest.mark.parametrize("seed", range(12))
def test_pad_collate_packed_matches_list(seed, _implementation, monkeypatch):
    if INTERPRET:
        small_tiles(monkeypatch)
    rng = random.Random(seed)
    channels = rng.choice((None, 3, 3, 1))
    images = []
    for index in range(rng.randint(1, 5)):
        shape = (rng.randint(0, 4) if channels is None else channels, rng.randint(0, 40), rng.randint(0, 40))
        images += bytes_like([shape], rng.choice(LAYOUTS), seed + 100 * index)
    count = max(img.shape[0] for img in images)
    options = {"channels_last": rng.random() < 0.5, "size_divisor": rng.choice((1, 16))}
    if rng.random() < 0.7:
        options.update(mean=[0.3] * count, std=[0.2] * count, dtype=rng.choice((torch.float16, torch.float32)))
    buffer, header = pack_images(images, layout=rng.choice((None, "chw", "hwc")))
    assert buffer.numel() == sum(img.numel() for img in images)
    header = header.int() if seed % 2 else header
    for actual, expected in zip(
        pad_collate_packed(buffer, header, **options), pad_collate(images, **options), strict=True
    ):
        assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
        assert torch.equal(actual, expected)


def test_pack_images_keeps_each_memory_order():
    chw, hwc = bytes_like([(3, 2, 4)]), bytes_like([(3, 5, 2)], "hwc")
    buffer, header = pack_images(chw + hwc)
    assert header.tolist() == [[0, 3, 2, 4, 0], [24, 3, 5, 2, 1]]
    assert torch.equal(buffer[:24].view(3, 2, 4), chw[0])
    assert torch.equal(buffer[24:].view(5, 2, 3).permute(2, 0, 1), hwc[0])
    assert pack_images(chw + hwc, layout="hwc")[1][:, 4].tolist() == [1, 1]
    assert pack_images(chw + hwc, layout="chw")[1][:, 4].tolist() == [0, 0]


def test_pack_images_ignores_the_default_device():
    images = bytes_like([(3, 2, 4), (3, 5, 2)])
    with torch.device("meta"):
        buffer, header = pack_images(images)
        batch, _ = pad_collate_packed(buffer, header)
    assert buffer.device == header.device == torch.device("cpu") and torch.equal(batch, pad_collate(images)[0])


@either
def test_pad_collate_packed_allows_gaps_and_overlaps(_implementation):
    buffer = torch.arange(100, dtype=torch.uint8)
    header = torch.tensor([[70, 1, 2, 3, 0], [10, 1, 3, 2, 0], [12, 1, 2, 2, 1]])
    batch, _ = pad_collate_packed(buffer, header)
    assert batch[0, 0].tolist() == [[70, 71, 72], [73, 74, 75], [0, 0, 0]]
    assert batch[1, 0].tolist() == [[10, 11, 0], [12, 13, 0], [14, 15, 0]]
    assert batch[2, 0].tolist() == [[12, 13, 0], [14, 15, 0], [0, 0, 0]]


BUFFER, HEADER = pack_images([torch.zeros(3, 2, 4, dtype=torch.uint8)])


@pytest.mark.parametrize(
    "buffer, header, error, message",
    [
        (BUFFER.float(), HEADER, TypeError, "buffer is a torch.float32"),
        (None, HEADER, TypeError, "buffer is a NoneType"),
        (BUFFER.view(4, 6), HEADER, ValueError, r"buffer has shape \(4, 6\)"),
        (torch.zeros(48, dtype=torch.uint8)[::2], HEADER, ValueError, "expected one contiguous axis"),
        (BUFFER, HEADER.float(), TypeError, "header is a torch.float32"),
        (BUFFER, HEADER.to("meta"), TypeError, "expected an int32 or int64 tensor"),
        (BUFFER, HEADER.tolist(), TypeError, "header is a list"),
        (BUFFER, HEADER[:, :4], ValueError, r"header has shape \(1, 4\)"),
        (BUFFER, HEADER[:0], ValueError, r"header has shape \(0, 5\)"),
        (BUFFER, torch.tensor([[1, 3, 2, 4, 0]]), ValueError, "header row 0: 3 x 2 x 4 values at offset 1"),
        (BUFFER, torch.tensor([[-1, 3, 2, 4, 0]]), ValueError, "do not lie within the buffer's 24"),
        (BUFFER, torch.tensor([[0, -3, -2, 4, 0]]), ValueError, "do not lie within the buffer's 24"),
        (BUFFER, torch.tensor([[0, 3, 2, 4, 2]]), ValueError, "header row 0 has layout 2"),
    ],
)
def test_pad_collate_packed_rejects(buffer, header, error, message):
    with pytest.raises(error, match=message):
        pad_collate_packed(buffer, header)


def test_pad_collate_packed_rejects_options():
    with pytest.raises(ValueError, match="mean has 1 values"):
        pad_collate_packed(BUFFER, HEADER, mean=[0.0], std=[1.0])
    with pytest.raises(TypeError, match="dtype is torch.int32"):
        pad_collate_packed(BUFFER, HEADER, dtype=torch.int32)
    with pytest.raises(ValueError, match="size_divisor is 0"):
        pad_collate_packed(BUFFER, HEADER, size_divisor=0)


@pytest.mark.parametrize(
    "images, layout, error, message",
    [
        ([], None, ValueError, "got no image"),
        ([torch.zeros(2, 4, dtype=torch.uint8)], None, ValueError, "image 0 has shape"),
        ([torch.zeros(3, 2, 4)], None, TypeError, "image 0 is a torch.float32"),
        ([torch.zeros(3, 2, 4, dtype=torch.uint8)], "nhwc", ValueError, "layout is 'nhwc'"),
    ],
)
def test_pack_images_rejects(images, layout, error, message):
    with pytest.raises(error, match=message):
        pack_images(images, layout=layout)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_pad_collate_packed_opcheck(dtype):
    buffer, header = pack_images(bytes_like([(3, 4, 5), (3, 6, 2)], "hwc"))
    norm = (None, None) if dtype == torch.uint8 else ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    arguments = (buffer, header.flatten().tolist(), *norm, dtype, dtype == torch.bfloat16, 4)
    torch.library.opcheck(torch.ops.detr_fast.pad_collate_packed.default, arguments)
