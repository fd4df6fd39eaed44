"""Measures the distance to the official PyTorch code and writes docs/parity.md: `python -m benchmarks.parity_table [CASES]`.

CASES is a folder that `benchmarks/official_cases.py` filled; without it the table of live variants stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import deepstack_jax as dsx
from benchmarks.official_pictures import pictures
from deepstack_jax.data.encode.image import image_grid
from tests.parity.goldens import GOLDEN, build_batch, load_case, load_params, open_images, write_folder

OUTPUT = Path(__file__).parents[1] / "docs" / "parity.md"
CASES = {
    "l_2d": "DeepStack-L, 2d sampling, start 1, interval 1",
    "l_2d_start3_int2": "start 3, interval 2; groups past the last layer drop out",
    "l_1d": "1d sampling",
    "l_grid": "grid sampling",
    "l_only_global": "ablation: only the global view, injected",
    "l_string_withglobal": "ablation: all tokens as a string",
    "v": "DeepStack-V, injected from tower layer 2",
    "hd": "DeepStack-L-HD, `image_newline` in the sequence and in every group",
    "phi": "DeepStack-L on the Phi-3 decoder",
    "llava15": "baseline LLaVA-1.5, `pad`",
    "llava_next": "baseline LLaVA-NeXT, `anyres`, `spatial_unpad`",
}
GENERATED = {"generate": "DeepStack-L", "generate_hd": "DeepStack-L-HD"}
LIVE = ("<!-- live cases -->", "<!-- end of live cases -->")
DIFFERENCES = """## Where we differ on purpose

| official code | here | held by |
|---|---|---|
| positions found again at every layer, one image per sample | one `visual_index`, any number of images | `test_model.py` |
| a text-only row shifts the stacks of later rows | a stack belongs to its row | `test_model.py` |
| left padding moves the injection | left padding equals right padding | `test_model.py`, `test_api.py` |
| a row that is too long is cut, inside its visual tokens if need be | it is refused, or its text is cut | `test_pipeline.py` |
| LongRoPE: one row beyond the original context changes all rows | each sequence by its own length | `test_variants.py` |
| `2d_scaledown`, `hires_local` and DeepStack-V without a start layer raise | they work | `test_variants.py` |
| the tower in a checkpoint is read with `unfreeze_mm_vision_tower` only | it is read where present | `test_weights.py` |
| an unknown ablation is silently the baseline | an error that names the nearest | `test_weights_config.py` |
| an empty answer loses its end of turn | it is kept and supervised | `test_tokenize.py` |
| repeated `<image>` in a turn collapse to one | their number is kept | `test_conversation.py` |
| a real `<unk>` is taken for padding | it is a token | `test_tokenize.py` |
| a "tokenization mismatch" blanks a sample's labels | labels come from character offsets | `test_tokenize.py` |
| template v0 learns an answer before the first question | it is dropped, as in all templates | `test_conversation.py` |
| a template's own mark in the words (` ASSISTANT: `) moves labels | they are on the answer | `test_tokenize.py` |
| an HD folder's `deepstack_sampling` changes nothing | it is heeded in a run of ours; its export warns | `test_weights.py` |
| template v0: labels slide by one token a turn | labels are on the answer | `test_tokenize.py` |
| the loss is a mean over each device's tokens | over the tokens of the global batch | `test_step.py` |
| `mm_vision_tower_lr` is ignored | the tower has a group of its own in the optimizer's table | `test_optimizer.py` |

Images of height 3 are read as channels-first by the official preprocessing (`square`, and `pad` at longest side 3); the
goldens hold it, so we do the same. A sliding window of w lets a token see w tokens before it, as upstream's masks do;
transformers 5 lets it see w - 1.

While an answer crosses LongRoPE's original context, keys in the cache keep the short factors, as upstream; a forward pass over
the whole text takes the long ones for all of it. `tokenizer_model_max_length` cuts nothing here.

