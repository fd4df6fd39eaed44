"""One sample as a card of the page: its pictures with captions, its counts, its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from deepstack_jax.audit import pictures
from deepstack_jax.audit.inputs import ImageInput, Layer, ModelInput, injecting_layers
from deepstack_jax.audit.pictures import Sheet, data_uri
from deepstack_jax.audit.prompt import PromptPiece, prompt_runs, special_names
from deepstack_jax.audit.survey import grid_name, origin_of
from deepstack_jax.config import Config
from deepstack_jax.data.encode.chat_template import open_template
from deepstack_jax.data.encode.tokenizer import Tokenizer
from deepstack_jax.data.example import BadExample
from deepstack_jax.data.formats.image_files import read_image


class Tag(NamedTuple):
    """An entry of a legend; no colour for a remark."""

    colour: str
    label: str


class Picture(NamedTuple):
    """A picture with what it shows."""

    title: str
    caption: str
    uri: str
    wide: bool = False  # wants the whole width of a narrow screen


class ImageCard(NamedTuple):
    """The pictures of one image, and what the colours in them mean."""

    title: str
    pictures: Sequence[Picture]
    tags: Sequence[Tag]


@dataclass(frozen=True)
class SampleCard:
    """A sample of the page; `reason` says why it cannot be used, and is empty for one that can."""

    number: int
    name: str
    row: int
    origin: str = ""
    reason: str = ""
    facts: Sequence[tuple[str, str]] = ()  # name, number
    images: Sequence[ImageCard] = ()
    runs: Sequence[tuple[bool, list[PromptPiece]]] = ()
    tokens_shown: bool = False  # whether tokens are set apart: not where each is one character


def make_card(number: int, sample: ModelInput | BadExample, config: Config, tokenizer: Tokenizer) -> SampleCard:
    """The card of a sample, number `number` of the page."""
    if isinstance(sample, BadExample):
        return SampleCard(number, sample.name, sample.index, reason=sample.reason)
    runs = prompt_runs(sample, tokenizer, special_names(tokenizer, open_template(config.data.template, tokenizer)))
    length, visual, supervised = len(sample.tokens), int((sample.image_of >= 0).sum()), int(sample.supervised.sum())
    facts = [
        ("tokens", f"{length:,}"),
        ("of them text", f"{length - visual:,}"),
        ("of them visual", f"{visual:,}"),
        ("supervised", f"{supervised:,} ({supervised / length:.1%})"),
        *([("cut from its end", f"{sample.cut:,} tokens")] if sample.cut else []),
        ("crop slots", f"{sum(len(image.pixels) for image in sample.images)} of {config.data_spec.crop_slots}"),
        ("padding alone in its row", f"{sample.row_length - length:,} of {sample.row_length:,}"),
    ]
    cards = []
    for place, (source, image) in enumerate(zip(sample.example.images, sample.images, strict=True), 1):
        title = f"Image {place}" if len(sample.images) > 1 else "Image"
        cards.append(make_image_card(title, read_image(source, config.data)[0], image, config))
    return SampleCard(
        number=number,
        name=sample.example.name,
        row=sample.example.index,
        origin=origin_of(sample.example),
        facts=facts,
        images=cards,
        runs=runs,
        tokens_shown=any(len(piece.text) > 1 for _, run in runs for piece in run if piece.kind == "text"),
    )


def make_image_card(title: str, original: Image.Image, image: ImageInput, config: Config) -> ImageCard:
    """Original, every view that the model gets, and the same under the colours of the layers."""
    layers, spec = injecting_layers(config), config.layout
    colours = pictures.layer_colours(len(layers))
    token = config.vision.patch_size * config.deepstack.pool  # pixels
    sheets = pictures.make_sheets(image, layers, spec, token)
    followed = pictures.followed_position(image, layers, spec, token)
    target = -1 if followed is None else int(image.tokens[followed])
    added = [] if followed is None else [int(image.stack[layer.group, followed]) for layer in layers]
    home = next((sheet.name for sheet in sheets if sheet.find(target)), None)
    receiver = f"the framed token of the {home}" if home else "one place of the sequence, itself exact zero"

    original_uri = data_uri(pictures.fit(original.convert("RGB")))
    shown = [Picture("Original", f"{image.size_wh[0]}×{image.size_wh[1]} px", original_uri)]
    shown += [_plain(sheet, target) for sheet in sheets]
    for sheet in sheets:
        if not sheet.injected.any() and not sheet.unused:
            continue
        sheet = sheet.scaled(pictures.enlargement(max(sheet.pixels.shape)))
        shown.append(_painted(sheet, colours))
        if places := sorted({place for place in map(sheet.find, added) if place is not None}):
            one = "framed token is" if len(places) == 1 else "framed tokens are"
            caption = f"The {one} added to {receiver}; numbers name the layer"
            closer = pictures.close_up(sheet, colours, places, layers)
            shown.append(Picture("Close-up", caption, data_uri(closer), wide=True))
    grid = "" if image.grid is None else f", grid {grid_name(image.grid)} (rows × columns)"
    tags = _tags(image, layers, colours, sum(sheet.unused for sheet in sheets))
    return ImageCard(f"{title}: {len(image.tokens):,} visual tokens{grid}", shown, tags)


def hex_code(colour: np.ndarray) -> str:
    """A colour u8[3] as CSS writes it."""
    return "#" + bytes(colour.tolist()).hex()


def _plain(sheet: Sheet, target: int) -> Picture:
    height, width = sheet.pixels.shape[:2]
    tokens, inside = sheet.sequence.size, int(sheet.sequence.sum())
    place = "all in the sequence" if inside == tokens else f"{inside:,} in the sequence" if inside else "none in the sequence"
    views = "" if sheet.index.size == 1 else f", {sheet.index.size} views"
    caption = f"{width}×{height} px{views}, {tokens:,} tokens: {place}"
    return Picture(sheet.name.capitalize(), caption, data_uri(pictures.plain(sheet, sheet.find(target))))


def _painted(sheet: Sheet, colours: np.ndarray) -> Picture:
    injected = int(sheet.injected.any(axis=0).sum())
    told = [f"{injected:,} tokens in the colours of their layers"] if injected else []
    told += [f"{sheet.unused:,} tokens not used, gray"] if sheet.unused else []
    title = f"{sheet.name.capitalize()} by layer" if injected else f"{sheet.name.capitalize()}: what is used"
    painted = pictures.fit(Image.fromarray(pictures.paint(sheet, colours)))
    return Picture(title, "; ".join(told), data_uri(painted), wide=True)


def _tags(image: ImageInput, layers: Sequence[Layer], colours: np.ndarray, unused: int) -> list[Tag]:
    tags = []
    for layer, colour in zip(layers, colours, strict=True):
        group = image.stack[layer.group]
        count, sources = int((group >= 0).sum()), int(np.unique(group[group >= 0]).size)
        again = "" if count == sources else f" ({sources:,} different)"
        tags.append(Tag(hex_code(colour), f"{layer.name}: " + (f"{count:,} tokens{again}" if count else "exact zeros")))
    if unused:
        tags.append(Tag(hex_code(np.array(pictures.GRAY, np.uint8)), f"not used: {unused:,} tokens"))
    return tags
