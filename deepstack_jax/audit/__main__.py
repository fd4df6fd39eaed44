"""Look at what the model will see: `python -m deepstack_jax.audit --config=configs/demo.py --n 16`."""

from functools import partial

from absl import flags
from rich.progress import track

from deepstack_jax import cli
from deepstack_jax.atomic import write_whole
from deepstack_jax.audit.cards import make_card
from deepstack_jax.audit.charts import draw_charts
from deepstack_jax.audit.inputs import model_input
from deepstack_jax.audit.page import quarantined, render_page
from deepstack_jax.audit.survey import choose_rows, survey
from deepstack_jax.config import Config
from deepstack_jax.data.encode.tokenizer import open_tokenizer
from deepstack_jax.data.example import BadExample, Source, SourceError
from deepstack_jax.data.open import open_source
from deepstack_jax.data.overlap import find_overlap, overlap_line
from deepstack_jax.errors import try_all
from deepstack_jax.printing import Console, plural

USAGE = """
Look at what the model will see, before a run: one HTML page with every sample's views, the layer that each token goes to, the
prompt with what is supervised, and the lengths, grids and unusable examples of the data.

  python -m deepstack_jax.audit --config=configs/demo.py --n=16
  python -m deepstack_jax.audit --config=configs/receipts.py --config.data.root=DIR --out=runs/audit --seed=1

  --config=FILE[:ARGUMENT]   configuration file; --config.KEY=VALUE overrides any key of it
  --n=16                     samples to show: the first of the training order
  --seed=N                   draw them at random instead
  --scan=1000                examples that the histograms are over; their images are not decoded
  --out=runs/audit           folder for audit.html and its charts as PNG

Exit codes: 0 done, unusable samples or not; 1 a mistake in the input, said in one line; 130 stopped by Ctrl-C.
"""

FLAGS = (
    (N := cli.Flag(flags.DEFINE_integer, "n", 16, "Samples to show.", lower_bound=1)),
    (SEED := cli.Flag(flags.DEFINE_integer, "seed", None, "Draws the samples at random.", lower_bound=0)),
    (SCAN := cli.Flag(flags.DEFINE_integer, "scan", 1000, "Examples that the histograms are over.", lower_bound=1)),
    (OUT := cli.Flag(flags.DEFINE_string, "out", "runs/audit", "Folder for audit.html and its charts.")),
    cli.CONFIG,
)


def main() -> int:
    config = cli.parse_config()
    out = cli.writable_folder(OUT.value, "out")
    tokenizer, source = try_all(partial(open_tokenizer, config.data_spec), partial(open_source, config.data, "train"))
    console = Console()

    rows = choose_rows(source, config, max(N.value, SCAN.value), SEED.value)
    found = survey(source, config, rows[: SCAN.value], console)
    shown = track(rows[: N.value], "drawing samples", console=console, transient=True, disable=not console.is_terminal)
    cards = [make_card(number, model_input(source, row, config), config, tokenizer) for number, row in enumerate(shown, 1)]
    charts = draw_charts(found, config)
    leaks = trained_on(config, source, console)
    page = render_page(config, found, cards, charts, len(source), leaks)

    for name, themes in charts.items():
        write_whole(out / f"{name}.png", themes["light"])
    write_whole(out / "audit.html", page.encode("utf-8", "replace"))
    bad = len(quarantined(found, cards))
    console.print(f"{plural(len(found.rows), 'example')} looked at, {bad:,} unusable; the data has {len(source):,}")
    console.print(f"{found.supervised_share:.1%} of their tokens are supervised")
    for remark, count in found.remarks():
        console.print(f"{remark}: {count:,}", soft_wrap=True)
    console.print(f"written: {out / 'audit.html'} ({len(page) / 1e6:.1f} MB, {plural(len(cards), 'sample')})", soft_wrap=True)
    return cli.EXIT_DONE


def trained_on(config: Config, train: Source, console: Console) -> list[BadExample]:
    """Held-out rows of which the training data has the row, a question with its image, or the image."""
    if not config.data.validation:
        return []
    try:
        held_out = open_source(config.data, "validation")
    except SourceError as error:
        console.print(f"held-out rows are not looked for among the training rows: {error}", soft_wrap=True)
        return []
    rows = min(config.evaluation.examples, len(held_out))
    overlap = find_overlap(held_out, rows, train)
    if line := overlap_line(overlap, rows, len(train)):
        console.print(f"warning: {line}", soft_wrap=True)
    reasons = dict.fromkeys(overlap.image_rows, "an image of it") | dict.fromkeys(
        overlap.rows, "the row, or a question with its image"
    )
    return [BadExample(row, held_out[row].name, reasons[row]) for row in sorted(reasons)]


if __name__ == "__main__":
    cli.run(main, USAGE, FLAGS)
