"""Questions about videos: EgoSchema and NExT-QA by letter, MSVD-QA and ActivityNet-QA in words, by still frames.

The paper collates six frames, evenly spaced, into a grid of 2 x 3 and resizes that to a square. It prints no prompts; these are
those of its base code for images.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.formats.styles import RecordError
from deepstack_jax.data.formats.video_files import find_video, mosaic, read_frames
from deepstack_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Protocol
from deepstack_jax.evaluate.benchmarks.choices import LETTER, SEED, choice_body, letter_of
from deepstack_jax.evaluate.benchmarks.coco_vqa import PHRASE
from deepstack_jax.evaluate.benchmarks.rows import (
    Form,
    ListRows,
    Row,
    Rows,
    field,
    first_file,
    joined,
    parquet,
    read_csv,
    read_list,
    read_object,
    read_text,
    texts,
)
from deepstack_jax.evaluate.questions import Question
from deepstack_jax.evaluate.scorers.mmmu import mmmu_letter
from deepstack_jax.evaluate.scorers.short_answers import GQA_EXACT_MATCH
from deepstack_jax.evaluate.scorers.texts import EXACT_MATCH
from deepstack_jax.evaluate.tasks import Prediction

FRAMES, GRID = 6, (2, 3)
_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}
_OPTIONS = 5


@lru_cache(maxsize=4)  # a video's questions stand one after the other
def _frames(path: str) -> list[np.ndarray]:
    return read_frames(path, FRAMES)


def _stills(find: Callable[[Row, str], str], *, grid: bool) -> Callable[[Row, str], Sequence[Any]]:
    """Six frames of a row's video, in one picture or one by one."""

    def images(row: Row, folder: str) -> Sequence[Any]:
        frames = _frames(find(row, folder))
        return [mosaic(frames, *GRID)] if grid else frames

    return images


def _find(key: str, places: Sequence[str]) -> Callable[[Row, str], str]:
    """Where the video of a row is: under the first of the places ("videos/{}") that holds one by that name."""

    def find(row: Row, folder: str) -> str:
        name = str(field(row, key))
        if "/" in name.strip("/") or ".." in name:
            raise RecordError(f"{key} is {name!r:.80}, expected the name of a video")
        for place in places[:-1]:
            try:
                return find_video(folder, place.format(name))
            except RecordError:
                continue
        return find_video(folder, places[-1].format(name))

    return find


def _letter(question: Question, answer: str) -> str:
    """The letter that an answer names, read as MMMU's are; drawn by the question's id where it names none."""
    return mmmu_letter(answer.strip(), question.options, random.Random(f"{SEED}:{question.id}"))


def _protocols(make: Callable[[str, Callable], Protocol], find: Callable[[Row, str], str]) -> dict[str, Protocol]:
    """By a mosaic, which is the paper's way too, and by frames one after the other."""
    one = make(f"{FRAMES} frames as a mosaic of {GRID[0]} x {GRID[1]}, resized to a square", _stills(find, grid=True))
    several = make(f"{FRAMES} frames as separate images", _stills(find, grid=False))
    return {"own": one, "deepstack-paper": one, "frames": several}


def _choices(find: Callable[[Row, str], str]) -> dict[str, Protocol]:
    protocols = _protocols(_by_letter, find)
    return {**protocols, "likelihood": protocols["own"].likelihood()}


def _by_letter(words: str, images: Callable) -> Protocol:
    return Protocol(
        words=f"accuracy by letter; {words}",
        body=choice_body,
        suffix=LETTER,
        scorers={
            "accuracy": replace(EXACT_MATCH, protocol="share of right letters, drawn with a fixed seed where none is named")
        },
        parse=_letter,
        max_new_tokens=16,
        images=images,
    )


def _in_words(words: str, images: Callable) -> Protocol:
    return Protocol(
        words=f"exact match, lower case, without punctuation; {words}",
        body=lambda item: item.question if item.question.endswith("?") else f"{item.question}?",
        suffix=PHRASE,
        scorers={"exact_match": GQA_EXACT_MATCH},
        max_new_tokens=64,
        images=images,
    )


