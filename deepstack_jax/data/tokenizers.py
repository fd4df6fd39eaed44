"""Tokenizers: text to token ids with character offsets, and back.

SentencePiece models as LLaMA's, any tokenizer.json, and two without files: bytes and words.
"""

import collections
import difflib
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

_UNDERLINE = "\u2581"  # sentencepiece writes a space as this character
_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
_LITERALS = {"<s>": 1, "</s>": 2}
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


class Tokenizer(Protocol):
    """What the data pipeline and generation need of a tokenizer.

    `encode` gives ids i32[n] without BOS, and offsets i32[n, 2]: the half-open character span of `text` behind each
    token, empty for a token that stands for no character (the space that sentencepiece puts in front). `bos_id` is None
    where the model's tokenizer adds none. `decode` leaves special tokens out.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class SentencePieceTokenizer:
    """The slow Hugging Face LlamaTokenizer of transformers 4.39, read from tokenizer.model; upstream trains with that one.

    `folder` holds tokenizer.model, tokenizer_config.json and, in older models, special_tokens_map.json and
    added_tokens.json. `pad_id` is the unknown token, as upstream sets it. A tokenizer class or option whose ids would
    come out wrong is a ValueError.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        model_file = self.folder / "tokenizer.model"
        if not model_file.is_file():
            raise FileNotFoundError(f"no {model_file}; a folder with only tokenizer.json is for HFTokenizer")
        config, stored = _llama_config(self.folder)
        self._legacy = config.get("legacy") is not False
        self._prefix = config.get("add_prefix_space") is not False
        self._pieces = _processor(model_file, dummy_prefix=self._legacy)
        self._added = {token["content"]: token | {"id": id} for id, token in stored.items()}
        special = [token for role in _SPECIAL_ROLES for token in _as_tokens(config.get(role))]
        self._special = {token["content"]: self._add(token) for token in special}
        self._by_id = {token["id"]: content for content, token in self._added.items()}
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) + ")")
        self._unknown = _as_tokens(config["unk_token"])[0]["content"]
        self._unknown_pieces = len(self._encode_piece(self._unknown)[0])
        self.vocab_size = max(self._pieces.GetPieceSize(), 1 + max(self._by_id))
        bos = self._special[_as_tokens(config["bos_token"])[0]["content"]]
        self.bos_id = None if config.get("add_bos_token") is False else bos
        self.eos_id = self._special[_as_tokens(config["eos_token"])[0]["content"]]
        self.pad_id = self._special[self._unknown]

    def __reduce__(self):
        return (SentencePieceTokenizer, (str(self.folder),))

    def _add(self, token: dict[str, Any]) -> int:
        """Id of a special token, which also becomes one that is cut out of the text."""
        content = token["content"]
        if content not in self._added:
            id = self._pieces.PieceToId(content)
            if self._pieces.IdToPiece(id) != content:
                id = max([self._pieces.GetPieceSize() - 1, *(added["id"] for added in self._added.values())]) + 1
            self._added[content] = token | {"id": id}
        return self._added[content]["id"]

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids i32[n] and character offsets i32[n, 2]."""
        shift = 0
        if not self._legacy and text:
            shift = len(_UNDERLINE) if self._prefix else 0
            text = _UNDERLINE[:shift] + text.replace(_UNDERLINE, " ")
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for part, start in self._parts(text):
            if part in self._added:
                ids.append(self._added[part]["id"])
                spans.append((start, start + len(part)))
            else:
                part_ids, part_spans = self._encode_part(part)
                ids += part_ids
                spans += [(start + a, start + b) for a, b in part_spans]
        offsets = np.maximum(np.array(spans, np.int32).reshape(-1, 2) - np.int32(shift), 0)
        before_special = not self._legacy and len(ids) > 1 and ids[1] in self._special.values()
        first = 1 if before_special and ids[0] == self._pieces.PieceToId(_UNDERLINE) else 0
        return np.array(ids[first:], np.int32), offsets[first:]

    def _parts(self, text: str) -> list[tuple[str, int]]:
        """Added tokens and the text between them, each with its position, after the tokens have swallowed white space."""
        parts, position = [], 0
        for part in self._split.split(text):
            if part:
                parts.append((part, position))
            position += len(part)
        for i, (part, _) in enumerate(parts):
            token = self._added.get(part)
            if token is None:
                continue
            if token["rstrip"] and i + 1 < len(parts):
                right, start = parts[i + 1]
                parts[i + 1] = (right.lstrip(), start + len(right) - len(right.lstrip()))
            if token["lstrip"] and i:
                parts[i - 1] = (parts[i - 1][0].rstrip(), parts[i - 1][1])
        return [part for part in parts if part[0]]

    def _encode_part(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if self._legacy or not text.startswith((_UNDERLINE, " ")):
            return self._encode_piece(text)
        # Some models drop a leading space; upstream shields it with the unknown token's text, whose pieces it cuts off.
        ids, spans = self._encode_piece(self._unknown + text)
        cut, shield = self._unknown_pieces, len(self._unknown)
        return ids[cut:], [(max(a - shield, 0), max(b - shield, 0)) for a, b in spans[cut:]]

    def _encode_piece(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._pieces.Encode(text, out_type="serialized_proto")
        proto = sentencepiece_pb2.SentencePieceText.FromString(encoded)  # pyright: ignore[reportAttributeAccessIssue]
        ids, spans = [piece.id for piece in proto.pieces], [(piece.begin, piece.end) for piece in proto.pieces]
        for i in range(len(ids) - 2, -1, -1):  # of a character written as bytes only the last byte has the span
            if spans[i][0] == spans[i][1] and self._pieces.IsByte(ids[i]):
                spans[i] = spans[i + 1]
        if not text.isascii():  # offsets are in UTF-8 bytes
            utf8 = np.frombuffer(text.encode(), np.uint8)
            character = [*(np.cumsum((utf8 & 0xC0) != 0x80) - 1).tolist(), len(text)]
            spans = [(character[a], character[b]) for a, b in spans]
        return ids, spans

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens; added tokens that are not special stand alone, with spaces around them."""
        skip, texts, run = set(self._special.values()), [], []
        for id in [*map(int, ids), None]:
            if id in skip:
                continue
            if id is not None and id not in self._by_id:
                run.append(self._pieces.IdToPiece(id))
                continue
            if run and self._prefix:
                run[0] = run[0].removeprefix(_UNDERLINE)
            texts += [text for text in [self._pieces.DecodePieces(run)] if text] if run else []
            texts += [] if id is None else [self._by_id[id]]
            run = []
        return " ".join(texts)


