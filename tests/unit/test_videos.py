"""Videos: which frames are taken, what of a broken one is said, and the tasks that ask about videos.

Clips are encoded by the tests: frame i of a clip is as dark as i, so that a frame tells its number.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstack_jax.data.example import ExampleError, SourceError
from deepstack_jax.data.formats.styles import RecordError
from deepstack_jax.data.formats.video_files import find_video, mosaic, read_frames
from deepstack_jax.evaluate.benchmarks import videos
from deepstack_jax.evaluate.benchmarks.registry import TASKS, find_task
from tests.unit.made_benchmarks import OPTIONS, as_json, as_parquet
from tests.unit.test_benchmarks import LETTER, PHRASE, predictions, questions_of

EVEN = range(0, 1000, 40)  # milliseconds: 25 frames in a second
STEP = 9  # of gray between two frames


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="PyAV decodes videos; it comes with the extra `video`")


def clip(av: Any, path: Path, codec: str, times: Any = EVEN, **options: str) -> Path:
    """A clip of 64 x 48 with a frame at each of the times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * STEP, np.uint8), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames: list[np.ndarray]) -> list[int]:
    return [round(float(frame.mean()) / STEP) for frame in frames]


@pytest.mark.parametrize(
    ("name", "codec", "times", "expected"),
    [
        ("a.mp4", "libx264", EVEN, [0, 4, 8, 12, 16, 20]),
        ("a.webm", "libvpx-vp9", EVEN, [0, 4, 8, 12, 16, 20]),
        ("odd.mp4", "libx264", range(0, 280, 40), [0, 1, 2, 3, 4, 5]),
        ("few.mp4", "libx264", (0, 40), [0, 0, 0, 1, 1, 1]),
        ("one.webm", "libvpx-vp9", (0,), [0] * 6),
        ("late.mp4", "libx264", range(400, 1400, 40), [0, 4, 8, 12, 16, 20]),
        ("varies.mkv", "libx264", (0, 40, 80, 120, 1000, 2000, 2040), [0, 3, 3, 4, 4, 4]),
        ("a.avi", "mpeg4", EVEN, [0, 4, 8, 12, 16, 20]),
    ],
)
def test_frames_are_evenly_spaced_in_time(name, codec, times, expected, av, tmp_path):
    frames = read_frames(str(clip(av, tmp_path / name, codec, times)), 6)
    assert frames[0].shape == (48, 64, 3)
    assert frames[0].dtype == np.uint8
    found = numbers(frames)
    assert found == expected or (name == "a.avi" and np.abs(np.subtract(found, expected)).max() <= 1)  # mpeg4 blurs over time


