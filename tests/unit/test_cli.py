"""How a verb ends: a user's mistake, a full disk and too little memory in one line, a defect with its traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from deepstack_jax import cli
from deepstack_jax.config import Config, ConfigError

HEAD = "import errno, sys; from deepstack_jax import cli; sys.argv = ['verb']"
EXHAUSTED = "RESOURCE_EXHAUSTED: "


def ending(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A verb whose main is `body`."""
    lines = [HEAD, "def main():", *(f"    {line}" for line in body.splitlines()), "cli.run(main, '')"]
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', 'runs/a/x.json')",
            "cannot write runs/a/x.json: No space",
        ),
        (
            "raise OSError(errno.EIO, 'Input/output error', 'runs/a/metrics.jsonl')",
            "cannot read or write runs/a/metrics.jsonl: Input/output error; run the same command again when that is fixed",
        ),
        ("raise MemoryError", "out of memory: this process was given no more; use a machine with more"),
        ("raise OSError(errno.EDQUOT, 'Disk quota exceeded')", "cannot write: Disk quota exceeded; make room and run the same"),
        (
            "import jax; jax.numpy.zeros(1 << 50, 'int8').block_until_ready()",
            "out of memory: Out of memory allocating 1,125,899.9 G",
        ),
        (
            f"raise ValueError('{EXHAUSTED}Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm.')",
            "out of memory: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm; use a machine with more",
        ),
    ],
)
def test_one_line(body, message):
    done = ending(body)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


NASTY = r"\x1b]0;owned\x07\x9b2J\u202e\ud83d"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (f'raise cli.ConfigError("id {NASTY} is bad; mend it")', 1),
        (f'raise RuntimeError("a defect {NASTY}")', 1),
        (f'print("answer {NASTY}"); return 0', 0),
        (f'print("note {NASTY}", file=sys.stderr); return 0', 0),
        (f'import warnings; warnings.warn("careful {NASTY}"); return 0', 0),
        (f'import logging; logging.warning("careful %s", "{NASTY}"); return 0', 0),
        (f'from absl import logging; logging.error("careful %s", "{NASTY}"); return 0', 0),
        (f'from deepstack_jax.printing import Console; Console().print("careful {NASTY}"); return 0', 0),
    ],
)
def test_no_way_out_lets_escape_sequences_through(body, code):
    done = ending(body)
    assert done.returncode == code, done.stderr
    said = done.stdout + done.stderr
    assert r"\u001b]0;owned\u0007\u009b2J\u202e\ud83d" in said
    assert not set(said) & set("\x1b\x07\x9b\u202e")


def test_bars_of_other_libraries_still_move():
    done = ending("import sys\nsys.stderr.write('\\r 50% of file')\nsys.stderr.write('\\n\\x1b[A')\nreturn 0")
    assert done.stderr == "\r 50% of file\n\x1b[A".replace("\r", "\n"), "as text mode reads it"


def test_output_that_the_terminal_cannot_encode_is_no_end():
    done = ending("print('caf\\xe9 \\u65e5'); return 0", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 \\u65e5\n")


@pytest.mark.parametrize("uri", ["data:image/png;base64," + "QUJD" * 16_000, "two words " * 9000])
def test_an_error_quotes_little_and_keeps_its_next_move(uri):
    done = ending(f"""raise cli.ConfigError("row 7: image '{uri}' is not a file; give a path")""")
    assert done.stderr.startswith("error: row 7: image '")
    assert done.stderr.endswith("' is not a file; give a path\n")
    assert len(done.stderr) < 400


def test_several_problems_are_a_list():
    done = ending("raise cli.ConfigError('no a: get a', 'no b: get\\n b')")
    assert done.stderr.splitlines()[1:] == ["  no a: get a", "  no b: get b"]
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "body",
    [
        "raise OSError(errno.EBADF, 'Bad file descriptor')",
        "raise RuntimeError('a defect')",
        f"raise ValueError('{EXHAUSTED}Error writing file: No space left on device')",
    ],
)
def test_a_defect_keeps_its_traceback(body):
    done = ending(body)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


TALK = """
from deepstack_jax.printing import Console
import os, warnings
for number in range(2000):
    print("a line", number, flush=True)
    Console().print("a line", number)
    print("an error", file=sys.stderr)
open(os.environ["DONE"], "w").close()
return 0
"""


