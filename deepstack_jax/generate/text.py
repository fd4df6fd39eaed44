"""Tokens of an answer into its text while they come: whole characters only, nothing of a stop string, no white space around."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from deepstack_jax.data.encode.templates import AnyTemplate
from deepstack_jax.data.encode.tokenizer import HALF_CHARACTER, Tokenizer, known_ids, tokenizer_files
from deepstack_jax.weights.open_checkpoint import end_tokens


def end_of_turn(template: AnyTemplate, tokenizer: Tokenizer) -> tuple[list[int], tuple[str, ...]]:
    """Token ids and strings that end an answer: the end of text, and the end of turn that the template teaches.

    An end of turn that is one token is known by its id, one that shows in the text (as "###", whose tokens depend on what
    comes before it) by the text.
    """
    end = template.stop.strip() or template.stop
    ids = [tokenizer.eos_id]
    found = known_ids(end, tokenizer) if end else []
    if len(found) == 1:
        ids = sorted({*ids, *found})
    shows = bool(end) and not (len(found) == 1 and not tokenizer.decode(found))
    return ids, (end,) if shows else ()


def ends_beside(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer by what lies beside the tokenizer's files: generation_config.json or config.json of its model.

    Raises:
      WeightsError: that is damaged.
    """
    folder = tokenizer_files(tokenizer)
    return end_tokens(Path(folder)) if folder else ()


class AnswerText:
    """The text of one answer, growing. What `feed` and `close` return, joined, is `text` in the end.

    Attributes:
      text: all that may be shown so far.
      tokens: how many tokens the answer has, up to the one that completed a stop string.
      stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self.text = ""
        self.stopped = False

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def feed(self, ids: Iterable[int]) -> str:
        """Take further tokens; returns what can be shown of them now."""
        shown = ""
        for id in ids:
            if self.stopped:
                break
            self._ids.append(int(id))
            if self._stops:  # one by one, so that the count of tokens does not depend on how many came at once
                shown += self._show(final=False)
        return shown if self._stops else self._show(final=False)

    def close(self) -> str:
        """The rest, once no token follows."""
        return self._show(final=True)

    def _show(self, *, final: bool) -> str:
        known = [id for id in self._ids if id < self._tokenizer.vocab_size]  # an output layer may be padded beyond
        text = self._tokenizer.decode(known)
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not final:
            text = text.rstrip(HALF_CHARACTER)
            text = text[: len(text) - self._held(text)]
        visible = text.strip()
        new = visible[len(self.text) :]
        self.text += new
        return new

    def _held(self, text: str) -> int:
        """Length of the longest end of the text that may yet become a stop string."""
        begun = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return max(begun, default=0)
