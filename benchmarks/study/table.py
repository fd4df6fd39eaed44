"""What is trained and why: a row is a configuration, a claim compares rows, and a rule, not a person, says whether it holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepstack_jax.data.cards import BOXES

DIGITS = ("fine", "cued", "before")  # kinds of questions whose answers are digits, in the crops alone


COARSE = ("coarse",)  # the kind that the low-res view answers


@dataclass(frozen=True)
class Row:
    """One configuration: a base, and what is changed in it."""

    name: str  # of its runs' folders, NAME-SEED-DIGEST
    label: str  # in tables and figures
    changes: Mapping[str, Any] = field(default_factory=dict)  # key of the configuration, without "config." -> value
    note: str = ""  # what is not equal to the other rows, where something is not
    quick: bool = False  # whether it is one of the headline rows, which --quick trains


@dataclass(frozen=True)
class Scores:
    """What of a row is compared: the mean of its held-out exact match over kinds of questions."""

    row: str
    kinds: tuple[str, ...] = DIGITS


@dataclass(frozen=True)
class Comparison:
    """An expectation about two rows, paired by seed."""

    first: Scores
    second: Scores
    expected: str  # "above": the first scores more; "near": no more than NEAR less
    speed: bool = False  # whether, where both end alike, fewer steps decide

    @property
    def name(self) -> str:
        return f"{self.first.row} {self.expected} {self.second.row}"


@dataclass(frozen=True)
class Claim:
    """A sentence that the numbers may bear out, and those that it is about."""

    name: str
    title: str
    sentence: str
    rows: tuple[str, ...]  # shown in its table, in order
    comparisons: tuple[Comparison, ...]  # all of which must hold
    remark: str = ""  # what a reader has to know about the rows, true whatever the numbers are
    likely: str = ""  # the likely reason where the claim does not show


def above(first: str, second: str, kinds: tuple[str, ...] = DIGITS, *, speed: bool = False) -> Comparison:
    return Comparison(Scores(first, kinds), Scores(second, kinds), "above", speed)


def near(first: str, second: str, kinds: tuple[str, ...] = DIGITS) -> Comparison:
    return Comparison(Scores(first, kinds), Scores(second, kinds), "near")


_LOW_RES = {"image.mode": "stretch", "deepstack.stack": "none"}
_WIDE = {"data.cards.grids": ((1, 2),), "image.grid": "square", "image.crop_filter": "nearest"}
_V = {"deepstack.into": "vision", "image.grid": "square"}
_LAYERS = 12
_FIRST, _FIRST_TWO = ((-1, *range(groups), *[-1] * (_LAYERS - 1 - groups)) for groups in (1, 2))
_STARTS = (0, 2, 4, 6, 8, 10)

_ROWS = (
    Row("baseline", "low-res alone (LLaVA's form)", _LOW_RES, quick=True),
    Row("deepstack", "DeepStack-L", quick=True),
    Row("dummy", "dummy stack: the low-res tokens again", {"deepstack.stack": "dummy"}, quick=True),
    Row(
        "only_global", "nothing in the sequence, low-res injected", {"deepstack.sequence": "zero", "deepstack.stack": "global"}
    ),
    Row("upsampled", "DeepStack-L over low-res cards, enlarged", {"data.cards.sharp": False}),
    Row(
        "string",
        "all tokens in the sequence",
        {
            "deepstack.sequence": "global_crops",
            "deepstack.stack": "none",
            "data.max_length": BOXES * (1 + 4) + 2 * BOXES + 8,
        },
        note="five times the visual tokens in the sequence",
        quick=True,
    ),
    Row("sampling_1d", "1d sampling", {"deepstack.sampling": "1d"}),
    Row("sampling_grid", "grid sampling", {"deepstack.sampling": "grid"}, quick=True),
    *(
        Row(
            f"start_{start}",
            f"start at layer {start}",
            {"deepstack.start": start},
            note="two of the four groups fall past the last layer" if start > _LAYERS - 4 else "",
        )
        for start in _STARTS
    ),
    *(Row(f"interval_{gap}", f"interval {gap}", {"deepstack.interval": gap}) for gap in (2, 3)),
    Row("groups_1", "1 of the 4 groups", {"deepstack.schedule": _FIRST}, note="a quarter of the crops' tokens"),
    Row("groups_2", "2 of the 4 groups", {"deepstack.schedule": _FIRST_TWO}, note="half of the crops' tokens"),
    Row(
        "groups_9",
        "9 groups, crops of 3x3",
        {"image.num_crops": 9, "image.grid": "square"},
        note="nine crops, enlarged 1.5 times: more tokens, no more detail, and digits cut by tokens' borders",
    ),
    *(
        Row(
            f"vision_{start}",
            f"DeepStack-V from tower layer {start}",
            _V | {"deepstack.vision_start": start},
            note="crops run through the tower up to that layer only",
        )
        for start in (0, 1, 2)
    ),
    Row("wide_stretched", "wide cards, both views stretched", _WIDE),
    Row("wide_letterboxed", "wide cards, crops letterboxed", _WIDE | {"image.fit": "letterbox"}),
    Row(
        "grids",
        "cards of 1x2, 2x1 and 2x2 crops; 1x4 and 4x1 held out",
        {"data.cards.grids": ((1, 2), (2, 1), (2, 2)), "data.cards.unseen": ((1, 4), (4, 1))},
    ),
    Row(
        "input",
        "the groups added at the input",
        {"deepstack.into": "input"},
    ),
    Row(
        "channels",
        "the groups joined along channels, before the projector",
        {"deepstack.into": "channels"},
        note="the projector's first map takes five tokens at once, and has as many times the parameters",
    ),
    Row(
        "taps",
        "taps of the low-res tower alone",
        {"image.mode": "stretch", "deepstack.stack": "taps", "deepstack.taps": ((1, 1), (2, 2), (3, 3), (4, 4))},
        note="a merger for each tap",
    ),
    Row(
        "crops_taps",
        "crops, and taps",
        {"deepstack.stack": "crops_taps", "deepstack.taps": ((1, 5), (2, 6), (3, 7), (4, 8))},
        note="a merger for each tap",
    ),
)
ROWS = {row.name: row for row in _ROWS}


def _line_rows(study: str, text: int) -> dict[str, Row]:
    """The same three forms over lines of receipts, `text` positions for their words."""
    rows = (
        Row(f"{study}_baseline", "low-res alone", {"image.mode": "stretch", "deepstack.stack": "none"}),
        Row(f"{study}_deepstack", "DeepStack-L"),
        Row(
            f"{study}_string",
            "all tokens in the sequence",
            {"deepstack.sequence": "global_crops", "deepstack.stack": "none", "data.max_length": 64 * (1 + 4) + text},
            note="five times the visual tokens in the sequence",
        ),
    )
    return {row.name: row for row in rows}


@dataclass(frozen=True)
class Study:
    """Rows over one base."""

    name: str
    title: str  # what is trained, in words
    base: str  # file of the base configuration, from the repository's root
    rows: Mapping[str, Row]
    seeds: tuple[str, ...]  # keys that a run's seed is given to: of parameters, order and generated examples
    needs: Mapping[str, str]  # folders that must be there, from the repository's root, with SIZE in them -> what makes each
    curve: str  # number of metrics.jsonl over the steps that is kept: of examples that training has not had
    runs: int = 3  # most of a row, a seed each


CARDS = Study("cards", "Cards", "configs/study.py", ROWS, ("seed", "data.seed", "data.cards.seed"), {}, "token_accuracy")
_LINES_DATA = {"runs/study/lines-data": "python -m benchmarks.study.lines --receipts=DIR --out=runs/study/lines-data"}
LINES = Study(
    "lines",
    "A small model from nothing",
    "configs/study_lines.py",
    _line_rows("lines", 128),
    ("seed", "data.seed"),
    _LINES_DATA,
    "validation_token_accuracy",
)
SMOLLM2 = Study(
    "smollm2",
    "SmolLM2-135M-Instruct",
    "configs/study_smollm2.py",
    _line_rows("smollm2", 160),
    ("seed", "data.seed"),
    _LINES_DATA
    | {
        "runs/study/pretrained/language": "ln -s /PATH/TO/SmolLM2-135M-Instruct runs/study/pretrained/language",
        "runs/study/pretrained/SIZE/clip": "python -m deepstack_jax.convert --from=WORKDIR --to=runs/study/pretrained/SIZE",
    },
    "validation_token_accuracy",
    runs=1,
)
STUDIES = {study.name: study for study in (CARDS, LINES, SMOLLM2)}

_UNSEEN = tuple(f"{kind}_unseen" for kind in DIGITS)
_ADDED = "Coarse questions are compared as well since the first runs showed that what is added early can hide the low-res view."
CLAIMS = (
    Claim(
        "high_res",
        "High resolution in the stack",
        "High-resolution tokens in the stack beat the same context without them.",
        ("baseline", "deepstack"),
        (above("deepstack", "baseline"),),
        "Digits are not in the low-res view, by construction: the question is whether the stack is read at all.",
        likely="the steps are too few.",
    ),
    Claim(
        "information",
        "Information, not additions",
        "What helps is what the crops show, not that something is added to more layers.",
        ("deepstack", "dummy", "only_global", "upsampled", "baseline"),
        (
            *(above("deepstack", other) for other in ("dummy", "only_global", "upsampled")),
            *(near("baseline", other) for other in ("dummy", "only_global", "upsampled")),
        ),
        likely="one of the blind rows is not, or a row has not learnt what its view does show: the kinds tell.",
    ),
    Claim(
        "string",
        "Stack against string",
        "A stack is nearly as good as all tokens in the sequence, for fewer FLOPs and less memory.",
        ("baseline", "deepstack", "string"),
        (near("deepstack", "string"),),
        "Rows are compared after the same steps, whether they have learnt to the end or not; FLOPs and memory are `plan`'s.",
        likely="the steps are too few for one of the two; the curves tell which.",
    ),
    Claim(
        "sampling",
        "Order of sampling",
        "2d dilated sampling beats 1d and grid.",
        ("deepstack", "sampling_1d", "sampling_grid"),
        (above("deepstack", "sampling_1d", speed=True), above("deepstack", "sampling_grid", speed=True)),
        "Only in 2d order is everything that is added at a position about the box that the position shows.",
        likely="in 1d order nine boxes of four tokens are few enough for the decoder to sort out; grid order mixes more.",
    ),
    Claim(
        "start",
        "Where the injection starts",
        "Early layers are good, and a late injection collapses.",
        ("start_0", "deepstack", *(f"start_{start}" for start in _STARTS[1:])),
        (
            near("start_2", "deepstack"),
            near("start_0", "deepstack", COARSE),
            *(above("deepstack", f"start_{start}", speed=True) for start in (8, 10)),
        ),
        f"DeepStack-L starts at layer 1. From layer 10 on two of the groups have no layer. {_ADDED}",
        likely="an answer takes two steps of attention at most, for which the last layers here are enough.",
    ),
    Claim(
        "interval",
        "Interval between the layers",
        "The interval from one group's layer to the next matters little.",
        ("deepstack", "interval_2", "interval_3"),
        tuple(near(*pair) for gap in (2, 3) for pair in (("deepstack", f"interval_{gap}"), (f"interval_{gap}", "deepstack"))),
        likely="the kinds tell: before, which is learnt last and in a jump, comes sooner or later than the steps end.",
    ),
    Claim(
        "groups",
        "Number of groups",
        "More groups help, up to a point.",
        ("baseline", "groups_1", "groups_2", "deepstack", "groups_9"),
        (
            above("groups_1", "baseline"),
            above("groups_2", "groups_1"),
            above("deepstack", "groups_2"),
            near("deepstack", "groups_9"),
        ),
        "A box's digit is drawn in one of the four groups; the tower's attention carries it into the others' tokens.",
        likely="two groups show nearly all already; nine are of enlarged crops, where tokens' borders cut a digit.",
    ),
    Claim(
        "vision",
        "Inside the vision tower",
        "DeepStack-V, crops into the tower, works too, and better from later layers.",
        ("baseline", "vision_0", "vision_1", "vision_2", "deepstack"),
        (above("vision_2", "baseline"), near("vision_2", "baseline", COARSE), above("vision_2", "vision_0", speed=True)),
        f"{_ADDED} The tower begins from nothing here; the paper's is pretrained, and early layers of it expect one picture.",
        likely="no layer of a tower that begins from nothing expects one picture, so early ones are as good.",
    ),
    Claim(
        "consistent",
        "One resize for both views",
        "Crops that are stretched as the global view is beat letterboxed ones.",
        ("wide_stretched", "wide_letterboxed"),
        (above("wide_stretched", "wide_letterboxed", speed=True),),
        "Cards of 1x2 crops on a canvas of 2x2.",
        likely="letterboxed digits keep their size: that may be worth more than to lie where the low-res view has them.",
    ),
    Claim(
        "grids",
        "Crop grids that training did not have",
        "A model reads pages whose crop grid it was not trained on.",
        ("grids",),
        (Comparison(Scores("grids", _UNSEEN), Scores("grids"), "near"),),
        "Scores on held-out cards of the grids that training had, and of those that it had not.",
        likely="the tokens of four crops in a row are dealt to the groups otherwise than in any grid that training had.",
    ),
    Claim(
        "fusion",
        "Fusing at the input",
        "The same groups, fused with the sequence's tokens at the input, are as good as an injection into layers or better.",
        ("deepstack", "input", "channels"),
        tuple(near(fused, "deepstack", kinds) for fused in ("input", "channels") for kinds in (DIGITS, COARSE)),
        f"{_ADDED} arXiv 2503.06063 finds fusing at the input better; the DeepStack paper finds channels joined worse.",
        likely="a sum, or one wide map, must make one token of five; layers could tell the groups apart.",
    ),
    Claim(
        "taps",
        "Taps are no substitute for pixels",
        "Layers of the low-res tower into layers of the decoder (Qwen3-VL's form) do not replace crops.",
        ("baseline", "taps", "crops_taps", "deepstack"),
        (above("deepstack", "taps"), near("baseline", "taps"), near("crops_taps", "deepstack")),
        likely="mergers add parameters and change how the low-res view is learnt.",
    ),
)
