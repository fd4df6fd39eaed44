"""What goes out to a reader: text that may hold a stranger's data, made harmless and kept short, whatever it says.

Escape sequences in an id, a file name or an answer could move the cursor, retitle the window or write to the clipboard of
whoever looks at a log; controls of the text's direction make it read as what it is not.
"""

import io
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any, BinaryIO, TextIO, cast

import rich.console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

MOST = 300  # characters of somebody's data in one line
# C0 but for tab and line end, DEL, C1, marks and controls of direction, what some take for line ends, half surrogates.
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")
# What reads as data, not as our words: a quotation, a list, and anything long without a space in it.
_LONG = re.compile(
    r"""(?<!\w)'(?:[^'\\]|\\.){100,}'(?!\w)|(?<!\w)"(?:[^"\\]|\\.){100,}"(?!\w)"""
    r"""|[\[{][^][{}]{100,}[]}]|\(-?\d[^()]{100,}\)|\S{100,}""",
    re.DOTALL,
)
_LINE = 2000  # no line of ours comes near to it
_BAR = re.compile(r"(?:\r|\n|\x1b\[A)+|\r[^\r\n\x1b]*")  # all that the progress bars of other libraries write


REDACTED = "***"
"""In place of what only the user's command should hold."""

# These three take time in proportion to the text, whatever is in it: no part of them can begin again within its own match.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}://(?:[^\s@/?#<>,]*@)?[^\s'\"<>]+")  # a password may hold quotes
# A name and a password, which may hold slashes; in place of the colon's port.
_PASSWORD = re.compile(r"[^/?#:]*:(?!\d{1,5}(?:[/?#]|$))[^?#]*@")
_ARGUMENT = re.compile(r"([?&;#])([^=?&;#]*)=[^&;#]+")
# Of requests signed by Amazon, Google and Azure all that changes from one signature to the next.
_SIGNED = re.compile(
    r".*(?:sig|token|key|secret|pass|pwd|auth|cred|hmac|jwt|session|policy).*|x-(?:amz|goog)-.*|awsaccesskeyid|googleaccessid"
    r"|expires|s[eptrvi]|sk[a-z]+|spr|code",
    re.IGNORECASE,
)
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # where CONTAINER@ACCOUNT is an address


def redacted(value: Any) -> Any:
    """The value with what proves who somebody is taken out of every URL in it: names, passwords, tokens, signatures.

    Args:
      value: a text, or lists, tuples and dicts of texts and other things; keys of dicts too.
    """
    if isinstance(value, str):
        return _URL.sub(_without_credentials, value) if "://" in value else value
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(redacted, value)) if isinstance(value, tuple) else list(map(redacted, value))
    return value


def _without_credentials(url: re.Match[str]) -> str:
    scheme, rest = url[0].split("://", 1)
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    password = _PASSWORD.match(rest)
    end = authority.rfind("@") if "@" in authority else password.end() - 1 if password else -1
    if end >= 0 and (":" in rest[:end] or scheme.lower() not in _CONTAINERS):
        rest = REDACTED + rest[end:]
    return f"{scheme}://" + _ARGUMENT.sub(
        lambda one: f"{one[1]}{one[2]}={REDACTED}" if _SIGNED.fullmatch(one[2]) else one[0], rest
    )


def printable(text: object) -> str:
    r"""The text with everything that a terminal or browser would obey written as `\u001b`, as JSON does; its lines stay."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))


def label(text: object, most: int = MOST // 2) -> str:
    """A name or a file's words within a line: on one line, and cut in the middle where longer than `most`."""
    return cut(printable(cut(redacted(str(text)), 2 * most)).replace("\n", "\\n").replace("\t", "\\t"), most)


def quote(value: object) -> str:
    """A value as Python writes it, for a message: of what is long, deep or many the beginning and the end."""
    try:
        return label(_REPR.repr(value))
    except ValueError:  # an int of more digits than Python converts
        return f"a huge {type(value).__name__}"


def one_line(message: str) -> str:
    """A message as a line in which the parts that are data take MOST characters at most; our own words stay whole."""
    line = " ".join(printable(cut(redacted(message), 10 * _LINE)).split())
    long = [len(found) for found in _LONG.findall(line)]
    if sum(long) > MOST:
        each = max(20, MOST // len(long))
        line = _LONG.sub(lambda found: cut(found[0], each), line)
    return cut(line, _LINE)


def cut(text: str, most: int = MOST) -> str:
    """The beginning and the end of what is longer than `most`."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[: most - 3 - half]}...{text[len(text) - half :]}"


class _Repr(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(redacted(x), level)


_REPR = _Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = MOST // 3
_REPR.maxlevel = 3


def plural(count: int, noun: str, many: str = "") -> str:
    """`1 image`, `2,000 images`."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def some(names: Sequence[str], most: int = 8) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Console(rich.console.Console):
    """Rich's, which takes no text for markup and lets no control character through, tables and bars included.

    The title of a table has a line of its own, so that no path in it is broken, and long cells are folded, not cut.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich's."""
        if len(objects) == 1 and isinstance(objects[0], Table):
            table = copy(objects[0])
            table.columns = [copy(column) for column in table.columns]
            for column in table.columns:
                column.overflow = "fold"
            if table.title:
                super().print(Text(label(table.title, 1000), style="table.title"), soft_wrap=True)
            table.title, objects = None, (table,)
        super().print(*objects, **how)

    def render_str(self, text: str, **how: Any) -> Text:
        """As rich's, here so that the widths of cells are those of what is printed."""
        return super().render_str(printable(redacted(text)), **how)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """As rich's; what comes as `Text` has not passed `render_str`."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


class _Guarded:
    """A stream without control characters but for line ends and tabs; rich, which has its own, writes past it."""

    def __init__(self, stream: TextIO, *, bars: bool) -> None:
        self.rich_proxied_file = stream  # where rich's Console looks
        self._bars = bars  # the stream of errors and logs: what is said on the other, as answers, is not ours to change

    def write(self, text: str) -> int:
        if not (self._bars and _BAR.fullmatch(text)):
            text = printable((redacted(text) if self._bars else text).replace("\r\n", "\n"))
        return self.rich_proxied_file.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


class _Lasting(io.FileIO):
    """What cannot be written is dropped: a reader that has gone, or a full disk, is not a reason to end a run."""

    failed = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)  # None of a pipe that takes nothing at once
        except OSError as error:
            if not self.failed and self.fileno() == 1:
                self.failed = True
                print(
                    f"warning: the output cannot be written any more ({error.strerror}); this goes on without it",
                    file=sys.stderr,
                )
            return len(data)


def guard_streams() -> None:
    """From here on nothing that this process prints, by whatever way, controls the terminal, or fails.

    Neither for its encoding, nor because nobody reads it any more.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed from the start: the next file that is opened would be taken for it
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        stream = getattr(sys, name)
        if name == "stdin" or isinstance(stream, _Guarded):
            continue
        if stream is None:
            stream = io.TextIOWrapper(io.FileIO(os.devnull, "w"))
        elif type(stream) is io.TextIOWrapper:  # and not what a test has put there
            raw, at_once = _Lasting(stream.fileno(), "w", closefd=False), stream.write_through  # with PYTHONUNBUFFERED=1
            buffer = cast(BinaryIO, raw if at_once else io.BufferedWriter(raw))
            lines = stream.line_buffering
            stream = io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=lines, write_through=at_once)
        setattr(sys, name, _Guarded(stream, bars=name == "stderr"))