@pytest.mark.parametrize(
    ("name", "codec", "part", "options"),
    [
        ("a.mp4", "libx264", 0.9, {}),  # its index is at its end
        ("fast.mp4", "libx264", 0.6, {"movflags": "faststart"}),
        ("a.webm", "libvpx-vp9", 0.6, {}),
        ("a.mkv", "libx264", 0.6, {}),
    ],
)
def test_a_video_whose_end_is_cut_off_is_named(name, codec, part, options, av, tmp_path):
    path = clip(av, tmp_path / name, codec, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(RecordError, match=r"(is cut off|has no frame|Invalid data)") as error:
        read_frames(str(path), 6)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_video_is_named(av, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"hello" * 100)
    with pytest.raises(RecordError, match=f"cannot decode video {path}"):
        read_frames(str(path), 6)
    with pytest.raises(RecordError, match=r"cannot decode video .*b\.mp4 \(No such file"):
        read_frames(str(tmp_path / "b.mp4"), 6)
    with pytest.raises(RecordError, match=r"video b is not in .* \(\.mp4, \.webm"):
        find_video(str(tmp_path), "b")


def test_a_playlist_opens_nothing(av, tmp_path):
    """It is one that names a clip which is there, and could name anything else."""
    target = clip(av, tmp_path / "target.ts", "libx264")
    path = tmp_path / "list.mp4"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{target}\n#EXT-X-ENDLIST\n")
    with pytest.raises(RecordError, match=f"cannot decode video {path}"):
        read_frames(str(path), 6)
    assert numbers(read_frames(str(target), 6))[0] == 0


def test_without_pyav_one_line_says_how_to_get_it(monkeypatch, tmp_path):
    def missing(_name: str) -> Any:
        raise ImportError

    monkeypatch.setattr("deepstack_jax.data.formats.video_files.import_module", missing)
    with pytest.raises(SourceError, match=r"PyAV, which is not installed; pip install '\.\[video\]'"):
        read_frames(str(tmp_path / "a.mp4"), 6)


def test_six_frames_become_a_square_of_two_rows():
    frames = [np.full((48, 64, 3), 40 * number, np.uint8) for number in range(6)]
    sheet = np.asarray(mosaic(frames, 2, 3))
    assert sheet.shape == (192, 192, 3)  # three times 64 wide, stretched from twice 48
    cells = sheet.reshape(2, 96, 3, 64, 3)[:, 10:-10, :, 10:-10].mean((1, 3, 4))
    assert np.round(cells).tolist() == [[0, 40, 80], [120, 160, 200]]


def _egoschema_json(folder: Path) -> None:
    rows = [{"q_uid": f"u{at}", "question": f"What is {at}?"} | {f"option {n}": f"o{n}" for n in range(5)} for at in range(3)]
    as_json(folder, "questions.json", rows)
    as_json(folder, "subset_answers.json", {"u0": 3, "u2": 1})


def _egoschema_parquet(folder: Path) -> None:
    options = [f"{letter}. o{at}" for at, letter in enumerate("ABCDE")]
    rows = [{"question_idx": at, "video_idx": at, "question": f"What is {at[1]}?"} for at in ("u0", "u2")]
    answers = ("3", "1")
    rows = [row | {"option": options, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
    as_parquet(folder, "Subset/test-00000-of-00001.parquet", rows)


def _nextqa_rows() -> list[dict[str, Any]]:
    options = {f"a{at}": option for at, option in enumerate([*OPTIONS, "none of it"])}
    row = {"frame_count": 9, "question": "why, then", "answer": 3} | options
    return [{"video": f"4{at}", "qid": at, "type": kind} | row for at, kind in ((0, "CW"), (2, "TN"))]


def _nextqa_csv(folder: Path) -> None:
    folder.mkdir(parents=True)
    names = list(_nextqa_rows()[0])
    lines = [",".join(f'"{row[name]}"' for name in names) for row in _nextqa_rows()]
    (folder / "val.csv").write_text("\n".join([",".join(names), *lines]))
    as_json(folder, "map_vid_vidorID.json", {"40": "1164/40", "42": "0001/42"})


def _msvdqa(folder: Path) -> None:
    rows = [{"id": 60 + at, "video_id": at, "question": f"what is {at}?", "answer": "dog"} for at in (0, 2)]
    as_json(folder, "test_qa.json", rows)
    (folder / "youtube_mapping.txt").write_text("clip_0_9 vid0\nclip_2_9 vid2\n")


def _activitynet_rows() -> list[dict[str, Any]]:
    return [{"video_name": f"n{at}", "question": f"what is {at}", "question_id": f"n{at}_1"} for at in (0, 2)]


def _activitynetqa(folder: Path) -> None:
    as_json(folder, "test_q.json", _activitynet_rows())
    as_json(folder, "test_a.json", [{"answer": "dog", "type": 3, "question_id": f"n{at}_1"} for at in (2, 0)])


FORMS = {
    ("egoschema", "json"): _egoschema_json,
    ("egoschema", "parquet"): _egoschema_parquet,
    ("nextqa", "csv"): _nextqa_csv,
    ("nextqa_test", "parquet"): lambda folder: as_parquet(folder, "MC/test-00000-of-00001.parquet", _nextqa_rows()),
    ("msvdqa", "json"): _msvdqa,
    ("activitynetqa", "json"): _activitynetqa,
    ("activitynetqa", "parquet"): lambda folder: as_parquet(
        folder, "data/test-00000-of-00001.parquet", [row | {"answer": "dog", "type": "3"} for row in _activitynet_rows()]
    ),
}
# Task -> the video of its second question, the words of that, what is right
SECOND = {
    "egoschema": ("videos/u2", f"What is 2?\nA. o0\nB. o1\nC. o2\nD. o3\nE. o4{LETTER}", "B"),
    **dict.fromkeys(
        ("nextqa", "nextqa_test"), ("NExTVideo/42", f"why, then\nA. leaf\nB. cat\nC. dog\nD. sun\nE. none of it{LETTER}", "D")
    ),
    "msvdqa": ("YouTubeClips/clip_2_9", f"what is 2?{PHRASE}", "dog"),
    "activitynetqa": ("all_test/v_n2", f"what is 2?{PHRASE}", "dog"),
}


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """The videos that were asked for; whatever they hold, frames of one gray are decoded from them."""
    found: list[str] = []

    def fake(path: str, count: int) -> list[np.ndarray]:
        found.append(path)
        return [np.zeros((48, 64, 3), np.uint8)] * count

    monkeypatch.setattr(videos, "read_frames", fake)
    return found


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_task_reads_its_files(name, form, seen, tmp_path):
    folder = tmp_path / TASKS[name].folder
    FORMS[name, form](folder)
    video, words, right = SECOND[name]
    video = video.replace("NExTVideo/", "NExTVideo/0001/") if form == "csv" else video
    task = find_task(name, str(tmp_path))
    assert len(task.source) == 2
    with pytest.raises(ExampleError, match=r"video [^ ]+ is not in"):
        task.source[0]
    for number in (video, video.replace("2", "0").replace("0001", "1164")):
        (folder / number).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.webm").touch()
    asked = questions_of(task)[1]
    assert (asked.words, *asked.references) == (words, right)
    assert [getattr(image, "size", None) for image in asked.turns[0].images] == [(192, 192)]
    assert seen[-1] == str(folder / f"{video}.webm")
    frames = find_task(name, str(tmp_path), "frames")
    assert len(questions_of(frames)[1].turns[0].images) == 6
    assert questions_of(frames)[1].turns[0].words == "<image>\n" * 6 + words


def test_choices_about_videos_go_by_likelihood_too(tmp_path):
    _nextqa_csv(tmp_path / "nextqa")
    assert find_task("nextqa", str(tmp_path), "likelihood").by_likelihood
    words = {name: TASKS[name].protocols["likelihood"].words for name in ("egoschema", "nextqa", "nextqa_test")}
    assert set(words.values()) == {
        "a choice by the likelihood of the letters, nothing is generated; 6 frames as a mosaic of 2 x 3, resized to a square"
    }


def test_letters_and_judged_answers(seen, tmp_path):
    _nextqa_csv(tmp_path / "nextqa")
    _activitynetqa(tmp_path / "activitynetqa")
    for file in ("nextqa/NExTVideo/1164/40.mp4", "nextqa/NExTVideo/0001/42.mp4", "activitynetqa/videos/n0.mkv"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "activitynetqa/videos/n2.mkv").touch()
    task = find_task("nextqa", str(tmp_path))
    found = task.aggregate(predictions(task, ["(D)", "A. leaf"]))
    assert found == {"accuracy": {"score": 0.5, "by_kind": {"causal": 1.0, "temporal": 0.0}}}
    task = find_task("activitynetqa", str(tmp_path))
    said = predictions(task, ["Dog.", "a cat"])
    assert task.aggregate(said)["exact_match"]["score"] == 0.5
    assert task.submission is not None
    row = {"video_name": "n0", "question_id": "n0_1", "Q": "what is 0", "A": "dog", "pred": "Dog."}
    assert json.loads(task.submission(said)["judge.json"])[0] == row
    assert not find_task("activitynetqa", str(tmp_path), "deepstack-paper").scorers  # a judge's, not ours


def test_damaged_question_files_are_one_line(tmp_path):
    _egoschema_json(tmp_path / "egoschema")
    as_json(tmp_path / "egoschema", "subset_answers.json", {"u9": 1})
    with pytest.raises(SourceError, match=r"lacks 1 questions that have answers, e\.g\. 'u9'"):
        find_task("egoschema", str(tmp_path))
    as_json(tmp_path / "egoschema", "subset_answers.json", {"u0": 9, "u1": 1})
    task = find_task("egoschema", str(tmp_path))
    with pytest.raises(ExampleError, match="answer is 9, expected the number of an option"):
        task.source[0]


def test_a_real_clip_goes_through_a_task_and_a_cut_one_is_counted(av, tmp_path):
    _activitynetqa(tmp_path / "activitynetqa")
    clip(av, tmp_path / "activitynetqa/all_test/v_n0.mp4", "libx264")
    cut = clip(av, tmp_path / "activitynetqa/all_test/v_n2.webm", "libvpx-vp9")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    task = find_task("activitynetqa", str(tmp_path))
    sheet = np.asarray(task.source[0].images[0])
    means = sheet.reshape(2, 96, 3, 64, 3)[:, 10:-10, :, 10:-10].mean((1, 3, 4)) / STEP
    assert np.round(means).tolist() == [[0, 4, 8], [12, 16, 20]]
    with pytest.raises(ExampleError, match=r"\(id 'n2_1'\): video .*v_n2\.webm is cut off") as error:
        task.source[1]
    assert error.value.name == "n2_1"
