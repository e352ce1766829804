"""Videos as sequences of pictures, decoded one after another by PyAV (``pip install av``, extra ``video``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from detr_fast.data.images import CorruptImageError, MissingImageError, to_rgb
from detr_fast.errors import UsageError

if TYPE_CHECKING:
    import av

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")


class Video:
    """The frames of a video file, in the order in which they are shown.

    Frames are decoded when they are read: one after another without going back; an earlier one from the beginning.

    Args:
        path: the file.
        upright: turn the frames as the file says, which phones leave to the player.

    Raises:
        UsageError: PyAV is not installed.
        MissingImageError, CorruptImageError: there is no such file; it has no video stream, or cannot be read.
    """

    def __init__(self, path: str | os.PathLike, *, upright: bool = True):
        self.path, self.upright = os.fspath(path), upright
        try:
            import av
        except ImportError as error:
            raise UsageError(f"{self.path} is a video, which needs PyAV: pip install av") from error
        self._av = av
        if not Path(self.path).is_file():
            raise MissingImageError(f"there is no video file {self.path}", self.path)
        self._next, self._frames = 0, self._decode()
        self._size: tuple[int, int] | None = None
        try:
            # What a container states may be wrong, and is often missing: its packets are counted without decoding them.
            with av.open(self.path) as container:
                stream = self._stream(container)
                self._count = sum(packet.size > 0 for packet in container.demux(stream))
        except av.FFmpegError as error:
            raise self._corrupt(error) from error

    def __len__(self) -> int:
        return self._count

    def size(self) -> tuple[int, int] | None:
        """(width, height) of a frame; None where none can be read, which `read` reports."""
        if self._size is None:
            try:
                self._size = self.read(0).size
            except CorruptImageError:
                return None
        return self._size

    def read(self, index: int) -> Image.Image:
        """Frame `index` as RGB.

        Raises:
            CorruptImageError: it cannot be decoded.
        """
        if index < self._next:
            self._next, self._frames = 0, self._decode()
        frame = None
        while self._next <= index:
            try:
                frame = next(self._frames)
            except StopIteration:
                raise self._corrupt(f"it ends at frame {self._next} of {len(self)}") from None
            except self._av.FFmpegError as error:
                raise self._corrupt(error) from error
            self._next += 1
        image = frame.to_image()
        # PyAV gives degrees counterclockwise.
        turned = frame.rotation % 360 if self.upright else 0
        return to_rgb(image.rotate(turned, expand=True) if turned else image)

    def _decode(self) -> Iterator[av.VideoFrame]:
        with self._av.open(self.path) as container:
            yield from container.decode(self._stream(container))

    def _stream(self, container: av.container.InputContainer) -> av.VideoStream:
        if not container.streams.video:
            raise self._corrupt("it has no pictures")
        return container.streams.video[0]

    def _corrupt(self, reason: object) -> CorruptImageError:
        return CorruptImageError(f"the video {self.path} cannot be read: {reason}", self.path)


def is_video(path: object) -> bool:
    """Whether it is the path of a video file, by its ending."""
    return isinstance(path, (str, os.PathLike)) and Path(os.fspath(path)).suffix.lower() in VIDEO_SUFFIXES