def _judged(protocols: Mapping[str, Protocol]) -> dict[str, Protocol]:
    """The paper's numbers are a judge's: no score is made here."""
    paper = replace(
        protocols["deepstack-paper"],
        scorers={},
        words=protocols["deepstack-paper"].words.replace("exact match, lower case, without punctuation", "a judge's (GPT-3.5)"),
    )
    return {**protocols, "deepstack-paper": paper}


def judge_file(predictions: Sequence[Prediction]) -> dict[str, str]:
    """What judges of open answers about videos read: [{"video_name", "question_id", "Q", "A", "pred"}]."""
    rows = [
        dict(one.details) | {"A": one.references[0] if one.references else "", "pred": one.prediction.strip()}
        for one in predictions
    ]
    return {"judge.json": json.dumps(rows, indent=2)}


def _choice_item(name: str, row: Row, options: Sequence[Any], kind: str = "all") -> Item:
    if None in options:
        raise RecordError(f"has {_OPTIONS - options.count(None)} options, expected {_OPTIONS}; fetch the file again")
    texts_of = tuple(str(one).strip() for one in options)
    return Item(name, field(row, "question", str).strip(), letter_of(row.get("answer"), texts_of), texts_of, kind)


def _egoschema_json(folder: str, _limits: LimitsConfig) -> Rows | None:
    path = first_file(folder, ("questions.json",))
    if path is None:
        return None
    answers = read_object(first_file(folder, ("subset_answers.json",)) or f"{folder}/subset_answers.json")
    rows = []
    for number, row in enumerate(read_list(path)):
        name = field(row, "q_uid", str, f"{path} record {number}")
        if name in answers:
            options = [row.get(f"option {at}") for at in range(_OPTIONS)]
            rows.append({"video_idx": name, "question": row.get("question"), "option": options, "answer": answers.pop(name)})
    if answers:
        raise SourceError(
            f"{path} lacks {len(answers)} questions that have answers, e.g. {next(iter(answers))!r}; fetch it again"
        )
    return ListRows(path, rows)


def _egoschema_item(row: Row, _number: int) -> Item:
    options = [str(one) for one in field(row, "option", list)]
    lettered = all(one.startswith(f"{letter}. ") for letter, one in zip("ABCDE", options, strict=False))
    return _choice_item(field(row, "video_idx", str), row, [one[3:] for one in options] if lettered else options)


_EGO_VIDEO = _find("video_idx", ("videos/{}", "good_clips_git/{}", "{}"))
EGOSCHEMA = Benchmark(
    title="EgoSchema, the subset with answers",
    folder="egoschema",
    origin="from egoschema/EgoSchema on GitHub, or lmms-lab/egoschema of the Hugging Face hub (Subset), with videos/",
    metric="accuracy",
    forms=(
        Form("questions.json, subset_answers.json, videos/", _egoschema_json),
        parquet(("Subset/test-*.parquet",), ("video_idx", "question", "option", "answer"), ()),
    ),
    item=_egoschema_item,
    images=_stills(_EGO_VIDEO, grid=True),
    protocols=_choices(_EGO_VIDEO),
    paper={"DeepStack-L": "38.4"},
)


def _nextqa_csv(name: str) -> Form:
    """The authors' file of a split, with their map from a video to its folder where that is there."""

    def find(folder: str, _limits: LimitsConfig) -> Rows | None:
        if (path := first_file(folder, (name,))) is None:
            return None
        places = first_file(folder, ("map_vid_vidorID.json",))
        where = read_object(places) if places else {}
        return ListRows(path, [row | {"place": where.get(field(row, "video"))} for row in read_csv(path)])

    return Form(f"{name}, map_vid_vidorID.json, NExTVideo/", find)


def _nextqa_item(row: Row, _number: int) -> Item:
    options, kind = [row.get(f"a{at}") for at in range(_OPTIONS)], field(row, "type", str)
    return _choice_item(f"{field(row, 'video')}_{field(row, 'qid')}", row, options, _KINDS.get(kind[:1], "all"))


