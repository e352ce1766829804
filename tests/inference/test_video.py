"""A video file stands for its frames; with PyAV, and where it is absent a word about it."""

import sys

import numpy as np
import pytest

import detr_fast
from detr_fast.data.images import CorruptImageError, MissingImageError
from detr_fast.errors import UsageError
from detr_fast.inference.images import pictures
from detr_fast.inference.video import Video, is_video

FRAMES = 7


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Seven frames of 64x48 pixels that become lighter."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(FRAMES):
            pixels = np.full((48, 64, 3), 30 * i, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def lightness(image):
    return np.asarray(image).mean()


def test_frames_are_read_in_any_order(clip):
    video = Video(clip)
    assert len(video) == FRAMES and video.size() == (64, 48)
    for index in (0, 1, 2, 5, 3, 0, 6):
        assert abs(lightness(video.read(index)) - 30 * index) < 4, index


def test_a_video_stands_for_its_frames(clip, trained_detector):
    found, single = pictures(clip)
    assert len(found) == FRAMES and not single and found[2].path == f"{clip}#2"
    images = [picture.read() for picture in found]
    video, one_by_one = trained_detector.predict(clip, 0.0, batch_size=3), trained_detector.predict(images, 0.0)
    assert len(video) == FRAMES
    for ours, expected in zip(video, one_by_one, strict=True):
        assert ours.class_name == expected.class_name
        np.testing.assert_allclose(ours.boxes, expected.boxes, atol=1e-3)
    width, height = video[4].plot().size  # read again, and enlarged
    assert width * 48 == height * 64
    beside = trained_detector.predict([images[0], clip], 0.0)
    assert len(beside) == 1 + FRAMES


@pytest.fixture(scope="module")
def trained_detector(tmp_path_factory):
    from detr_fast.config import Config
    from detr_fast.data.categories import Categories
    from detr_fast.models import build_model
    from detr_fast.training.checkpoint import save_checkpoint

    config = Config(
        backbone="resnet18", backbone_weights="none", backbone_norm="frozen", hidden_dim=32, nheads=2, enc_layers=1,
        dec_layers=1, dim_feedforward=32, num_queries=5, num_classes=3, image_size=48, max_size=80,
    )  # fmt: skip
    categories = Categories.from_coco([{"id": i, "name": name} for i, name in enumerate("abc")], contiguous=True)
    path = tmp_path_factory.mktemp("model") / "checkpoint.pth"
    save_checkpoint(
        {"model": build_model(config)[0].state_dict(), "args": config.to_dict(), "categories": categories.to_dict()},
        path,
    )
    return detr_fast.load(path, device="cpu")


def test_what_is_no_video(clip, tmp_path):
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clip.read_bytes()[:200])
    with pytest.raises(CorruptImageError, match=r"damaged\.mp4 cannot be read"):
        len(Video(damaged))
    with pytest.raises(MissingImageError, match="there is no video file"):
        Video(tmp_path / "absent.mp4")


def test_turned_frames_are_upright(clip, monkeypatch):
    import av

    video = Video(clip)

    class Turned:
        rotation = -90

        def to_image(self):
            return av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24").to_image()

    monkeypatch.setattr(video, "_decode", lambda: iter([Turned()] * FRAMES))
    video._frames = video._decode()
    assert video.read(0).size == (48, 64)
    video.upright = False
    assert video.read(0).size == (64, 48)


def test_without_pyav_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.MOV").write_bytes(b"")
    with pytest.raises(UsageError, match="pip install av"):
        pictures(tmp_path / "clip.MOV")


def test_the_command_line_says_that_it_takes_images(tmp_path, capsys):
    from detr_fast.cli import main

    (tmp_path / "clip.mp4").write_bytes(b"")
    assert main(["predict", str(tmp_path / "clip.mp4"), "--weights", "x.pth", "--output_dir", str(tmp_path / "o")]) == 2
    assert "is a video" in capsys.readouterr().err
    assert is_video("a.WEBM") and not is_video("a.jpg") and not is_video(3)
