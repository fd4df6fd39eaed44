"""The folder that an export is written to: what may be there, and how the whole export takes its place at once."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deepstack_jax.config.chat_template import OLDER_FILE, TEMPLATE_FILE
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.base import TOWERS
from deepstack_jax.weights.stored_tensor import BEYOND_FILE

MARK = ".deepstack_jax_export"  # in every export: a later one may take its place
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *(TEMPLATE_FILE, OLDER_FILE),
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_JSON = ("config.json", "preprocessor_config.json", "model.safetensors.index.json")
_WRITTEN = {MARK, BEYOND_FILE, *_JSON, *ADAPTER_FILES, *TOKENIZER_FILES}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_IN_TOWER = ("config.json", "preprocessor_config.json", "model.safetensors")


@contextmanager
def whole_export(folder: Path, sources: Iterable[str | Path], *, force: bool) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends without an error; otherwise all is as before.

    Args:
      folder: must not exist or be empty, unless `force`; then also an export of ours that nobody added a file to.
      sources: files and folders that the export is made from, which a replaced folder must be apart from.

    Raises:
      WeightsError: something else is there. OSError: it cannot be written.
    """
    _check(folder, [Path(source).expanduser() for source in sources], force)
    folder = folder.resolve()  # else `old/../old` would lead nowhere as soon as `old` is moved aside
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
    scratch, aside = beside / "new", beside / "replaced"
    try:
        scratch.mkdir()
        (scratch / MARK).write_text(
            "Written by deepstack_jax; a later export with --force or force=True may replace this folder.\n"
        )
        yield scratch
        _swap(scratch, folder, aside, force=force)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if folder.is_dir() or not aside.exists():  # else what was there could not be put back: better two folders than none
            shutil.rmtree(beside, ignore_errors=True)


def _check(folder: Path, sources: list[Path], force: bool) -> None:
    if folder.is_symlink():
        raise WeightsError(f"{folder} is a link; name the folder itself, or a new one")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise WeightsError(f"{folder} is a file; name a folder that is new or empty")
    real = folder.resolve()
    for name, taken in (("the working directory", Path.cwd()), ("your home", Path.home()), ("the whole disk", Path("/"))):
        if taken.resolve().is_relative_to(real):
            raise WeightsError(f"{folder} is or holds {name}; name a folder that is new or empty")
    if os.path.ismount(folder):
        raise WeightsError(f"{folder} is a mount point and cannot be replaced; name a folder inside")
    if not any(folder.iterdir()):
        return
    if not force:
        raise WeightsError(f"{folder} is not empty; choose another folder, or replace it with --force")
    for source in sources:
        if source.exists() and (source.resolve().is_relative_to(real) or real.is_relative_to(source.resolve())):
            raise WeightsError(f"{folder} overlaps with {source}, which the export is made from; choose another folder")
    _check_ours(folder, folder)


def _check_ours(at: Path, folder: Path) -> None:
    """Refuse to delete what no export has; those of earlier versions have no mark, and some have a file that only we write."""
    if not (at / MARK).is_file() and not (at / BEYOND_FILE).is_file():
        raise WeightsError(
            f"{folder} is not an export of deepstack_jax (it has no {MARK}) and is not replaced; choose another folder"
        )
    towers = {family.folder for family in TOWERS.values()}
    written = _WRITTEN | towers | {f"{tower}/{name}" for tower in towers for name in _IN_TOWER}
    for path in sorted(at.rglob("*")):
        name = path.relative_to(at).as_posix()
        known = name in written or _WEIGHTS.fullmatch(name)
        if not known or path.is_symlink() or path.is_dir() != (name in towers):
            raise WeightsError(
                f"{folder} holds {name}, which no export writes, and is not replaced; move it or choose another folder"
            )


def _swap(scratch: Path, folder: Path, aside: Path, *, force: bool) -> None:
    """What is replaced is moved aside first, looked at once more, and deleted last."""
    if not force or not folder.exists() or not any(folder.iterdir()):
        scratch.rename(folder)  # onto an empty folder too; where it has filled up since, this fails
        return
    folder.rename(aside)
    try:
        _check_ours(aside, folder)
        scratch.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer that can be read."""
    return any((folder / file).exists() for file in ("tokenizer.model", "tokenizer.json"))