@pytest.mark.parametrize("how", ["2>&1 | head -1", ">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", "2>&1 | true"])
def test_output_that_nobody_takes_ends_nothing(how, tmp_path):
    lines = [HEAD, "def main():", *(f"    {line}" for line in TALK.strip().splitlines()), "cli.run(main, '')"]
    (tmp_path / "verb.py").write_text("\n".join(lines))
    script = f"set -o pipefail; {sys.executable} {tmp_path}/verb.py {how}"
    environment = os.environ | {"DONE": str(tmp_path / "done"), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", script], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert (tmp_path / "done").exists()
    assert "Traceback" not in done.stderr


@pytest.fixture
def words(tmp_path, monkeypatch):
    """`parse(flags...)` as a verb reads them, in a folder with the faulty configuration files of FILES."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)

    def parse(*words: str) -> Config:
        monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
        monkeypatch.setattr(sys, "argv", ["verb", *words])
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the file before, as ml_collections names it
        cli.parse_flags([cli.CONFIG])
        return cli.parse_config()

    return parse


DEMO = f"--config={cli.find_recipe('demo.py')}"
FILES = {
    "typo.py": "from deepstack_jax.config import default_config\ndef get_config():\n    default_config().train.stepz += 1\n",
    "module.py": "import nosuch\n",
    "syntax.py": "x = 1\ndef get_config(:\n",
    "type.py": "def get_config():\n    raise TypeError('a type')\n",
    "value.py": "def helper():\n    raise ValueError('a value')\ndef get_config():\n    helper()\n",
    "open.py": "def get_config():\n    return open('not-there')\n",
    "number.py": "def get_config():\n    return 3\n",
    "none.py": "def get_config():\n    pass\n",
    "nothing.py": "",
    "phi3.py": "from deepstack_jax.config import default_config as get_config\n",
}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([DEMO, "--config.train.stepz=1"], "unknown key --config.train.stepz; nearest valid name: 'steps'"),
        (
            [DEMO, "--config.train.steps.deep=1"],
            "unknown key --config.train.steps.deep; config.train.steps is a value, ",
        ),
        ([DEMO, "--config.name.x=1"], "unknown key --config.name.x; config.name is a value, which has no keys"),
        ([DEMO, "--config.a.b=1"], "unknown key --config.a; valid names: "),
        ([DEMO, "--config.data.sets.a.repeat=1"], "unknown key --config.data.sets.a.repeat; the names that the file gives"),
        (
            [DEMO, "--config.decoder={}"],
            "--config.decoder is a section; set its keys one by one, as --config.",
        ),
        ([DEMO, "--config.train.steps=abc"], "flag --config.train.steps=abc: invalid literal"),
        (
            [DEMO, "--config.evaluation.batch_size=100000"],
            "config.evaluation.batch_size got 100000, expected a number above 0",
        ),
        ([DEMO, "--confg=1"], "Unknown command line flag 'confg'. Did you mean: config ?"),
        ([DEMO, "x"], "unexpected argument 'x'; flags look like --name=value"),
        (["--config.train.steps=1"], "--config is missing"),
        (["--config=typo.py"], "--config fails at typo.py:3: AttributeError: "),
        (["--config=module.py"], "--config fails at module.py:1: ModuleNotFoundError: No module named 'nosuch'"),
        (["--config=syntax.py"], "--config fails at syntax.py:2: SyntaxError: "),
        (["--config=type.py"], "--config fails at type.py:2: TypeError: a type"),
        (["--config=value.py"], "--config fails at value.py:2: ValueError: a value"),
        (["--config=open.py"], "--config fails at open.py:2: FileNotFoundError: "),
        (["--config=number.py"], "--config: get_config returned 3, expected a ConfigDict"),
        (["--config=nothing.py"], "--config=nothing.py has no function get_config"),
        (
            ["--config=not-there.py"],
            "--config=not-there.py names no readable file; give a path, or a recipe of the package: ",
        ),
        (["--config=not-there.py", "--config.train.steps=1"], "--config=not-there.py names no readable file; give a path"),
        (["--config=llava15.py:pretrian"], "configs/llava15.py:pretrian: 'pretrian' is not known; expected words with commas"),
    ],
)
def test_a_mistake_in_the_flags_or_the_file_is_one_line_that_says_where(given, said, words):
    with pytest.raises(ConfigError) as error:
        words(*given)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_recipe_is_found_by_its_name_and_a_file_in_the_working_directory_comes_first(words, caplog):
    assert words("--config=llava15.py:finetune", "--config.train.steps=7").name == "llava15-7b-finetune"
    assert not caplog.records
    assert words("--config=phi3.py", "--config.train.steps=7").train.steps == 7
    assert "--config=phi3.py is the file in the working directory; the recipe is" in caplog.text


def test_unbuffered_output_is_there_at_once():
    """As the launch scripts have it: a log of a run that is looked at, or killed, would lack its last 8 kB."""
    assert ending("import os; print('said', end=''); os._exit(0)", PYTHONUNBUFFERED="1").stdout == "said"
    body = "import os; print('said', file=sys.stderr); os._exit(0)"
    for unbuffered in ("", "1"):
        assert ending(body, PYTHONUNBUFFERED=unbuffered).stderr == "said\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_workdir_that_the_encoding_cannot_hold_is_said_at_the_start(encoding, tmp_path):
    line = "import sys; name = sys.argv.pop(); from deepstack_jax import cli; "
    line += "cli.run(lambda: print(cli.writable_folder(name, 'workdir')) or 0, '')"
    environment = os.environ | {"LC_ALL": "C" if encoding == "ascii" else "C.UTF-8", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONUTF8": "0" if encoding == "ascii" else "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", line, "l\u00e4uft"], env=environment, cwd=tmp_path, check=False, capture_output=True
    )
    if encoding == "utf-8":
        assert (done.returncode, done.stdout.decode()) == (0, "l\u00e4uft\n")
    else:
        assert done.returncode == 1
        assert done.stderr.startswith(
            b"error: --workdir=l\\udcc3\\udca4uft cannot be written in the encoding of this environment, ascii"
        )
        assert done.stderr.count(b"\n") == 1
        assert list(tmp_path.iterdir()) == []
