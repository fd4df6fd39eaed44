"""Whatever a stranger's data says, it comes out as text: no escape sequence, no markup, no control of direction, and short."""

import io
import json

import pytest
from rich.progress import track
from rich.table import Table
from rich.text import Text

from deepstack_jax.printing import MOST, Console, label, one_line, plural, printable, quote

CLIPBOARD, COLOUR, C1 = "\x1b]52;c;aGk=\x07", "\x1b[31;5m", "\x9b2J"
HOSTILE = f"a{CLIPBOARD}{COLOUR}{C1}\r\x08\x7f\u202eb\u2066c\u2069\u2028\ud83d[bold][link=http://x]d[/bold] :smile:"
FORBIDDEN = {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x202E, 0x2066, 0x2069, 0xD83D)}


def printed(show, *, terminal: bool, width: int = 200) -> str:
    file = io.StringIO()
    show(Console(file=file, force_terminal=terminal, color_system=None, width=width))
    return file.getvalue()


def test_printable_keeps_words_of_every_language_and_writes_controls_as_json_does():
    assert printable("Grüße, 日本語 שלום 👩‍👧\n\tend") == "Grüße, 日本語 שלום 👩‍👧\n\tend"
    assert printable("\x1b[2J\x9b\u202e\r") == "\\u001b[2J\\u009b\\u202e\\u000d"
    value = {"answer": HOSTILE}
    assert json.loads(printable(json.dumps(value, ensure_ascii=False))) == value, "a JSON line says the same as before"


def table_of(text):
    table = Table(text, "n", title=text)
    table.add_row(text, Text(text))
    return table


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "show",
    [
        lambda console: console.print(HOSTILE),
        lambda console: console.print(HOSTILE, style="bold", soft_wrap=True),
        lambda console: console.print(table_of(HOSTILE)),
        lambda console: console.print(Text(HOSTILE)),
        lambda console: list(track([1], console=console, description=Text(HOSTILE).plain.replace("[", "\\["))),
    ],
    ids=["line", "soft", "table", "text", "bar"],
)
def test_the_console_lets_nothing_through(show, terminal):
    said = printed(show, terminal=terminal)
    lines = [part for part in said.split("\x1b") if terminal] or [said]  # rich's own begin with an escape
    assert "]52;" not in "".join(lines) or "\\u001b]52;" in said
    assert "\x1b]" not in said
    assert "\x1b[31" not in said
    assert not FORBIDDEN - {"\x1b", "\r"} & set(said)
    if not terminal:
        assert not FORBIDDEN & set(said)


def test_markup_and_emoji_in_data_are_data():
    said = printed(lambda console: console.print("[bold]x[/bold] [/nothing] [link=http://y]z[/link] :smile:"), terminal=True)
    assert said == "[bold]x[/bold] [/nothing] [link=http://y]z[/link] :smile:\n"


def test_titles_are_not_broken_and_cells_are_folded():
    path = "/data/" + "very-long-folder/" * 6 + "rows.json"
    said = printed(lambda console: console.print(table_of(path)), terminal=False, width=60)
    assert said.splitlines()[0] == path
    assert "…" not in said
    assert all(len(line) <= 60 for line in said.splitlines()[1:])


def test_the_same_table_can_be_printed_twice():
    table = table_of("name")
    assert len({printed(lambda console: console.print(table), terminal=False) for _ in range(2)}) == 1
    assert table.title == "name"


DATA_URI = "data:image/png;base64," + "QUJD" * 20_000


@pytest.mark.parametrize(
    "data",
    [
        DATA_URI,
        repr("many words " * 5000),
        repr({"key " * 30: "value " * 3000}),
        json.dumps(["x" * 4000] * 10),
        list(range(9000)),
    ],
    ids=["uri", "words", "dict", "list", "numbers"],
)
def test_a_line_carries_little_of_the_data_and_all_of_our_words(data):
    ending = " is not a file; expected a path below the run's image root; fix the row's 'image' key"
    line = one_line(f"row 3: the image {data}{ending}")
    assert line.startswith("row 3: the image ")
    assert line.endswith(ending)
    assert len(line) <= 110 + MOST + 20
    assert "..." in line


def test_short_messages_are_left_alone_but_for_their_line_ends():
    message = "the run's \x1b value 'a b' is\nnot there; give the run's own"
    assert one_line(message) == "the run's \\u001b value 'a b' is not there; give the run's own"


def test_a_name_stays_on_its_line():
    assert label("id\nerror: all is lost\t1") == "id\\nerror: all is lost\\t1"
    assert len(label("x" * 10**6)) == MOST // 2


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


VALUES = {
    "digits": 10**5000,
    "text": "x" * 10**7,
    "deep": deep(100_000),
    "long": list(range(10**6)),
    "dict": {f"{i}": "y" * 999 for i in range(99)},
    "hostile": HOSTILE,
    "object": object(),
}


@pytest.mark.parametrize("name", VALUES)
def test_any_value_is_quoted_briefly(name):
    said = quote(VALUES[name])
    assert 0 < len(said) <= MOST // 2
    assert not FORBIDDEN & set(said)
    assert "\n" not in said


def test_plurals():
    said = [plural(1, "image"), plural(2000, "image"), plural(0, "reply", "replies")]
    assert said == ["1 image", "2,000 images", "0 replies"]
