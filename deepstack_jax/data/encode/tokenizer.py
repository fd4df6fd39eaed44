"""Tokenizers: text to token ids with character offsets, and back; those without files: bytes and words."""

import collections
import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from deepstack_jax.config import DataSpec
from deepstack_jax.config.chat_template import template_in_words
from deepstack_jax.data.encode.chat_template import SPECIAL, ChatTemplate, open_template
from deepstack_jax.data.encode.fast_tokenizer import HFTokenizer
from deepstack_jax.data.encode.sentencepiece_tokenizer import SentencePieceTokenizer
from deepstack_jax.data.encode.templates import TEMPLATES, get_template
from deepstack_jax.data.encode.tokenizer_files import LITERALS, read_settings
from deepstack_jax.errors import ConfigError, fetch_command

_BARRED = re.compile(r"<[|｜][^<>\s]+[|｜]>")  # what no template writes as words
HALF_CHARACTER = "\ufffd"  # how a tokenizer shows bytes that are not a character, or not yet


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline and generation need of a tokenizer.

    `encode` gives ids i32[n] without BOS, and offsets i32[n, 2]: the half-open character span of `text` that is each
    token, empty for a token that stands for no character (the space that sentencepiece puts in front). A control token is
    text where its characters are one of the spans `plain`. `bos_id` is None where the model's tokenizer adds none. `decode`
    leaves special tokens out. `control_tokens` are those that steer a model, by id: BOS, EOS, padding, and what the
    tokenizer's files call special; `special_tokens` those that its files name by their role ("bos_token"). `vocab_size` is one
    more than the largest id.
    """

    @property
    def special_tokens(self) -> Mapping[str, str]: ...
    @property
    def control_tokens(self) -> Mapping[int, str]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def encode(self, text: str, plain: Sequence[tuple[int, int]] = ()) -> tuple[np.ndarray, np.ndarray]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes shifted by three; "<s>" and "</s>" in a text are BOS and EOS. For tests and tiny models: no files."""

    vocab_size, pad_id, bos_id, eos_id = 259, 0, 1, 2
    control_tokens: Mapping[int, str] = {id: name for name, id in LITERALS.items()}
    special_tokens: Mapping[str, str] = {"bos_token": "<s>", "eos_token": "</s>"}

    def encode(self, text: str, plain: Sequence[tuple[int, int]] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Ids i32[n] and character offsets i32[n, 2]; every byte of a character carries the character's span."""
        ids, spans, position = [], [], 0
        for part in re.split("(</?s>)", text):
            if part in LITERALS and (position, position + len(part)) not in plain:
                ids.append([LITERALS[part]])
                spans.append([(position, position + len(part))])
            else:
                utf8 = np.frombuffer(part.encode("utf-8", "surrogatepass"), np.uint8)
                character = position + np.cumsum((utf8 & 0xC0) != 0x80) - 1
                ids.append(utf8 + np.int32(3))
                spans.append(np.stack([character, character + 1], axis=1))
            position += len(part)
        return np.concatenate(ids).astype(np.int32), np.concatenate(spans).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes; an id beyond the bytes, which a padded output layer can produce, shows as U+FFFD."""
        return bytes(min(int(id) - 3, 255) for id in ids if id not in (0, 1, 2)).decode("utf-8", "replace")


class WordTokenizer:
    """A closed vocabulary: id 3 + i is `words[i]`, white space separates words, no BOS; ValueError for any other word."""

    pad_id, bos_id, eos_id = 0, None, 2
    control_tokens: Mapping[int, str] = ByteTokenizer.control_tokens
    special_tokens: Mapping[str, str] = {"eos_token": "</s>"}

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.vocab_size = 3 + len(self.words)
        self._ids = {word: 3 + i for i, word in enumerate(self.words)} | LITERALS
        counts = collections.Counter(self.words)
        bad = [word for word, n in counts.items() if n > 1 or word.split() != [word] or re.search("</?s>", word)]
        if bad or not self.words:
            raise ValueError(f"words: got {bad[:5] or 'none'}; expected distinct words without white space, <s> and </s>")

    def encode(self, text: str, plain: Sequence[tuple[int, int]] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Ids i32[n] and character offsets i32[n, 2]; "<s>" and "</s>" are recognised glued to a word too."""
        found = list(re.finditer(r"</?s>|\S+?(?=</?s>|\s|$)", text))
        for match in found:
            if match[0] not in self._ids or match.span() in plain:
                nearest = difflib.get_close_matches(match[0], self.words, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown word {match[0]!r} at character {match.start()}; nearest known: {nearest!r}")
        ids = np.array([self._ids[match[0]] for match in found], np.int32)
        return ids, np.array([match.span() for match in found], np.int32).reshape(-1, 2)

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[int(id) - 3] for id in ids if id not in (0, 1, 2))


@functools.lru_cache(maxsize=16)
def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a config names: "bytes", "words:red green blue", "words:@file", a folder or tokenizer file, or a
    training run's workdir, whose tokenizer it then is.

    A folder with tokenizer.model is read with sentencepiece, since upstream's ids come from there; one without it through
    tokenizer.json. Results are cached, as several parts of a run ask for the same one.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("words:@"):
        return WordTokenizer(Path(spec.removeprefix("words:@")).read_text("utf-8").split())
    if spec.startswith("words:"):
        return WordTokenizer(spec.removeprefix("words:").split())
    path = Path(spec).expanduser()
    if path.name == "tokenizer.model" or (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path.parent if path.name == "tokenizer.model" else path)
    if path.is_file() or (path / "tokenizer.json").is_file():
        return HFTokenizer(path)
    run = read_settings(path / "config.json").get("data")
    if isinstance(run, dict) and run.get("tokenizer"):
        return load_tokenizer(run["tokenizer"])
    raise FileNotFoundError(
        f"tokenizer {spec!r}: neither {path / 'tokenizer.model'} nor {path / 'tokenizer.json'} exists; "
        f"expected 'bytes', 'words:...', 'words:@file' or a folder with one of these"
    )


def open_tokenizer(spec: DataSpec) -> Tokenizer:
    """The tokenizer, checked against template and decoder before anything is compiled."""
    if not spec.data.tokenizer:
        raise ConfigError("config.data.tokenizer is empty: give a folder with tokenizer.model with --config.data.tokenizer=DIR")
    try:
        tokenizer = load_tokenizer(spec.data.tokenizer)
        check_template(spec.data.template, tokenizer)
    except (ValueError, OSError) as error:
        fetch = fetch_command(spec.data.tokenizer) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"config.data: {error}" + (f": {fetch}" if fetch else "")) from error
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, config.decoder.vocab_size is {spec.vocab_size}; raise it"
        )
    return tokenizer


