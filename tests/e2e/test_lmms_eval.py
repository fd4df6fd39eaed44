"""docs/evaluation.md's commands of lmms-eval over receipts, scored by its own metrics, and what of a task it is not asked."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deepstack_jax.errors import ConfigError
from deepstack_jax.generate.options import RequestError
from tests.docs.blocks import blocks
from tests.e2e.test_serve_verb import model, running  # noqa: F401
from tests.e2e.verb import ENVIRONMENT, REPOSITORY, TIMEOUT, read_json, read_lines, verb

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: its extra has it"),
]
FIELDS = ("name of the company that issued", "date on", "total amount on", "address of the company on")


@pytest.fixture(scope="module")
def root(model, tmp_path_factory) -> Path:  # noqa: F811
    """Receipts of which the model says some answers rightly, some nearly and some not, beside the files of the task."""
    root = tmp_path_factory.mktemp("benchmarks")
    (root / "receipts" / "images").mkdir(parents=True)
    rows = []
    for number in range(3):
        Image.effect_noise((60 + 20 * number, 90), 80).convert("RGB").save(root / "receipts" / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nTranscribe this receipt."}, {"from": "gpt", "value": "?"}]
        for words in FIELDS:
            turns += [{"from": "human", "value": f"What is the {words} this receipt?"}, {"from": "gpt", "value": "?"}]
        rows.append({"id": f"r{number}", "image": f"images/{number}.png", "conversations": turns})
    (root / "receipts" / "val.json").write_text(json.dumps(rows))
    said = [line["prediction"].strip() for line in evaluated(model, root, root / "first")]
    for number, text in enumerate(said):
        row, turn = divmod(number, len(FIELDS))
        rows[row]["conversations"][3 + 2 * turn]["value"] = (text, f"{text[:-20]} and more", "nothing")[number % 3]
    (root / "receipts" / "val.json").write_text(json.dumps(rows))
    for file in (REPOSITORY / "configs" / "lmms_eval").glob("receipts.*"):
        shutil.copy(file, root)
    return root


def evaluated(model: Path, root: Path, out: Path) -> list[dict]:  # noqa: F811
    done = verb("evaluate", f"--model={model}", "--tasks=receipts", f"--data={root}", f"--out={out}", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    return read_lines(out / "receipts" / "predictions.jsonl")


def harness(model_kind: str, out: Path, **changes: str) -> tuple[dict, list[dict]]:
    """Scores and samples of the documented command for that kind of model, some of its words exchanged."""
    texts = [block.text for block in blocks() if block.document == "docs/evaluation.md" and block.language == "sh"]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    (line,) = (one for one in lines if f"--model={model_kind}" in one and "lmms_eval" in one and "--log_samples" in one)
    for old, new in changes.items():
        assert f"={old}" in line, line
        line = line.replace(f"={old}", f"={new}")
    words = [sys.executable, *shlex.split(line)[1:]]
    words = [f"--output_path={out}" if word.startswith("--output_path") else word for word in words]
    environment = ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache"), "HOME": str(out)}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, timeout=TIMEOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,), (samples,) = out.glob("*/*_results.json"), out.glob("*/*_samples_receipts.jsonl")
    return read_json(results)["results"]["receipts"], read_lines(samples)


def test_its_scores_are_those_of_evaluate(model, root, tmp_path):  # noqa: F811
    lines = evaluated(model, root, tmp_path / "ours")
    results = read_json(tmp_path / "ours" / "receipts" / "results.json")
    ours = [results["scores"][name]["score"] for name in ("exact_match", "anls")]
    assert 0 < ours[0] < ours[1] < 1
    with running(model) as (_, client):
        address = str(client.base_url).rstrip("/")
        changes = {"mine,base_url": "hf,base_url", "http://127.0.0.1:8000/v1": address, "benchmarks": str(root)}
        served = harness("openai", tmp_path / "served", **changes)
    loaded = harness("deepstack_jax", tmp_path / "loaded", **{"runs/mine": str(model), "benchmarks": str(root)})
    for scores, samples in (loaded, served):
        assert [one["filtered_resps"] for one in samples] == [line["prediction"].strip() for line in lines]
        assert [scores["exact_match,none"], scores["anls,none"]] == pytest.approx(ours, abs=1e-12)


def test_what_it_cannot_ask_gets_an_empty_answer(model):  # noqa: F811
    from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    from deepstack_jax.lmms_eval_plugin import DeepStackChat

    asked = DeepStackChat(pretrained=str(model), dtype="float32", batch_size="2")
    words = [[{"type": "text", "text": text}] for text in ("Hi", "Hi " * 3000, "Hello")]
    documents = [*words, [{"type": "video", "url": "a.mp4"}, *words[0]]]
    asked.task_dict["talk"] = {"test": documents}
    settings = {"max_new_tokens": 4, "until": ["\n\n"], "do_sample": False, "top_p": None}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("", lambda content: [{"role": "user", "content": content}], settings, number, "talk", "test"),
            idx=0,
            metadata={"task": "talk", "doc_id": number, "repeats": 1},
        )
        for number in range(len(documents))
    ]
    found = asked.generate_until(requests)
    assert [bool(one.text) for one in found] == [True, False, True, False]
    assert [one.token_counts.output_tokens for one in found] == [4, 0, 4, 0]


def test_settings_of_a_task_and_of_the_model_are_checked():
    from deepstack_jax.lmms_eval_plugin import DeepStackChat, options_of

    assert options_of({"temperature": 0.7, "do_sample": False, "until": "."}, "talk").stops == (".",)
    assert options_of({}, "talk").max_new_tokens == 1024
    for settings in ({"temperature": 0.7}, {"num_beams": 5}):
        with pytest.raises(RequestError, match=r"talk has the generation settings .*, expected greedy answers; give"):
            options_of(settings, "talk")
    with pytest.raises(ConfigError, match="lmms-eval gives 'pretraned'; nearest valid name: 'pretrained'"):
        DeepStackChat(pretraned="a")
    with pytest.raises(ConfigError, match="batch_size='auto', expected --model_args pretrained=DIR and a whole number"):
        DeepStackChat(pretrained="a", batch_size="auto")
