"""Videos as still frames, evenly spaced in time, and several frames as one picture; decoded by PyAV (the extra `video`)."""

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deepstack_jax.data.example import SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.columns import short_reason
from deepstack_jax.data.formats.styles import RecordError

SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
# No playlists and the like, whose content names other files and addresses; and none of those.
_OPTIONS = {"format_whitelist": "mov,matroska,avi,mpeg,mpegts,flv,asf,ogg", "protocol_whitelist": "file"}
_SLACK = 0.02  # of its length that a whole video may end before its header says so
_SLACK_SECONDS = 0.1
_SLACK_FRAMES = 1.5  # how long the last frame is shown, not every container says


class _Outline(NamedTuple):
    """What the packets of a video tell before one is decoded."""

    frames: int  # one per packet
    start: float  # seconds
    end: float
    timed: bool  # whether every frame says when it is shown


def find_video(folder: str, name: str) -> str:
    """The path of a video by its name without a suffix, whichever container it is in.

    Raises:
      RecordError: there is none.
    """
    for suffix in SUFFIXES:
        if files.is_file(path := files.under(folder, f"{name}{suffix}")):
            return path
    raise RecordError(f"video {name} is not in {folder} ({', '.join(SUFFIXES)}); put it there or remove the record")


def read_frames(path: str, count: int) -> list[np.ndarray]:
    """The frames on show at the beginnings of `count` parts of equal length, u8[y, x, 3] each.

    A video with fewer frames shows some of them again. Frames are counted by time, so that a rate that varies does not matter.

    Raises:
      RecordError: it cannot be decoded from its beginning to its end; the message names it.
      SourceError: PyAV is not installed.
    """
    try:
        av: Any = import_module("av")
    except ImportError as error:
        raise SourceError("videos are decoded by PyAV, which is not installed; pip install '.[video]' in a clone") from error
    try:
        copy = files.local_copy(path)
        files.size(copy)  # refuses what is not a file
        with av.open(copy, options=_OPTIONS) as container:
            outline = _outline(path, container)
        with av.open(copy, options=_OPTIONS) as container:
            found = list(_at_times(_decoded(container, outline.timed), _times(outline, count)))
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or short_reason(error)
        raise RecordError(f"cannot decode video {path} ({reason}); fetch it again or remove the record") from error
    if len(found) != count:
        raise RecordError(f"video {path} has no frame that can be decoded; fetch it again or remove the record")
    return found


def mosaic(frames: Sequence[np.ndarray], rows: int, cols: int) -> Image.Image:
    """Frames row by row in one picture, resized to a square without keeping its shape; its side is the longer one.

    Frames of another size than the first are resized to it.
    """
    height, width, _ = frames[0].shape
    sheet = Image.new("RGB", (cols * width, rows * height))
    for number, frame in enumerate(frames[: rows * cols]):
        tile = Image.fromarray(frame)
        sheet.paste(tile.resize((width, height), Image.Resampling.BICUBIC), (number % cols * width, number // cols * height))
    side = max(sheet.size)
    return sheet.resize((side, side), Image.Resampling.BICUBIC)


def _outline(path: str, container: Any) -> _Outline:
    """From a pass over all packets; RecordError where there is no video, or its end is cut off."""
    if not container.streams.video:
        raise RecordError(f"{path} holds no video; fetch it again or remove the record")
    stream = container.streams.video[0]
    count, starts, end, latest = 0, list[float](), 0.0, 0.0
    for packet in container.demux():
        if packet.size == 0 or packet.time_base is None:
            continue
        shown = packet.pts if packet.pts is not None else packet.dts
        over = float(((shown or 0) + (packet.duration or 0)) * packet.time_base)
        latest = max(latest, over)
        if packet.stream_index == stream.index:
            count += 1
            end = max(end, over)
            starts += [] if packet.pts is None else [float(packet.pts * packet.time_base)]
    if not count:
        raise RecordError(f"video {path} has no frame; fetch it again or remove the record")
    promised = 0.0 if container.duration is None else container.duration / 1e6
    held = latest - (0.0 if container.start_time is None else container.start_time / 1e6)
    if promised - held > max(_SLACK_SECONDS, _SLACK * promised, _SLACK_FRAMES * held / count):
        raise RecordError(
            f"video {path} is cut off: it holds {held:.1f} of {promised:.1f} seconds; fetch it again or remove the record"
        )
    return _Outline(count, min(starts, default=0.0), end, len(starts) == count)


def _times(outline: _Outline, count: int) -> list[float]:
    """When the wanted frames are on show: seconds, or numbers of frames where these do not say."""
    start, length = (outline.start, outline.end - outline.start) if outline.timed else (0.0, float(outline.frames))
    if length <= 0 or not math.isfinite(length):
        start, length = 0.0, 0.0
    return [start + number * length / count for number in range(count)]


def _decoded(container: Any, timed: bool) -> Iterator[tuple[float, Any]]:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    for number, frame in enumerate(container.decode(stream)):
        yield (float(frame.time) if timed and frame.time is not None else float(number)), frame


def _at_times(frames: Iterator[tuple[float, Any]], times: Sequence[float]) -> Iterator[np.ndarray]:
    """For every time, in order, the last frame that began by then."""
    wanted, before = list(times), None
    for time, frame in frames:
        while wanted and before is not None and time > wanted[0] + 1e-6:
            yield before.to_ndarray(format="rgb24")
            wanted.pop(0)
        if not wanted:
            return
        before = frame
    if before is not None:
        last = before.to_ndarray(format="rgb24")
        yield from [last] * len(wanted)
