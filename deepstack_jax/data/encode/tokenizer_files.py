"""What both kinds of tokenizer files share: JSON whose nulls mean absent, special tokens in all their forms, errors."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from deepstack_jax.errors import UserError
from deepstack_jax.printing import label

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
LITERALS = {"<s>": 1, "</s>": 2}
_NAMED_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(UserError):
    """A tokenizer that cannot be read or used; one line with its file and the reason."""


@contextmanager
def reading(path: Path, use: str = "be read as a tokenizer") -> Iterator[None]:
    """Whatever a file's content makes the libraries raise becomes a TokenizerError of one line."""
    try:
        yield
    except (TokenizerError, OSError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of the Rust library are not Exceptions
        reason = label(f"{type(error).__name__}: {error}", 200)
        raise TokenizerError(
            f"{path} cannot {use} ({reason}); it is damaged, or newer than tokenizers "
            f"{tokenizers.__version__}: download it again, or upgrade"
        ) from error


def read_settings(file: Path) -> dict[str, Any]:
    """The entries of a JSON object that are not null; none where there is no file."""
    try:
        found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise TokenizerError(f"{file} holds a {type(found).__name__}, expected a JSON object; download it again")
    return _without_nulls(found)


def _without_nulls(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None}


def as_tokens(value: Any) -> list[dict[str, Any]]:
    """Tokens of a config entry, which may be missing, a name, a dict, or a list of these."""
    if isinstance(value, list):
        return [token for entry in value for token in as_tokens(entry)]
    if value is None:
        return []
    token = {"lstrip": False, "rstrip": False, "single_word": False}
    token |= _without_nulls(value) if isinstance(value, dict) else {"content": value}
    if not isinstance(token.get("content"), str) or not token["content"]:
        raise ValueError(f"a special token is {value!r:.80}, expected its text")
    return [token]


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The text of the special tokens in tokenizer_config.json, by its role, as transformers gives them to a template."""
    return {role: as_tokens(settings[role])[0]["content"] for role in _NAMED_ROLES if as_tokens(settings.get(role))}
