"""Sizes of files and functions, the direction of imports, no jax below `data` and `layout`, no torch: held over every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "deepstack_jax"
# Every package and those it may import from. A verb (the `__main__` of a package, or convert.py) may import from all of them.
ALLOWED = {
    "batch": set(),
    "printing": set(),
    "errors": set(),
    "atomic": set(),
    "json_lines": set(),
    "jax_messages": set(),
    "stop_signals": set(),
    "progress": set(),
    "background": set(),
    "layout": {"batch"},
    "config": {"batch", "layout"},
    "types": {"batch"},
    "model": {"batch", "types", "config"},
    "data": {"batch", "atomic", "config", "layout"},
    "families": {"batch", "config", "layout", "model"},
    "parallel": {"batch", "jax_messages", "types", "config", "model"},
    "weights": {"batch", "atomic", "types", "config", "families"},
    "train": {
        *("batch", "atomic", "jax_messages", "json_lines", "progress", "stop_signals", "types"),
        *("config", "data", "families", "model", "parallel", "weights"),
    },
    "generate": {"batch", "atomic", "types", "config", "layout", "data", "families", "model", "parallel", "weights"},
}
_BELOW = set(ALLOWED)
ALLOWED |= {
    "evaluate": _BELOW,
    "plan": _BELOW | {"evaluate"},
    "api": _BELOW,
    "cli": {"config", "atomic", "jax_messages", "stop_signals", "train"},
}
ALLOWED["audit"] = {"batch", "config", "data", "layout"}  # a page about data
ALLOWED["serve"] = _BELOW | {"audit"}  # whose pictures its page shows
ALLOWED["lmms_eval_plugin"] = _BELOW | {"api", "evaluate", "serve"}  # as a verb, which another program calls
ALLOWED["prepare"] = {"batch", "atomic", "config", "data", "layout"}
# Within data: its packages, and the files beside them that these may import. The other files beside them join the packages.
DATA = {"example": set(), "workers": {"example"}, "formats": {"example"}, "shards": {"example", "formats"}}
DATA |= {"encode": {"example", "formats"}, "order": {"example", "workers", "formats", "encode"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Every module that the file imports when it runs, in functions too; what only a type checker reads is left out."""
    names = set()
    tree = ast.parse(file.read_text())
    unseen = {node for block in ast.walk(tree) if _only_for_types(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name}


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_there_are_files_to_walk():
    assert len(FILES) > 25


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    here = room(file)
    names = {name for name in imported(file) if name.startswith("deepstack_jax.")}
    assert not {name for name in names if name.endswith(".__main__") or name == "deepstack_jax.convert"}, (
        f"{here} imports a verb"
    )
    if file.stem == "__main__" or here in {"convert", "__init__"}:
        return
    rooms = {name.split(".")[1] for name in names}
    rooms -= {here, "__version__", "printing", "errors"}  # these two are for everybody
    assert here in ALLOWED, f"{here} is a new package: give it a place in the table above"
    assert rooms <= ALLOWED[here], f"{here} imports {sorted(rooms - ALLOWED[here])}"


@pytest.mark.parametrize("file", [file for file in FILES if room(file) == "data"], ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_within_data_go_one_way(file):
    here = file.relative_to(PACKAGE / "data").parts[0].removesuffix(".py")
    rooms = {name.split(".")[2] for name in imported(file) if name.startswith("deepstack_jax.data.")} - {here}
    assert here not in DATA or rooms <= DATA[here], f"data/{here} imports {sorted(rooms - DATA[here])}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_torch_anywhere_and_no_jax_below_data(file):
    roots = {name.split(".")[0] for name in imported(file)}
    assert not roots & {"torch", "torchvision", "tensorflow"}
    if room(file) in {"data", "layout", "batch", "config", "errors"}:
        assert not roots & {"jax", "flax", "optax", "orbax"}


_WORKERS = ["batch", "layout.sequence", "data.encode.image", "data.encode.templates", "data.encode.labels"]
_WORKERS += ["data.formats.file_source", "data.formats.json_records", "data.formats.tables", "data.shards.reader"]
_WORKERS += ["prepare.folder", "prepare.chunks", "prepare.__main__"]


@pytest.mark.parametrize("module", _WORKERS)
def test_data_workers_start_without_jax(module):
    code = f"import sys, deepstack_jax.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_utils_room():
    assert not [file for file in FILES if file.stem in {"utils", "util", "helpers", "common", "misc"}]


def test_no_default_is_hidden_below_config():
    """`getattr(config, name, default)` and `config.get` would be a second place for a default."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                first = ast.unparse(node.args[0])
                assert len(node.args) < 3 or ("config" not in first and "cfg" not in first), f"{file}: {ast.unparse(node)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_is_over_400_lines_and_no_function_over_60(file):
    text = file.read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(text.splitlines()) <= 400
    assert {node.name for node in functions if node.end_lineno - node.lineno >= 60} == set()  # type: ignore[operator]