def check_template(name: str, tokenizer: Tokenizer) -> None:
    """Refuse (ValueError) a template that does not go with the tokenizer, as `template_problem` says."""
    if problem := template_problem(name, tokenizer):
        fitting = ", ".join(fitting_templates(tokenizer)) or "no template here"
        raise ValueError(
            f"{problem}; choose the template that the tokenizer was made for (it has the end of turn of {fitting}), or add the "
            "token"
        )


def template_problem(name: str, tokenizer: Tokenizer) -> str:
    """What is wrong with a template and a tokenizer together, in words; "" where they fit.

    An end of turn that is a special token, spelt out in pieces, would be learnt as text, and an answer would never end at the
    token that stops it. A chat template must write no other special token either that the tokenizer lacks, and end a turn.

    Raises:
      ValueError: there is no such template, or a chat template cannot be used at all.
    """
    template = open_template(name, tokenizer)
    end, whose = template.stop.strip(), f"template {template_in_words(name)!r}"
    if isinstance(template, ChatTemplate):
        if not template.stop:
            return f"{whose} writes nothing after an answer, expected an end of turn"
        marks = [mark for mark in dict.fromkeys((end, *_BARRED.findall(template.fixed))) if SPECIAL.fullmatch(mark)]
        lacking = next((mark for mark in marks if not is_one_token(mark, tokenizer)), "")
    else:
        lacking = lacking_end_of_turn(name, tokenizer)
    if not lacking:
        return ""
    ids = known_ids(lacking, tokenizer)
    what = f"{len(ids)} tokens" if len(ids) != 1 else f"its unknown token ({ids[0]})"
    does = "ends a turn with" if lacking == end else "writes"
    return f"{whose} {does} {lacking}, which the tokenizer reads as {what}, expected one special token"


def lacking_end_of_turn(template: str, tokenizer: Tokenizer) -> str:
    """A template's end of turn where that is a special token which the tokenizer does not have, else ""."""
    end = get_template(template).end.strip()
    return end if re.fullmatch(r"<[^<>\s]+>", end) and not is_one_token(end, tokenizer) else ""


def fitting_templates(tokenizer: Tokenizer) -> list[str]:
    """Templates whose end of turn is a special token that the tokenizer has."""
    special = {name: template.end.strip() for name, template in TEMPLATES.items() if template.end.strip().startswith("<")}
    return sorted(name for name, end in special.items() if is_one_token(end, tokenizer))


_NO_TOKEN = "<|\uf8ff|>"  # of a private character, so that no tokenizer has it: what this becomes, anything unknown does


def is_one_token(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has these characters as one token of its own."""
    found = known_ids(text, tokenizer)
    return len(found) == 1 and found != known_ids(_NO_TOKEN, tokenizer)


def known_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids; none where the tokenizer has no word for it."""
    try:
        return tokenizer.encode(text)[0].tolist()
    except ValueError:
        return []


def tokenizer_files(tokenizer: Tokenizer) -> str:
    """Where the tokenizer's files lie, "" for one that has none."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return str(tokenizer.folder)
    return str(tokenizer.file.parent) if isinstance(tokenizer, HFTokenizer) else ""