def _nextqa_video(row: Row, folder: str) -> str:
    """By the number of the video, or by the folder and name that the authors' map gives for it."""
    place = row.get("place")
    if isinstance(place, str) and ".." not in place and not place.startswith("/"):
        return find_video(folder, f"NExTVideo/{place}")
    return _find("video", ("NExTVideo/{}", "videos/{}"))(row, folder)


NEXTQA = Benchmark(
    title="NExT-QA, multiple choice, validation",
    folder="nextqa",
    origin="from doc-doc/NExT-QA on GitHub, or lmms-lab/NExTQA of the Hugging Face hub (MC), with NExTVideo/",
    metric="accuracy",
    forms=(_nextqa_csv("val.csv"),),
    item=_nextqa_item,
    images=_stills(_nextqa_video, grid=True),
    protocols=_choices(_nextqa_video),
    paper={"DeepStack-L": "61.0"},
)


NEXTQA_TEST = replace(
    NEXTQA,
    title="NExT-QA, multiple choice, test",
    forms=(
        _nextqa_csv("test.csv"),
        parquet(("MC/test-*.parquet",), ("video", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4"), ()),
    ),
    paper={},
)


def _open_item(row: Row, _number: int) -> Item:
    video, number, question = field(row, "video_name"), field(row, "question_id"), field(row, "question", str)
    details = {"video_name": video, "question_id": number, "Q": question}
    return Item(str(number), question, texts(row.get("answer")), details=details)


def _msvd_json(folder: str, _limits: LimitsConfig) -> Rows | None:
    if (path := first_file(folder, ("test_qa.json",))) is None:
        return None
    mapping = first_file(folder, ("youtube_mapping.txt",))
    names = {number: name for name, number in map(str.split, read_text(mapping).splitlines())} if mapping else {}
    rows = []
    for row in read_list(path):
        name = f"vid{row.get('video_id')}" if isinstance(row, dict) else ""
        known = {"video_name": names.get(name, name), "question_id": row.get("id")} if name else {}
        rows.append(row | known if name else row)
    return ListRows(path, rows)


_MSVD_VIDEO = _find("video_name", ("YouTubeClips/{}", "videos/{}", "{}"))
MSVDQA = Benchmark(
    title="MSVD-QA, test",
    folder="msvdqa",
    origin="from xudejing/video-question-answering on GitHub, with the clips of MSVD in YouTubeClips/",
    metric="exact_match",
    forms=(Form("test_qa.json, youtube_mapping.txt, YouTubeClips/", _msvd_json),),
    item=_open_item,
    images=_stills(_MSVD_VIDEO, grid=True),
    protocols=_judged(_protocols(_in_words, _MSVD_VIDEO)),
    submission=judge_file,
    paper={"DeepStack-L": "76.0 (judged)"},
)


def _activitynet_json(folder: str, _limits: LimitsConfig) -> Rows | None:
    if (path := first_file(folder, ("test_q.json",))) is None:
        return None
    answers = first_file(folder, ("test_a.json",)) or f"{folder}/test_a.json"
    return ListRows(path, joined(read_list(path), read_list(answers), "question_id", path, answers))


_ACTIVITYNET_VIDEO = _find("video_name", ("all_test/v_{}", "videos/v_{}", "videos/{}"))
ACTIVITYNETQA = Benchmark(
    title="ActivityNet-QA, test",
    folder="activitynetqa",
    origin="from MILVLG/activitynet-qa on GitHub, or lmms-lab/ActivityNetQA of the Hugging Face hub, with all_test/",
    metric="exact_match",
    forms=(
        Form("test_q.json, test_a.json, all_test/", _activitynet_json),
        parquet(("data/test-*.parquet", "test-*.parquet"), ("video_name", "question", "question_id", "answer"), ()),
    ),
    item=_open_item,
    images=_stills(_ACTIVITYNET_VIDEO, grid=True),
    protocols=_judged(_protocols(_in_words, _ACTIVITYNET_VIDEO)),
    submission=judge_file,
    paper={"DeepStack-L": "49.3 (judged)"},
)
