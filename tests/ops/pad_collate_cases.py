"""What the tests of pad_collate share: an independent expectation, generated images, guarded memory."""

import os
import random

import pytest
import torch

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Which implementation runs on a CPU tensor depends on the process; both must pass.
either = pytest.mark.parametrize(
    "_implementation",
    [
        pytest.param(None, id="reference", marks=pytest.mark.skipif(INTERPRET, reason="runs without the interpreter")),
        pytest.param(None, id="interpreted", marks=pytest.mark.interpret),
    ],
)


def expect(images, mean=None, std=None, dtype=None, size_divisor=1):
    """The batch in float64 (or the images' own dtype, if nothing is computed) and the mask, pixel row by pixel row."""
    computed = mean is not None or dtype is not None
    C, H, W = (max(image.shape[axis] for image in images) for axis in range(3))
    while H % size_divisor:
        H += 1
    while W % size_divisor:
        W += 1
    batch = torch.zeros(len(images), C, H, W, dtype=torch.float64 if computed else images[0].dtype)
    mask = torch.ones(len(images), H, W, dtype=torch.bool)
    for b, image in enumerate(images):
        for y in range(image.shape[1]):
            mask[b, y, : image.shape[2]] = False
            for c in range(image.shape[0]):
                row = image[c, y].to(batch.dtype)
                if mean is not None:
                    row = row / (255 if image.dtype == torch.uint8 else 1)
                    row = (row - mean[c]) / std[c]
                batch[b, c, y, : row.shape[0]] = row
    return batch, mask


def assert_as_exact(actual, exact, plain):
    """A computed result passes if its error is at most twice that of plain PyTorch in the same dtype, or one ulp.

    For float64, where `exact` is rounded like the rest: 8 ulp.
    """
    assert actual.dtype == plain.dtype
    error = (actual.double() - exact).abs()
    if exact.numel():
        ulp = torch.finfo(actual.dtype).eps * exact.abs().max() * (8 if actual.dtype == torch.float64 else 1)
        allowed = torch.maximum(2 * (plain.double() - exact).abs().max(), ulp)
        assert bool((error <= allowed).all()), f"error {error.max()}, allowed {allowed}"
    assert not actual.isnan().any()


def values(shape, dtype, generator):
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype in FLOATS:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    info = torch.iinfo(dtype)
    bound = min(info.max, 2**62)
    return torch.randint(max(info.min, -bound), bound, shape, generator=generator, dtype=torch.int64).to(dtype)


def poisoned(shape, dtype):
    """Memory that no image may show: NaN, or the largest integer."""
    fill = float("nan") if dtype in FLOATS else (True if dtype == torch.bool else torch.iinfo(dtype).max)
    return torch.full(shape, fill, dtype=dtype)


LAYOUTS = ("chw", "hwc", "crop", "hwc_crop", "transposed", "steps", "flipped", "expanded_w", "expanded_c")


def image(shape, dtype, layout, generator):
    """An image [C, H, W] of one of LAYOUTS; what lies around it in memory is poisoned."""
    C, H, W = shape
    if layout == "expanded_w":
        return values((C, H, 1), dtype, generator).expand(C, H, W)
    if layout == "expanded_c":
        return values((1, H, W), dtype, generator).expand(C, H, W)
    content = values(shape, dtype, generator)
    if layout == "flipped":
        return content.double().flip(2).to(dtype)  # torch 2.11 flips no uint16
    if layout == "hwc":
        return content.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "transposed":
        return content.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "crop":
        view = poisoned((C + 2, H + 3, W + 5), dtype)[1 : 1 + C, 2 : 2 + H, 3 : 3 + W]
    elif layout == "hwc_crop":
        view = poisoned((H + 3, W + 5, C + 1), dtype).permute(2, 0, 1)[:C, 1 : 1 + H, 2 : 2 + W]
    elif layout == "steps":
        view = poisoned((2 * C + 1, 2 * H + 1, 3 * W + 1), dtype)[1::2, 1::2, 1::3]
    else:
        view = poisoned((3, C, H, W), dtype)[1]
    return view.copy_(content)


def _size(rng):
    return rng.choice((0, 1, 1, 2, 3, 7, 16, 31, 33, 43))


def generated_case(seed):
    """(images, options) drawn from a seed: 1 to 4 images of one dtype, any sizes, layouts and options."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice(INTEGERS + FLOATS + (torch.uint8, torch.float32))
    channels = rng.choice(("three", "three", "three", "any", "one", "four"))
    images = []
    for _ in range(rng.randint(1, 4)):
        c = {"three": 3, "one": 1, "four": 4}.get(channels) or rng.randint(0, 5)
        w = 70 if rng.random() < 0.1 else _size(rng)
        images.append(image((c, _size(rng), w), dtype, rng.choice(LAYOUTS), generator))
    options = {"channels_last": rng.random() < 0.5, "size_divisor": rng.choice((1, 1, 2, 5, 16))}
    C = max(img.shape[0] for img in images)
    if (dtype == torch.uint8 or dtype in FLOATS) and rng.random() < 0.6:
        options["mean"] = [rng.uniform(0, 1) for _ in range(C)]
        options["std"] = [rng.uniform(0.1, 2) for _ in range(C)]
    if rng.random() < 0.4:
        # bfloat16 is left to the tests on a GPU: the interpreter truncates where it should round.
        options["dtype"] = rng.choice((torch.float16, torch.float32, torch.float64))
    elif dtype == torch.bfloat16 and "mean" in options:
        options["dtype"] = torch.float32
    return images, options


def small_tiles(monkeypatch):
    """Tiles of which small images need several, in the interpreter, whose time goes by the number of programs."""
    from detr_fast.kernels import _configurations

    tile = {"BLOCK_H": 32, "BLOCK_W": 64, "num_warps": 4}
    monkeypatch.setattr(_configurations, "configuration", lambda kernel, **conditions: tile)


def guarded_empty(monkeypatch):
    """Surrounds every `torch.empty` of a launcher with guard zones and poisons it; returns a check of the zones."""
    empty, zones, guard, byte = torch.empty, [], 512, 0xA5

    def surrounded(shape, *, dtype, device, memory_format=torch.contiguous_format):
        like = empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
        size = like.numel() * dtype.itemsize
        memory = torch.full((size + 2 * guard,), byte, dtype=torch.uint8, device=device)
        zones.append((memory, size))
        return memory[guard : guard + size].view(dtype).as_strided(like.shape, like.stride())

    def check():
        assert zones, "nothing was allocated"
        for memory, size in zones:
            assert (memory[:guard] == byte).all() and (memory[guard + size :] == byte).all(), "wrote out of bounds"

    monkeypatch.setattr(torch, "empty", surrounded)
    return check