The official code runs these and we refuse them, each in one line: DeepStack-V without `2xsample` (it works there while every
image happens to have `num_crops` cells), `deepstack_interval` 0 and a negative `deepstack_start_id`, `mlp1x_gelu` (one layer
under the names of several), dynamic rotary scaling, attention biases, another activation than SiLU, and rows beyond
`max_position_embeddings`.
"""


def measure(name: str) -> tuple[float, float, float]:
    """Largest error of logits and of final hidden states at real positions, and the error of the loss."""
    case = load_case(name)
    model, batch, params = case.model(), build_batch(case), load_params(case)
    hidden = jax.jit(model.apply)(params, batch).hidden
    logits = model.apply(params, hidden, method="logits")
    real, at = case.arrays["attention_mask_expanded"], case.arrays["logit_positions"]
    picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch.targets[..., None], -1)[..., 0]
    loss = -(picked * batch.loss_weights).sum() / batch.loss_weights.sum()
    return (
        float(np.abs(np.asarray(logits)[:, at] - case.arrays["logits"])[real[:, at]].max()),
        float(np.abs(np.asarray(hidden) - case.arrays["final_hidden"])[real].max()),
        float(abs(loss - case.arrays["loss"])),
    )


def recorded() -> str:
    """The table of the golden cases."""
    rows = ["| case | what it is | logits | final hidden | loss |", "|---|---|---|---|---|"]
    for name, meaning in CASES.items():
        logits, hidden, loss = measure(name)
        rows.append(f"| {name} | {meaning} | {logits:.1e} | {hidden:.1e} | {loss:.1e} |")
        print(rows[-1], flush=True)
    return "\n".join(rows)


def generated() -> str:
    """The table of greedy generation."""
    rows = ["| case | what it is | ids equal | logits at every step |", "|---|---|---|---|"]
    for name, meaning in GENERATED.items():
        with tempfile.TemporaryDirectory() as scratch, np.load(GOLDEN / name / "case.npz") as stored:
            lmm = dsx.load(write_folder(name, Path(scratch) / "model"))
            official, scores, prompt = stored["generated"][0], stored["greedy_logits"], stored["input_ids"]
            ids = np.concatenate([prompt, official[None]], axis=1)
            logits = lmm.logits(ids, [open_images()[:1]], np.ones_like(ids))[0, -len(official) - 1 : -1]
        equal = int((logits.argmax(-1) == official).sum())
        rows.append(f"| {name} | {meaning} | {equal} of {len(official)} | {np.abs(logits - scores).max():.1e} |")
        print(rows[-1], flush=True)
    return "\n".join(rows)


def live(folder: Path) -> str:
    """The table of variants that the official code was run on beside us."""
    rows = ["| variant | logits | variant | logits |", "|---|---|---|---|"]
    found, images = [], pictures()
    for case in sorted(folder.iterdir()):
        lmm = dsx.load(case / "hf")
        with np.load(case / "case.npz") as stored:
            ids, mask, official = (stored[key] for key in ("input_ids", "attention_mask", "logits"))
        ours = lmm.logits(ids, [[image] for image in images], mask)
        if ours.shape != official.shape:
            sys.exit(f"{case.name}: logits of shape {ours.shape}, official {official.shape}")
        errors = []
        for row, image in enumerate(images):
            visual = lmm.config.layout.token_count(image_grid(image.size, lmm.config.image), image.size)
            length = int(mask[row].sum()) - 1 + visual
            errors.append(np.abs(ours[row, :length] - official[row, :length]).max())
        found.append(f"{case.name} | {max(errors):.1e}")
        print(found[-1], flush=True)
    found += [" | "] * (len(found) % 2)
    rows += [f"| {left} | {right} |" for left, right in zip(found[::2], found[1::2], strict=True)]
    return "\n".join(rows)


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    before = OUTPUT.read_text() if OUTPUT.exists() else ""
    kept = re.search(f"{LIVE[0]}\n(.*)\n{LIVE[1]}", before, re.DOTALL)
    table = live(Path(sys.argv[1])) if len(sys.argv) > 1 else kept[1] if kept else "not measured yet"
    # What is compared with transformers is written by hand.
    others = re.search(r"(## Families\n.*?)(?=## Where we differ)", before, re.DOTALL)
    versions = json.loads((GOLDEN / "l_2d" / "case.json").read_text())["versions"]
    text = f"""# Parity with the official PyTorch code

Largest absolute error against outputs recorded from the official implementation (torch {versions["torch"]},
transformers {versions["transformers"]}) on tiny random weights (`tests/golden/README.md`), in float32 on
{jax.devices()[0].platform}, jax {jax.__version__}; written by `python -m benchmarks.parity_table`.
Configuration and weights come through the importer, pixels from the PNG files. Held to 5e-4 (logits) and 1e-5 (loss) by
`tests/parity`, which also compares every hidden state, the stack, the vision features and the gradients.

{recorded()}

Greedy generation, prompt and picture as recorded:

{generated()}

## More variants, run side by side

`benchmarks/official_cases.py` runs the official code over the variants below (three rows, three pictures); the checkpoint
folders that it saves are loaded here, and logits compared at every real position.

{LIVE[0]}
{table}
{LIVE[1]}

Pixels equal the official ones to the bit in all recorded modes, token ids and labels on every conversation that the official
code accepts (`tests/unit`: `test_image.py`, `test_tokenize.py`; cases that differ on purpose are listed there with the reason).

{others[1] if others else ""}{DIFFERENCES}"""
    OUTPUT.write_text(text)


if __name__ == "__main__":
    main()
