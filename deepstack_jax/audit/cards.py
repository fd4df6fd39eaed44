"""One sample as a card of the page: its pictures with captions, its counts, its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from deepstack_jax.audit import pictures
from deepstack_jax.audit.inputs import ImageInput, Layer, ModelInput, injecting_layers
from deepstack_jax.audit.pictures import Sheet
from deepstack_jax.audit.prompt import Piece, prompt_runs, special_names
from deepstack_jax.audit.survey import grid_name
from deepstack_jax.config import Config
from deepstack_jax.data.encode.encoder import BadExample
from deepstack_jax.data.encode.templates import get_template
from deepstack_jax.data.encode.tokenizer import Tokenizer
from deepstack_jax.data.formats.image_files import read_image


class Chip(NamedTuple):
    """An entry of a legend; no colour for a remark."""

    colour: str
    label: str


class Picture(NamedTuple):
    """A picture with what it shows."""

    title: str
    caption: str
    uri: str
    wide: bool = False  # wants the whole width of a narrow screen


class Fact(NamedTuple):
    """A number with its name."""

    name: str
    value: str


@dataclass(frozen=True)
class ImageCard:
    """The pictures of one image, and what the colours in them mean."""

    title: str
    pictures: tuple[Picture, ...]
    chips: tuple[Chip, ...]


@dataclass(frozen=True)
class SampleCard:
    """A sample of the page; `reason` says why it cannot be used, and is empty for one that can."""

    number: int
    name: str
    row: int
    origin: str = ""
    reason: str = ""
    facts: tuple[Fact, ...] = ()
    images: tuple[ImageCard, ...] = ()
    runs: tuple[tuple[bool, list[Piece]], ...] = ()
    tokens_shown: bool = False  # whether tokens are set apart: not where each is one character


def make_card(number: int, seen: ModelInput | BadExample, config: Config, tokenizer: Tokenizer) -> SampleCard:
    """The card of a sample, number `number` of the page."""
    if isinstance(seen, BadExample):
        return SampleCard(number, seen.name, seen.index, reason=seen.reason)
    runs = tuple(prompt_runs(seen, tokenizer, special_names(tokenizer, get_template(config.data.template))))
    length, visual = len(seen.tokens), int((seen.image_of >= 0).sum())
    supervised = int(seen.supervised.sum())
    facts = (
        Fact("tokens", f"{length:,}"),
        Fact("of them text", f"{length - visual:,}"),
        Fact("of them visual", f"{visual:,}"),
        Fact("supervised", f"{supervised:,} ({supervised / length:.1%})"),
        *([Fact("cut from its end", f"{seen.cut:,} tokens")] if seen.cut else []),
        Fact("crop slots", f"{sum(len(image.pixels) for image in seen.images)} of {config.crop_slots}"),
        Fact("padding alone in its row", f"{seen.row_length - length:,} of {seen.row_length:,}"),
    )
    opened = [read_image(source, config.data)[0] for source in seen.example.images]
    cards = [
        make_image_card(f"Image {place}" if len(opened) > 1 else "Image", original, image, config)
        for place, (original, image) in enumerate(zip(opened, seen.images, strict=True), 1)
    ]
    info = seen.example.info
    return SampleCard(
        number=number,
        name=seen.example.name,
        row=seen.example.index,
        origin=str(info.get("set") or info.get("data_source") or ""),
        facts=facts,
        images=tuple(cards),
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

    original_size = f"{image.size_wh[0]}×{image.size_wh[1]} px"
    shown = [Picture("Original", original_size, pictures.data_uri(pictures.fit(original.convert("RGB"))))]
    shown += [_plain(sheet, pictures.place_of(sheet, target, spec)) for sheet in sheets]
    home = next((sheet.name for sheet in sheets if pictures.place_of(sheet, target, spec)), None)
    for sheet in sheets:
        if not sheet.injected.any() and not sheet.unused:
            continue
        sheet = sheet.scaled(pictures.enlargement(max(sheet.pixels.shape)))
        shown.append(_painted(sheet, colours))
        places = {place for place in (pictures.place_of(sheet, one, spec) for one in added) if place is not None}
        if places:
            receiver = f"the framed token of the {home}" if home else "one place of the sequence, itself exact zero"
            one = "framed token is" if len(places) == 1 else "framed tokens are"
            caption = f"The {one} added to {receiver}; numbers name the layer"
            closer = pictures.close_up(sheet, colours, sorted(places), layers)
            shown.append(Picture("Close-up", caption, pictures.data_uri(closer), wide=True))
    grid = "" if image.grid is None else f", grid {grid_name(image.grid)} (rows × columns)"
    return ImageCard(
        f"{title}: {len(image.tokens):,} visual tokens{grid}", tuple(shown), _chips(image, layers, colours, sheets)
    )


def hex_code(colour: np.ndarray) -> str:
    """A colour u8[3] as CSS writes it."""
    return "#" + bytes(colour.tolist()).hex()


def _plain(sheet: Sheet, frame: tuple[int, int] | None) -> Picture:
    height, width = sheet.pixels.shape[:2]
    tokens, inside = sheet.sequence.size, int(sheet.sequence.sum())
    place = "all in the sequence" if inside == tokens else f"{inside:,} in the sequence" if inside else "none in the sequence"
    cut = "" if sheet.index.size == 1 else f", {sheet.index.size} views"
    picture = pictures.framed(sheet, frame)
    if sheet.index.size > 1:
        picture = pictures.with_seams(picture, sheet.index.shape)
    return Picture(_capital(sheet.name), f"{width}×{height} px{cut}, {tokens:,} tokens: {place}", pictures.data_uri(picture))


def _painted(sheet: Sheet, colours: np.ndarray) -> Picture:
    injected = int(sheet.injected.any(axis=0).sum())
    said = [f"{injected:,} tokens in the colours of their layers"] if injected else []
    said += [f"{sheet.unused:,} tokens not used, gray"] if sheet.unused else []
    title = f"{_capital(sheet.name)} by layer" if injected else f"{_capital(sheet.name)}: what is used"
    painted = Image.fromarray(pictures.paint(sheet, colours))
    return Picture(title, "; ".join(said), pictures.data_uri(pictures.fit(painted)), wide=True)


def _chips(image: ImageInput, layers: Sequence[Layer], colours: np.ndarray, sheets: Sequence[Sheet]) -> tuple[Chip, ...]:
    chips = []
    for layer, colour in zip(layers, colours, strict=True):
        group = image.stack[layer.group]
        count, sources = int((group >= 0).sum()), int(np.unique(group[group >= 0]).size)
        again = "" if count == sources else f" ({sources:,} different)"
        what = f"{count:,} tokens{again}" if count else "exact zeros"
        chips.append(Chip(hex_code(colour), f"{layer.name}: {what}"))
    unused = sum(sheet.unused for sheet in sheets)
    if unused:
        chips.append(Chip(hex_code(np.array(pictures.GRAY, np.uint8)), f"not used: {unused:,} tokens"))
    return tuple(chips)


def _capital(name: str) -> str:
    return name[0].upper() + name[1:]
