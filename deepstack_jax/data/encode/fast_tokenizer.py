"""Any tokenizer.json, through the tokenizers library."""

import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from deepstack_jax.data.encode.tokenizer_files import (
    LITERALS,
    SPECIAL_ROLES,
    TokenizerError,
    as_tokens,
    read_settings,
    reading,
    special_tokens,
)

_HIDING = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # characters that Unicode keeps out of texts
_UNHIDE = {ord(character): "\ufffd" for character in _HIDING}


class HFTokenizer:
    """A fast tokenizer from tokenizer.json (Llama 3, Qwen); `path` is the file or its folder.

    BOS is what the file's own post-processor puts first, whatever tokenizer_config.json says, as in transformers. What it puts
    after a text (EOS) is left out: a template writes its own ends of turn. EOS and padding come from tokenizer_config.json, or
    where that is silent are the first known name in the vocabulary.
    """

    def __init__(self, path: str | Path):
        self.file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not self.file.is_file():
            raise FileNotFoundError(f"no {self.file}; expected tokenizer.json or a folder that holds it")
        self._config = read_settings(self.file.parent / "tokenizer_config.json")
        with reading(self.file):
            self._fast = _fast(self.file.read_text("utf-8"))
            self._read()

    def _read(self) -> None:
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)  # not their number: ids may have gaps
        self.bos_id = self._bos_id(vocabulary)
        self.vocab_size = max(self.vocab_size, 1 + (self.bos_id or 0))  # a post-processor may name any number
        self.eos_id = self._role("eos_token", "</s>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
        self.pad_id = self._role("pad_token", "<unk>", "<pad>", "<|endoftext|>", "</s>", "<|end_of_text|>")
        self.special_tokens = special_tokens(self._config)
        added = self._fast.get_added_tokens_decoder()
        self._swallowing = {id: token.content for id, token in added.items() if token.lstrip or token.rstrip}
        names = [token["content"] for role in SPECIAL_ROLES for token in as_tokens(self._config.get(role))]
        names += [token.content for token in added.values() if token.special or token.content in LITERALS]
        ids = {vocabulary[name] for name in names if name in vocabulary} | {self.bos_id, self.eos_id, self.pad_id} - {None}
        contents = {id: self._fast.id_to_token(id) or "" for id in sorted(ids)}
        self.control_tokens = {id: content for id, content in contents.items() if len(content) > 2}  # shorter ones are words

    def __reduce__(self):
        return (HFTokenizer, (str(self.file),))

    def _bos_id(self, vocabulary: Mapping[str, int]) -> int | None:
        for text in ("a", *itertools.islice(vocabulary, 1000)):  # the first that the tokenizer has a token for
            try:
                found, bare = self._fast.encode(text), self._fast.encode(text, add_special_tokens=False).ids
            except Exception:  # no id for it, nor one for what is unknown
                continue
            places = [place for place, sequence in enumerate(found.sequence_ids) if sequence is not None]
            if places and bare:
                front, rest = found.ids[: places[0]], found.ids[places[0] :]
                if len(front) > 1 or rest[: len(bare)] != bare:  # or it repeats the text
                    raise TokenizerError(
                        f"{self.file}: adds {front[:8]} before a text; expected at most a BOS; edit its post_processor"
                    )
                return front[0] if front else None
        raise TokenizerError(f"{self.file}: reads every text as nothing; it is not a tokenizer for words, download it again")

    def _role(self, role: str, *names: str) -> int:
        for name in (*(token["content"] for token in as_tokens(self._config.get(role))), *names):
            if (id := self._fast.token_to_id(name)) is not None:
                return id
        raise TokenizerError(
            f"{self.file}: no {role}; expected it in tokenizer_config.json or one of {names} in the vocabulary"
        )

    def encode(self, text: str, plain: Sequence[tuple[int, int]] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Ids i32[n] and character offsets i32[n, 2]."""
        with reading(self.file, "turn a text into tokens"):
            if not plain:
                return self._encoded(self._fast, text)
            text, fast = self._hide(text, plain), self._blind
            return self._encoded(fast, text)

    def _encoded(self, fast: tokenizers.Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = fast.encode(text, add_special_tokens=False)
        ids, offsets = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)
        for at in np.flatnonzero(np.isin(ids, list(self._swallowing))):  # the white space around belongs to others
            start, end = offsets[at].tolist()
            if bare := text[start:end].strip():
                place = text.index(bare, start)
                offsets[at] = place, place + len(bare)
        return ids, offsets

    def decode(self, ids: Iterable[int]) -> str:
        with reading(self.file, "turn tokens into a text"):
            return self._fast.decode([int(id) for id in ids], skip_special_tokens=True)

    @functools.cached_property
    def _codes(self) -> dict[int, str]:
        """A name for every control token that no text holds, as long as its own, so that offsets stay."""
        codes = {}
        for number, (id, content) in enumerate(self.control_tokens.items()):
            digits = [_HIDING[1 + number // 31**place % 31] for place in range(len(content) - 1)]
            codes[id] = _HIDING[0] + "".join(digits)
        return codes

    @functools.cached_property
    def _blind(self) -> tokenizers.Tokenizer:
        """The same tokenizer, with its control tokens under other names: it reads theirs as text."""
        names = {content: self._codes[id] for id, content in self.control_tokens.items()}
        data = json.loads(self.file.read_text("utf-8"))
        for token in data["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = data["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return _fast(json.dumps(data))

    def _hide(self, text: str, plain: Sequence[tuple[int, int]]) -> str:
        """The text with every control token that is not plain under its other name."""
        ids, offsets = self._encoded(self._fast, text)
        text = text.translate(_UNHIDE)
        for id, (start, end) in zip(ids.tolist(), offsets.tolist(), strict=True):
            if id in self._codes and len(self._codes[id]) == end - start and (start, end) not in plain:
                text = text[:start] + self._codes[id] + text[end:]
        return text


def _fast(text: str) -> tokenizers.Tokenizer:
    fast = tokenizers.Tokenizer.from_str(text)
    fast.no_truncation()
    fast.no_padding()
    return fast
