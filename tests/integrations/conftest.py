"""Small models of Hugging Face's transformers, and this package's attention in them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture
def registered():
    pytest.importorskip("transformers")
    from detr_fast.integrations.transformers import register, unregister

    register()
    yield
    unregister()


@pytest.fixture
def padded_batch():
    """Two images [3, 64, 96], of which the second is 40 x 56 pixels: pixel_values and pixel_mask, 1 = valid."""
    pixels = torch.randn(2, 3, 64, 96)
    mask = torch.ones(2, 64, 96, dtype=torch.long)
    mask[1, 40:] = 0
    mask[1, :, 56:] = 0
    return {"pixel_values": pixels * mask[:, None], "pixel_mask": mask}
