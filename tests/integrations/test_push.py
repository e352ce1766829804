"""`Detector.push_to_hub` against a stand-in for the server."""

import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import detr_fast
from detr_fast.errors import UsageError
from tests.inference.tiny_models import checkpoint_of

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

IMAGE = Image.radial_gradient("L").resize((90, 70))


def detector(folder, **settings):
    torch.save(checkpoint_of(**settings), folder / "checkpoint.pth")
    return detr_fast.load(folder / "checkpoint.pth", device="cpu")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Keeps what it is told; `refusal` is raised in the place of an upload."""
    state = SimpleNamespace(calls=[], refusal=None, folder=tmp_path / "uploaded")

    class HfApi:
        def __init__(self, token=None):
            state.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            state.calls.append(("repo", repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

        def create_branch(self, repo_id, *, branch, exist_ok):
            state.calls.append(("branch", repo_id, branch, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            if state.refusal is not None:
                raise state.refusal
            state.calls.append(("upload", repo_id, revision, commit_message))
            folder_path.rename(state.folder)
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "of the login")
    return state


def test_a_folder_that_load_reads_is_uploaded(server, tmp_path):
    model = detector(tmp_path)
    address = model.push_to_hub("mine", private=True, revision="small", token="secret", commit_message="first")
    assert address == "https://huggingface.co/me/mine" and server.token == "secret"
    assert server.calls == [
        ("repo", "mine", True, True),
        ("branch", "me/mine", "small", True),
        ("upload", "me/mine", "small", "first"),
    ]
    files = {path.name for path in server.folder.iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert "# mine" in (server.folder / "README.md").read_text()
    found, expected = (one.predict(IMAGE, 0) for one in (detr_fast.load(server.folder, device="cpu"), model))
    assert found.boxes.tolist() == expected.boxes.tolist() and found.class_name == expected.class_name


def test_without_token_or_network_the_message_says_so(server, tmp_path, monkeypatch):
    model = detector(tmp_path)
    server.refusal = ConnectionError("Name or service not known")
    with pytest.raises(UsageError, match="could not upload to me/mine: Name or service not known"):
        model.push_to_hub("me/mine")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="needs a token that may write: run `hf auth login`"):
        model.push_to_hub("me/mine")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"detr_fast\[hf\]"):
        model.push_to_hub("me/mine")


def test_what_has_no_counterpart_is_not_uploaded(server, tmp_path):
    with pytest.raises(ValueError, match="the model: .*have no counterpart in Hugging Face's DETR"):
        detector(tmp_path, dataset_file="lines").push_to_hub("me/lines")
    assert server.calls == []
