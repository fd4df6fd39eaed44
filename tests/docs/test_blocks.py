"""Every block of code in README, CONTRIBUTING, SECURITY and docs/ is run as it is written; one that no rule covers fails.

Shell blocks run in bash, document by document, in a scratch folder that looks like a clone. Programs are stubs that note how
they were called, launch scripts run dry, and every verb that is called reads its flags and builds its configuration. What
`test_runs.py` has the inputs for is run in full there.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deepstack_jax.config import build_config, config_from_weights
from deepstack_jax.plan.topology import SLICES
from tests.docs.blocks import (
    DOCUMENTS,
    FENCE,
    KNOWN,
    OTHERS,
    REPOSITORY,
    Block,
    Call,
    blocks,
    commands_of_console,
    of_text,
    run_shell,
    scratch_folder,
    unfenced,
)
from tests.docs.conftest import Runner
from tests.forks import VERBS

LANGUAGES = ("sh", "console", "python", "json", "text")
BLOCKS = blocks()
SHELL = {name: [block for block in BLOCKS if block.document == name and block.language == "sh"] for name in DOCUMENTS}


def named(*languages: str) -> list:
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.language in languages or not languages]


@pytest.mark.parametrize("block", named())
def test_every_block_says_what_it_is(block):
    """So that the tests below cover it: a command in a block of text is one that nobody runs."""
    assert block.language in LANGUAGES, f"{block.name}: ```{block.language} is none of {LANGUAGES}; this file runs those"
    if block.language in ("text", "json"):
        assert not re.search(r"^\s*(\$ |python|make |pip |launch/)", block.text, re.MULTILINE), block.name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_command_stands_outside_a_block(document):
    assert unfenced((REPOSITORY / document).read_text()) == []


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if SHELL[document]])
def test_shell_blocks_run_as_they_are_written(document, tmp_path, runner):
    done, calls = run_shell(SHELL[document], scratch_folder(tmp_path / "clone"))
    assert done.returncode == 0, done.stderr
    assert {call.block for call in calls} == {block.name for block in SHELL[document]}, "a block that calls nothing"
    for call in calls:
        check(call, tmp_path / "clone", runner)


@pytest.mark.parametrize("block", named("console"))
def test_console_blocks_call_verbs_with_flags_that_they_have(block, tmp_path, runner):
    commands = [command for command, _, _ in commands_of_console(block)]
    assert commands, block.name
    as_shell = Block(block.document, block.line, "sh", "\n".join(commands))
    done, calls = run_shell([as_shell], scratch_folder(tmp_path / "clone"))
    assert done.returncode == 0, done.stderr
    assert len(calls) == len(commands)
    for call in calls:
        check(call, tmp_path / "clone", runner)


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_a_verbs_help_have_flags_that_it_has(verb, runner):
    room = REPOSITORY / "deepstack_jax" / verb
    text = (room / "__main__.py" if room.is_dir() else room.with_suffix(".py")).read_text()
    found = re.findall(rf"^  (?:echo .* \| )?python -m (deepstack_jax\.{verb} .*(?:\\\n.*)*)", text, re.MULTILINE)
    assert found, verb
    for example in found:
        words = shlex.split(example.replace("\\\n", " "), comments=True)
        check_verb(words[0], words[1:], REPOSITORY, {}, runner)


ASKING = "import openai"  # a server, which `test_serve.py` starts


@pytest.mark.parametrize("block", [param for param in named("python") if ASKING not in param.values[0].text])
def test_python_blocks_use_names_that_there_are(block):
    """Those that talk of `config` build a valid one; the others use the public names, and show what they say they show."""
    tree = ast.parse(block.text)
    if "config" in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        from configs.receipts import get_config

        config = get_config()
        exec(compile(tree, block.name, "exec"), {"config": config})
        assert build_config(config) != build_config(get_config()), "a block that changes nothing"
        return
    import deepstack_jax as dsx

    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "dsx"}
    assert used
    assert used <= set(dsx.__all__)
    for line in block.text.splitlines():
        shows = re.search(r"  # [\d'\[(]", line)
        assert not shows or line.startswith("print("), f"{block.name}: {line} prints nothing"


@pytest.mark.parametrize("block", named("json"))
def test_json_blocks_are_rows_that_are_read(block, tmp_path):
    from deepstack_jax.data.open import open_files

    (tmp_path / "train.json").write_text(block.text)
    source = open_files(str(tmp_path / "train.json"), str(tmp_path))
    assert len(source) == len(json.loads(block.text))
    assert [message.role for message in source[0].messages] == ["human", "gpt"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_links_within_the_text_lead_somewhere(document):
    """`make target`, `python -m module --flag`, `launch/script.sh verb`, and links with the headings that they point to."""
    text = FENCE.sub("", (REPOSITORY / document).read_text())
    for words in (shlex.split(found) for found in re.findall(r"`((?:make|python -m|launch/\w)[^`]*)`", text)):
        if words[0] == "make":
            check_make(words[1:], document)
        elif words[0] == "python":
            check_python(words[1:], REPOSITORY, {}, lambda **_: {"code": 0}, document)
        else:
            assert (REPOSITORY / words[0]).is_file(), f"{document}: {words[0]}"
    for target, heading in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text):
        file = ((REPOSITORY / document).parent / target) if target else REPOSITORY / document
        assert file.exists(), f"{document} links to {target}, which is not there"
        if heading:
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, f"{document} links to #{heading} of {file.name}; headings: {sorted(slugs)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_keys_of_the_configuration_that_the_text_names_are_there(document):
    known = config_from_weights().to_dict()  # with the keys of every architecture
    sections = "|".join(name for name, value in known.items() if isinstance(value, dict))
    text = FENCE.sub("", (REPOSITORY / document).read_text())
    for key in re.findall(rf"`(?:--)?(?:config\.)?((?:{sections})\.[\w.]+)(?:=[^`]*)?`", text):
        section, name, *_ = key.split(".")
        module = (REPOSITORY / "deepstack_jax" / section / f"{name}.py").is_file()
        if not module and name not in ("json", "jsonl", "ndjson", "parquet"):  # a file that is called train
            value = known
            for part in key.split("."):
                assert part in value, f"{document}: {key}: {part} is none of {sorted(value)}"
                value = value[part]
                if not isinstance(value, dict) or part in ("sets", "groups"):  # whose names are anybody's
                    break


def check(call: Call, folder: Path, runner: Runner) -> None:
    """What can be known of a call without running it: that its flags, files, targets and extras are there."""
    name, *words = call.words
    place = f"{call.block}: {shlex.join(call.words)}"
    if name.startswith("python"):
        check_python(words, folder / call.folder, call.variables, runner, place)
    elif name.startswith("launch/") or name == "sbatch":  # it ran dry; what trains is told behind --
        if "--" in words:
            check_verb("deepstack_jax.train", words[words.index("--") + 1 :], REPOSITORY, {}, runner)
    elif name == "make":
        check_make(words, place)
    elif name in ("pip", "uv"):
        check_install(words, place)
    elif name == "hf":
        assert words[0] == "download", place
        assert {word for word in words if word.startswith("--")} <= options_of_hf(), place
    elif name == "docker":
        named_files = [word.split("=", 1)[1] for word in words if word.startswith("--file=")]
        assert all((REPOSITORY / file).is_file() for file in named_files), place
    else:
        assert name in OTHERS, f"{place}: no rule for {name}; add one here, or its name to OTHERS of blocks.py; known: {KNOWN}"


def check_make(words: list[str], place: str) -> None:
    text = (REPOSITORY / "Makefile").read_text()
    for variable in (word.split("=")[0] for word in words if "=" in word):
        assert f"$({variable})" in text, f"{place}: the Makefile has no variable {variable}"
    targets = [word for word in words if "=" not in word] or ["help"]
    done = subprocess.run(["make", "--dry-run", *targets], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{place}: {done.stderr}"


def check_python(words: list[str], folder: Path, variables: dict[str, str], runner: Runner, place: str) -> None:
    if words[0] == "-c":
        done = runner(code=words[1], folder=str(folder), variables=variables)
        assert done["code"] == 0, f"{place}: {done['err']}"
        return
    assert words[0] == "-m", place
    module, *rest = words[1:]
    if module.startswith("deepstack_jax."):
        check_verb(module, rest, folder, variables, runner)
    elif module.startswith("benchmarks."):
        script = REPOSITORY / module.replace(".", "/")
        text = (script / "__main__.py" if script.is_dir() else script.with_suffix(".py")).read_text()
        assert all(word.split("=")[0] in text for word in rest if word.startswith("--")), place
    else:
        assert module in ("venv", "lmms_eval"), place  # `test_lmms_eval.py` runs the latter, where it is installed


def check_verb(module: str, words: list[str], folder: Path, variables: dict[str, str], runner: Runner) -> None:
    done = runner(module=module, arguments=words, folder=str(folder), variables=variables, flags_only=True)
    assert done["code"] == 0, f"{module} {shlex.join(words)}: {done['err']}"
    for machine in (word.split("=", 1)[1] for word in words if word.startswith("--topology=")):
        family = machine.split(":")[0]
        assert family in ("gpu", "here") or machine.partition(":")[2] in SLICES[family].shapes, (
            f"{shlex.join(words)}: no such slice"
        )


def check_install(words: list[str], place: str) -> None:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"])
    for before, word in zip(["", *words], words, strict=False):
        if found := re.fullmatch(r"\.\[([\w,-]+)\]", word):
            assert set(found[1].split(",")) <= extras, place
        if before in ("--constraint", "--constraints"):
            assert (REPOSITORY / word).is_file(), place
    assert "deepstack-jax" not in " ".join(words), f"{place}: the package is on no index"


def options_of_hf() -> set[str]:
    if not hasattr(options_of_hf, "found"):
        command = [str(Path(sys.executable).with_name("hf")), "download", "--help"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        options_of_hf.found = set(re.findall(r"--[a-z-]+", said))
    return options_of_hf.found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("frobnicate --all\n", "frobnicate: command not found"),
        ("echo $NOWHERE_SET\n", "NOWHERE_SET: unbound variable"),
        ("for x in a; do\n", "syntax error"),
        ("launch/gke.sh create --name=a\n", "--topology is missing"),
    ],
)
def test_a_shell_block_that_cannot_work_is_found(text, reason, tmp_path):
    (block,) = of_text("new.md", f"```sh\n{text}```\n")
    done, _ = run_shell([block], scratch_folder(tmp_path / "clone"))
    assert done.returncode != 0
    assert reason in done.stderr


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("python -m deepstack_jax.train --workdr=a\n", "'workdr'"),
        ("python -m deepstack_jax.train --config=configs/demo.py --config.train.stepz=3 --workdir=a\n", "stepz"),
        ("python -m deepstack_jax.train --config=configs/nothing.py --workdir=a\n", "configs/nothing.py"),
        ("make dinner\n", "dinner"),
        ("pip install '.[gpu]'\n", "gpu"),
        ("hf download a/b --quick\n", "--quick"),
    ],
)
def test_a_call_that_cannot_work_is_found(text, reason, tmp_path, runner):
    (block,) = of_text("new.md", f"```sh\n{text}```\n")
    done, (call,) = run_shell([block], scratch_folder(tmp_path / "clone"))
    assert done.returncode == 0, done.stderr
    with pytest.raises(AssertionError, match=re.escape(reason)):
        check(call, tmp_path / "clone", runner)
