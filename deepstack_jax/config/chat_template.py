"""The chat template of a model's own folder as a value of `config.data.template`.

The value holds the whole text, as jinja:TEXT, so that a run goes on and is exported without that folder. A template that
writes the date of the day has the day with it, as jinja@YYYY-MM-DD:TEXT, or a run would see other tokens after midnight.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepstack_jax.errors import ConfigError, fetch_command
from deepstack_jax.printing import label

OWN = "model"
"""How a user says: that of the tokenizer's folder."""
TEMPLATE_FILE = "chat_template.jinja"
OLDER_FILE = "chat_template.json"  # beside the processor of a multimodal model
_TOKENIZER_FILE = "tokenizer_config.json"
_VALUE = re.compile(r"jinja(?:@(\d{4}-\d\d-\d\d))?:(.*)", re.DOTALL)
_MOST = 1 << 20  # bytes of a file; the longest that was seen has 20 kB


class ChatSource(NamedTuple):
    """The text of a chat template."""

    text: str
    date: str  # YYYY-MM-DD that `strftime_now` gives; "" = today


def chat_source(template: str) -> ChatSource | None:
    """What a value of `config.data.template` holds; None where it is a name."""
    found = _VALUE.fullmatch(template)
    return ChatSource(found[2], found[1] or "") if found else None


def own_template(folder: str | Path, *, dated: bool = False) -> str:
    """The chat template of a folder as a value of `config.data.template`; "" where it has none.

    Where several are there, a file of its own counts, and of named ones that called "default", as in transformers.

    Args:
      dated: it is for a run: one that looks at the date gets that of today for good.

    Raises:
      ConfigError: what is there is no template.
    """
    at = Path(folder).expanduser()
    text = _text_of(at)
    if text is None:
        return ""
    date = f"@{datetime.date.today().isoformat()}" if dated and "strftime_now" in text else ""
    return f"jinja{date}:{text}"


def with_own_template(values: Mapping[str, Any], workdir: Path | None = None) -> dict[str, Any]:
    """The values of a configuration, where `data.template` says OWN with the text in its place: a run that has begun goes on
    with its own.

    Raises:
      ConfigError: the tokenizer's folder has none.
    """
    data = values.get("data")
    if not isinstance(data, Mapping) or data.get("template") != OWN:
        return dict(values)
    begun = workdir / "config.json" if workdir is not None else None
    found = _stored_template(begun) if begun is not None and begun.is_file() else ""
    if not chat_source(found) and fetch_command(data["tokenizer"]) and not Path(data["tokenizer"]).expanduser().exists():
        return dict(values)  # still to be fetched: a run says so with the command, and a plan needs no template
    found = found if chat_source(found) else own_template(data["tokenizer"], dated=True)
    if not found:
        raise ConfigError(
            f"config.data.template is {OWN!r}, but config.data.tokenizer={label(data['tokenizer'])} has no chat template; name "
            "a template, or the folder of a model that has one with --config.data.tokenizer=DIR"
        )
    return {**values, "data": {**data, "template": found}}


def _stored_template(file: Path) -> str:
    try:
        return str(json.loads(file.read_text("utf-8"))["data"]["template"])
    except (ValueError, RecursionError, LookupError, TypeError):  # which is said where the run is begun
        return ""


def _text_of(folder: Path) -> str | None:
    if (folder / TEMPLATE_FILE).is_file():
        return _read(folder / TEMPLATE_FILE)
    for file in (folder / _TOKENIZER_FILE, folder / OLDER_FILE):
        if not file.is_file():
            continue
        try:
            said = json.loads(_read(file, 64 * _MOST))  # the first also lists the added tokens
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file} is not JSON ({label(error)}); download it again") from error
        found = said.get("chat_template") if isinstance(said, dict) else None
        if found is not None:
            return _default(found, file)
    return None


def _default(found: Any, file: Path) -> str:
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        named = {one.get("name"): one.get("template") for one in found}
        if "default" not in named:
            names = label(", ".join(map(str, named))) or "none"
            raise ConfigError(f"{file}: chat_template has {names}, expected one named 'default'; name the one to use so")
        found = named["default"]
    if not isinstance(found, str):
        raise ConfigError(f"{file}: chat_template is a {type(found).__name__}, expected a text; download it again")
    return found


def _read(file: Path, most: int = _MOST) -> str:
    with file.open("rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise ConfigError(f"{file} has more than {most:,} bytes, which no chat template needs; download it again")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text ({label(error)}); download it again") from error


def template_in_words(template: str) -> str:
    """A template for people: its name, or by which digits two chat templates can be told apart."""
    source = chat_source(template)
    if source is None:
        return template
    digits = hashlib.sha256(source.text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"chat template of the model (sha256 {digits}{f', as of {source.date}' if source.date else ''})"
