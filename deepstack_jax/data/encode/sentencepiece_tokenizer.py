"""SentencePiece models as LLaMA's, read from tokenizer.model."""

import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

from deepstack_jax.data.encode.tokenizer_files import (
    LITERALS,
    SPECIAL_ROLES,
    TokenizerError,
    as_tokens,
    read_settings,
    reading,
    special_tokens,
)
from deepstack_jax.printing import label

_UNDERLINE = "\u2581"  # sentencepiece writes a space as this character
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


class SentencePieceTokenizer:
    """The slow Hugging Face LlamaTokenizer of transformers 4.39, read from tokenizer.model; upstream trains with that one.

    `folder` holds tokenizer.model, tokenizer_config.json and, in older models, special_tokens_map.json and
    added_tokens.json. `pad_id` is the unknown token, as upstream sets it. A tokenizer class or option whose ids would
    come out wrong is a ValueError.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "tokenizer.model").is_file():
            raise FileNotFoundError(f"no {self.folder}/tokenizer.model; a folder with only tokenizer.json is for HFTokenizer")
        with reading(self.folder):
            self._read()

    def _read(self) -> None:
        config, stored = _llama_config(self.folder)
        self._legacy = config.get("legacy") is not False
        self._prefix = config.get("add_prefix_space") is not False
        self._added = {token["content"]: token | {"id": id} for id, token in stored.items()}
        self._pieces = _processor(self.folder / "tokenizer.model", dummy_prefix=self._legacy, added=self._added)
        self.special_tokens = special_tokens(config)
        special = [token for role in SPECIAL_ROLES for token in as_tokens(config.get(role))]
        self._special = {token["content"]: self._add(token) for token in special}
        self._by_id = {token["id"]: content for content, token in self._added.items()}
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) + ")")
        self._unknown = as_tokens(config["unk_token"])[0]["content"]
        self._unknown_pieces = len(self._encode_piece(self._unknown)[0])
        self.vocab_size = max(self._pieces.GetPieceSize(), 1 + max(self._by_id))
        bos = self._special[as_tokens(config["bos_token"])[0]["content"]]
        self.bos_id = None if config.get("add_bos_token") is False else bos
        self.eos_id = self._special[as_tokens(config["eos_token"])[0]["content"]]
        self.pad_id = self._special[self._unknown]
        self.control_tokens = {
            token["id"]: content
            for content, token in self._added.items()
            if token.get("special") or content in (*self._special, *LITERALS)
        }

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

    def encode(self, text: str, plain: Sequence[tuple[int, int]] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Ids i32[n] and character offsets i32[n, 2]."""
        shift = 0
        if not self._legacy and text:
            shift = len(_UNDERLINE) if self._prefix else 0
            text = _UNDERLINE[:shift] + text.replace(_UNDERLINE, " ")
        ids, spans = list[int](), list[tuple[int, int]]()
        with reading(self.folder, "turn a text into tokens"):
            for part, start, added in self._parts(text, {(first + shift, last + shift) for first, last in plain}):
                if added:
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

    def _parts(self, text: str, plain: set[tuple[int, int]]) -> list[tuple[str, int, bool]]:
        """Added tokens and the text between them, each with its position, after the tokens have swallowed white space."""
        parts, position = [], 0
        for match in [*self._split.finditer(text), None]:
            if match and match.span() in plain:
                continue
            start = match.start() if match else len(text)
            if start > position:
                parts.append((text[position:start], position, False))
            if match:
                parts.append((match[0], start, True))
                position = match.end()
        for i, (part, _, added) in enumerate(parts):
            if not added:
                continue
            if self._added[part]["rstrip"] and i + 1 < len(parts):
                right, start, kind = parts[i + 1]
                parts[i + 1] = (right.lstrip(), start + len(right) - len(right.lstrip()), kind)
            if self._added[part]["lstrip"] and i:
                left, start, kind = parts[i - 1]
                parts[i - 1] = (left.rstrip(), start, kind)
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
        """Text without special tokens; added tokens that are not special are set apart, with spaces around them."""
        skip, texts, run = set(self._special.values()), [], []
        with reading(self.folder, "turn tokens into a text"):
            for id in [*map(int, ids), None]:
                if id in skip or (id is not None and id not in self._by_id and id >= self._pieces.GetPieceSize()):
                    continue  # special, or a gap between pieces and added tokens
                if id is not None and id not in self._by_id:
                    run.append(self._pieces.IdToPiece(id))
                    continue
                if run and self._prefix:
                    run[0] = run[0].removeprefix(_UNDERLINE)
                texts += [text for text in [self._pieces.DecodePieces(run)] if text] if run else []
                texts += [] if id is None else [self._by_id[id]]
                run = []
        return " ".join(texts)


def _processor(model_file: Path, *, dummy_prefix: bool, added: Iterable[str]) -> sentencepiece.SentencePieceProcessor:
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    except DecodeError as error:
        raise TokenizerError(f"{model_file} is not a sentencepiece model: {label(error)}; download it again") from error
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.add_dummy_prefix and dummy_prefix
    added = set(added)
    for piece in model.pieces:  # added tokens are cut out of the text before; what of them is left there is to be read as text
        if piece.type == piece.USER_DEFINED and piece.piece in added:
            piece.type = piece.CONTROL
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except RuntimeError as error:  # its own way of saying that pieces are missing
        raise TokenizerError(f"{model_file} is not a whole sentencepiece model: {label(error)}; download it again") from error


def _llama_config(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Tokenizer settings, and the added tokens by id, from the new form of the folder or the old one."""
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= read_settings(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        stored = {int(id): as_tokens(token)[0] for id, token in config["added_tokens_decoder"].items()}
    else:
        config |= read_settings(folder / "special_tokens_map.json")
        flags = {token["content"]: token for role in SPECIAL_ROLES for token in as_tokens(config.get(role))}
        added = read_settings(folder / "added_tokens.json")
        stored = {operator.index(id): flags.get(content, as_tokens(content)[0]) for content, id in added.items()}
    if wrong := [id for id in stored if id < 0]:
        raise TokenizerError(f"{folder}: an added token has the id {wrong[0]}, expected 0 or more; download it again")
    name = config.get("tokenizer_class", "LlamaTokenizer")
    if name not in _LLAMA_CLASSES:
        raise TokenizerError(
            f"{folder}: tokenizer_class is {label(name)!r}, expected one of {_LLAMA_CLASSES}; use its tokenizer.json"
        )
    if config.get("add_eos_token") or any(token["single_word"] for token in stored.values()):
        raise TokenizerError(f"{folder}: add_eos_token and single_word tokens are not supported; set them to false")
    return config, stored
