"""What the verbs share: flags, configuration files, one-line errors, exit codes."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from deepstack_jax.config import Config, build_config
from deepstack_jax.errors import ConfigError, UserError
from deepstack_jax.jax_messages import is_after_failed_save, memory_asked
from deepstack_jax.printing import guard_streams, one_line, quote
from deepstack_jax.stop_signals import EXIT_DONE, EXIT_INTERRUPTED

EXIT_ERROR = 1  # a user's mistake, said in one line on stderr

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on the size of files
# Storage or rights that fail: no defect of this package, and no mistake in what it was given.
_FAILING = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE),
    *(errno.ENOMEM, errno.ENOTCONN, errno.EHOSTDOWN, errno.EBUSY),
)


def define_config_flag() -> None:
    """`--config=configs/name.py:argument`, and `--config.a.b=c` for every key of it."""
    config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/demo.py or configs/demo.py:baseline.")


def parse_config() -> Config:
    """The checked Config of the parsed flags.

    Raises:
      ConfigError: no --config, or what `build_config` refuses.
    """
    source = flags.FLAGS["config"].value
    if source is None:
        raise ConfigError("--config is missing; e.g. --config=configs/demo.py")
    if not isinstance(source, ConfigDict):  # what ml_collections puts in place of a file that it could not read
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        raise ConfigError(f"--config={name} names no readable file; e.g. --config=configs/demo.py")
    return build_config(source)


def writable_folder(path: str, flag: str) -> Path:
    """Create the folder and prove that it can be written to, before anything expensive starts.

    Raises:
      ConfigError: naming the folder, the reason and the flag.
    """
    if "://" in path:  # as a path it would be a local folder named like the bucket
        raise ConfigError(
            f"--{flag}={path} is a URL; expected a folder: mount the bucket and give the path, as --{flag}=/gcs/runs/a"
        )
    folder = Path(path).expanduser()
    try:
        os.fsencode(folder)
        str(folder.absolute()).encode()  # what tensorstore takes
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"--{flag}={ascii(path)[1:-1]} cannot be written in the encoding of this environment, "
            f"{sys.getfilesystemencoding()}; set PYTHONUTF8=1 and LC_ALL=C.UTF-8, or choose a name of plain letters"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # of a name that nobody else has: it follows no link
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another folder with --{flag}=DIR") from error
    return folder


def run(
    main: Callable[[], int],
    usage: str,
    needs_less_memory: str = "use a machine with more",
) -> None:
    """Parse the flags, run `main`, and exit with its code; a `UserError` becomes one line on stderr.

    So does a full disk, and a device whose memory does not suffice. Anything else is a defect of this package and keeps its
    traceback.

    Args:
      needs_less_memory: what to do when there is too little of it.
    """
    guard_streams()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].addFilter(_is_for_the_user)
    logging.getLogger().handlers[0].setFormatter(_OneLine("%(levelname)s: %(message)s"))
    warnings.showwarning = lambda message, *_: print(f"warning: {one_line(str(message))}", file=sys.stderr)
    sys.unraisablehook = _unraisable
    if any(arg in ("--help", "-h", "-help") for arg in sys.argv[1:]):
        print(usage.strip())
        sys.exit(EXIT_DONE)
    try:
        parse_flags()
        code = main()
    except UserError as error:
        _fail(*(map(str, error.args) if isinstance(error, ConfigError) else [str(error)]))
    except OSError as error:
        where = f" {error.filename}" if error.filename else _shared_memory_full()
        if error.errno in _NO_ROOM:
            _fail(f"cannot write{where}: {error.strerror}; make room and run the same command again")
        if error.errno not in _FAILING:
            raise
        _fail(f"cannot read or write{where}: {error.strerror}; run the same command again when that is mended")
    except MemoryError as error:
        _fail(f"out of memory: {str(error) or 'this process was given no more'}; {needs_less_memory}")
    except (RuntimeError, ValueError) as error:  # by the place that it strikes
        asked = memory_asked(str(error))
        if not asked:
            raise
        _fail(f"out of memory: {asked}; {needs_less_memory}")
    except KeyboardInterrupt:  # before the first step, when there is nothing to save, or a second Ctrl-C
        print("stopped", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)


class _OneLine(logging.Formatter):
    """A record's message in one line; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


def _shared_memory_full() -> str:
    """Where semaphores of worker processes found no room, which no error names."""
    try:
        full = shutil.disk_usage("/dev/shm").free < 2**16
    except OSError:
        full = False
    return " to /dev/shm, which is full (config.data.workers=0 needs none of it)" if full else ""


def _is_for_the_user(record: logging.LogRecord) -> bool:
    """Orbax logs every failure several times, with tracebacks; what fails in it is said by us, once."""
    return "/orbax/" not in record.pathname and record.name != "asyncio"


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """As Python's own, but for what follows a save that has failed, which is said already."""
    if not is_after_failed_save(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def parse_flags() -> None:
    """The flags of the command line, `--config` read.

    Raises:
      ConfigError: an unknown flag or key, a value of another type, no file, more than flags.
    """
    try:
        rest = flags.FLAGS(sys.argv)[1:]
    except (flags.Error, ConfigError) as error:
        flag, traceback, _ = str(error).partition(": Error whilst parsing config file")
        raise ConfigError(one_line(f"{flag}: {str(error).strip().splitlines()[-1]}" if traceback else flag)) from error
    except (AttributeError, KeyError) as error:  # how ml_collections reports an unknown --config.a.b; it names the nearest
        raise ConfigError(one_line(_unknown_key(str(error)))) from error
    except OSError as error:
        raise ConfigError(f"--config names no readable file: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of ml_collections, which parses a flag's value as Python does, or of the file itself
        raise ConfigError(one_line(f"a flag cannot be read: {error}; flags look like --config.KEY=VALUE")) from error
    if rest:
        raise ConfigError(f"unexpected argument {quote(rest[0])}; flags look like --name=value")


def _unknown_key(message: str) -> str:
    """ml_collections' message, which quotes a quotation, put plainly, with the whole flag."""
    message = message.rpartition(".")[2] if "Attempting to lookup" in message else message  # a key below one that has a value
    found = re.match(r"\W*(\w+)(?:\W+n?Did you mean\W+(\w+))?", message)
    key, near = found.groups() if found else (message, None)
    flag = next((arg.split("=")[0] for arg in sys.argv if f".{key}" in arg.split("=")[0]), key)
    hint = f"nearest valid name: {near!r}" if near else "all keys and their defaults stand in deepstack_jax/config/"
    return f"unknown key {flag}; {hint}"


def _fail(*problems: str) -> NoReturn:
    """Say what is wrong, in a line each, and exit."""
    lines = [one_line(problem.replace("\\n", " ")) for problem in problems]
    if len(lines) > 1:
        lines = ["more than one thing is amiss; each with what to do:", *lines]
    print("error: " + "\n  ".join(lines), file=sys.stderr)
    sys.exit(EXIT_ERROR)