def _processor(model_file: Path, *, dummy_prefix: bool) -> sentencepiece.SentencePieceProcessor:
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    except DecodeError as error:
        raise ValueError(f"{model_file} is no sentencepiece model: {error}; download it again") from error
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.add_dummy_prefix and dummy_prefix
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except RuntimeError as error:  # its own way of saying that pieces are missing
        raise ValueError(f"{model_file} is no whole sentencepiece model: {error}; download it again") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); download it again") from error


def _as_tokens(value: Any) -> list[dict[str, Any]]:
    """Tokens of a config entry, which may be missing, a name, a dict, or a list of these."""
    if isinstance(value, list):
        return [token for entry in value for token in _as_tokens(entry)]
    plain = {"lstrip": False, "rstrip": False, "single_word": False}
    return [] if value is None else [plain | ({"content": value} if isinstance(value, str) else value)]


def _llama_config(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Tokenizer settings, and the added tokens by id, from the new form of the folder or the old one."""
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        stored = {int(id): _as_tokens(token)[0] for id, token in config["added_tokens_decoder"].items()}
    else:
        config |= _read_json(folder / "special_tokens_map.json")
        flags = {token["content"]: token for role in _SPECIAL_ROLES for token in _as_tokens(config.get(role))}
        added = _read_json(folder / "added_tokens.json")
        stored = {id: flags.get(content, _as_tokens(content)[0]) for content, id in added.items()}
    name = config.get("tokenizer_class", "LlamaTokenizer")
    if name not in _LLAMA_CLASSES:
        raise ValueError(f"{folder}: tokenizer_class is {name!r}, expected one of {_LLAMA_CLASSES}; use its tokenizer.json")
    if config.get("add_eos_token") or any(token["single_word"] for token in stored.values()):
        raise ValueError(f"{folder}: add_eos_token and single_word tokens are not supported; set them to false")
    return config, stored


class HFTokenizer:
    """A fast tokenizer from tokenizer.json (Llama 3, Qwen, `train_bpe`); `path` is the file or its folder.

    BOS is what the file's own post-processor puts first. EOS and padding come from tokenizer_config.json, or where that
    is silent are the first known name in the vocabulary.
    """

    def __init__(self, path: str | Path):
        self.file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not self.file.is_file():
            raise FileNotFoundError(f"no {self.file}; expected tokenizer.json or a folder that holds it")
        self._fast = tokenizers.Tokenizer.from_file(str(self.file))
        self._fast.no_truncation()
        self._fast.no_padding()
        self.vocab_size = self._fast.get_vocab_size(with_added_tokens=True)
        around = self._fast.encode("").ids
        if len(around) > 1:
            raise ValueError(f"{self.file}: adds {around} to a text; expected at most a BOS; edit its post_processor")
        self.bos_id = around[0] if around else None
        self.eos_id = self._role("eos_token", "</s>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
        self.pad_id = self._role("pad_token", "<unk>", "<pad>", "<|endoftext|>", "</s>", "<|end_of_text|>")

    def __reduce__(self):
        return (HFTokenizer, (str(self.file),))

    def _role(self, role: str, *names: str) -> int:
        config = _read_json(self.file.parent / "tokenizer_config.json")
        for name in (*(token["content"] for token in _as_tokens(config.get(role))), *names):
            if (id := self._fast.token_to_id(name)) is not None:
                return id
        raise ValueError(f"{self.file}: no {role}; expected it in tokenizer_config.json or one of {names} in the vocabulary")

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids i32[n] and character offsets i32[n, 2]."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)

    def decode(self, ids: Iterable[int]) -> str:
        return self._fast.decode([int(id) for id in ids], skip_special_tokens=True)


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> HFTokenizer:
    """Trains a byte-level BPE on `texts` and writes `path`/tokenizer.json; equal texts give an equal file.

    Ids 0, 1, 2 are <pad>, <s>, </s>, recognised anywhere in a text; BOS is added in front. At least 259 ids are needed.
    """
    if vocab_size < 259:
        raise ValueError(f"vocab_size is {vocab_size}; expected at least 259: 256 bytes and 3 special tokens")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    Path(path).mkdir(parents=True, exist_ok=True)
    bpe.save(str(Path(path) / "tokenizer.json"))
    return HFTokenizer(path)


class ByteTokenizer:
    """UTF-8 bytes shifted by three; "<s>" and "</s>" in a text are BOS and EOS. For tests and tiny models: no files."""

    vocab_size, pad_id, bos_id, eos_id = 259, 0, 1, 2

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids i32[n] and character offsets i32[n, 2]; every byte of a character carries the character's span."""
        ids, spans, position = [], [], 0
        for part in re.split("(</?s>)", text):
            if part in _LITERALS:
                ids.append([_LITERALS[part]])
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
    """A closed vocabulary: id 3 + i is `words[i]`, and white space separates words. There is no BOS.

    Raises:
      ValueError: a word is repeated, empty, or holds white space; or a text holds an unknown word.
    """

    pad_id, bos_id, eos_id = 0, None, 2

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.vocab_size = 3 + len(self.words)
        self._ids = {word: 3 + i for i, word in enumerate(self.words)} | _LITERALS
        counts = collections.Counter(self.words)
        bad = [word for word, n in counts.items() if n > 1 or word.split() != [word] or re.search("</?s>", word)]
        if bad or not self.words:
            raise ValueError(f"words: got {bad[:5] or 'none'}; expected distinct words without white space, <s> and </s>")

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids i32[n] and character offsets i32[n, 2]; "<s>" and "</s>" are recognised glued to a word too."""
        found = list(re.finditer(r"</?s>|\S+?(?=</?s>|\s|$)", text))
        for match in found:
            if match[0] not in self._ids:
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
    run = _read_json(path / "config.json").get("data")
    if isinstance(run, dict) and run.get("tokenizer"):
        return load_tokenizer(run["tokenizer"])
    raise FileNotFoundError(
        f"tokenizer {spec!r}: neither {path / 'tokenizer.model'} nor {path / 'tokenizer.json'} exists; "
        f"expected 'bytes', 'words:...', 'words:@file' or a folder with one of these"
    )
