"""What the verbs share: flags, configuration files, one-line errors, exit codes."""

import dataclasses
import errno
import logging
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from deepstack_jax.config import Config, TrainConfig, build_config, default_config, filled_in, left_open
from deepstack_jax.config.chat_template import with_own_template
from deepstack_jax.config.fields import find
from deepstack_jax.config.reference import as_text
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


class Flag:
    """A flag of a verb, defined when the verb runs, so that another may have one of the same name.

    Args:
      define: one of absl's `DEFINE_...`, or what takes the same.
      bounds: what else `define` takes, as lower_bound or enum_values.
    """

    def __init__(self, define: Callable[..., Any], name: str, default: Any, meaning: str, **bounds: Any) -> None:
        self.name = name
        self.define = partial(define, name=name, default=default, **({"help": meaning} | bounds))

    @property
    def value(self) -> Any:
        """What the command line gave, or the default."""
        return flags.FLAGS[self.name].value


def _define_config(*, name: str, default: None, help: str, keys_alone: bool) -> None:
    if keys_alone and not names_config():
        config_flags.DEFINE_config_dict(name, default_config(), help, flags.FLAGS)
    else:
        config_flags.DEFINE_config_file(name, default, help, flags.FLAGS)


CONFIG = Flag(_define_config, "config", None, "Configuration file, as FILE.py or FILE.py:ARGUMENT.", keys_alone=False)
"""`--config=FILE:ARGUMENT`, `--config.a.b=c` for every key of it, and `--config.help` for the list of all keys."""
CONFIG_OR_KEYS = Flag(_define_config, "config", None, "Configuration file, as FILE.py or FILE.py:ARGUMENT.", keys_alone=True)
"""The same, or `--config.a.b=c` alone, which change a configuration that comes from elsewhere."""


PROCESSES = (
    Flag(flags.DEFINE_string, "coordinator_address", None, "HOST:PORT of process 0, where they do not find each other."),
    Flag(flags.DEFINE_integer, "process_count", None, "How many processes there are; 1 = this one alone."),
    Flag(flags.DEFINE_integer, "process_id", None, "Number of this process, from 0."),
)
"""Of a verb that several processes may run together, as `parallel.processes.join_processes` takes them."""


def names_config() -> bool:
    """Whether the command line names a configuration file."""
    return any(re.match(r"--?config(=|$)", word) for word in sys.argv[1:])


def parse_config(workdir: Path | None = None, weights: str = "", dtype: str = TrainConfig.compute_dtype) -> Config:
    """The checked Config of the parsed flags; what it leaves open is filled in, as `fill_config` says, with its arguments.

    Raises:
      ConfigError: no --config, or what `fill_config` or `build_config` refuse.
    """
    source = flags.FLAGS["config"].value
    if source is None:
        raise ConfigError("--config is missing; e.g. --config=configs/demo.py")
    if not isinstance(source, ConfigDict):
        raise ConfigError(f"--config: get_config returned {quote(source)}, expected a ConfigDict like that of default_config()")
    values = source.to_dict()
    if left_open(values):
        from deepstack_jax.train.checkpoint.fill_config import fill_config  # late: with jax

        values = fill_config(values, workdir, weights, dtype)
    return build_config(with_own_template(values, workdir))


def parse_flags(table: Iterable[Flag] = ()) -> None:
    """The flags of the command line, `--config` read.

    Args:
      table: those of the verb that are not defined yet.

    Raises:
      ConfigError: an unknown flag or key, a value of another type, no file or a fault in it, more than flags.
    """
    table, words = list(table), [_with_recipe(word) for word in sys.argv]
    for word in words[1:] if any(flag.name == "config" for flag in table) else ():
        if found := re.match(r"--?(?:no)?config\.([^=]+)", word):
            _check_key(found[1])
            if CONFIG in table and not names_config():
                raise ConfigError(f"--config is missing, of which {word} changes a key; e.g. --config=configs/demo.py")
    try:
        for flag in table:
            flag.define()
        rest = flags.FLAGS(words)[1:]
        source = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
        if unread := vars(source).get("_error") if source is not None and hasattr(source, "__dict__") else None:
            raise unread  # which ml_collections keeps until the configuration is used
    except Exception as error:  # of absl and ml_collections, of Python's parser for values, or of the user's own file
        raise ConfigError(one_line(_flag_problem(error, words))) from error
    if rest:
        raise ConfigError(f"unexpected argument {quote(rest[0])}; flags look like --name=value")


def _print_keys() -> int:
    """What `--config.help` asks for; keys that are left to weights, where none are named, are shown to be so."""
    source = flags.FLAGS["config"].value if names_config() else None
    values = source.to_dict() if isinstance(source, ConfigDict) else {}
    if (unknown := left_open(values)) and not values["train"]["weights"]:
        print(as_text(build_config(filled_in(values, Config())), unknown))
    else:
        print(as_text(parse_config() if names_config() else None))
    return EXIT_DONE


def find_recipe(name: str) -> Path | None:
    """The recipe of that file name which comes with the package: from its wheel, or from the clone that it runs in."""
    package = Path(__file__).parent
    files = (folder / "configs" / name for folder in (package, package.parent))
    return next((file for file in files if file.is_file()), None)


def _with_recipe(word: str) -> str:
    """A flag --config=NAME.py with the path of the recipe in it, unless the working directory has a file of that name."""
    found = re.fullmatch(r"(--?config=)([^:/]+\.py)(:.*)?", word, re.DOTALL)
    recipe = find_recipe(found[2]) if found else None
    if found is None or recipe is None:
        return word
    if Path(found[2]).is_file():
        if not recipe.samefile(found[2]):
            logging.warning("--config=%s is the file in the working directory; the recipe is %s", found[2], recipe)
        return word
    return f"{found[1]}{recipe}{found[3] or ''}"


def _check_key(key: str) -> None:
    """Refuse a flag --config.KEY that names no key, or a section, whose other keys would be the defaults from then on."""
    try:
        kind, _ = find(Config, key)
    except ConfigError as error:
        raise ConfigError(str(error).replace("unknown key config", "unknown key --config", 1)) from None
    if dataclasses.is_dataclass(kind):
        first = dataclasses.fields(kind)[0].name
        raise ConfigError(f"--config.{key} is a section; set its keys one by one, as --config.{key}.{first}=VALUE")


def _flag_problem(error: Exception, words: list[str]) -> str:
    """What is wrong with the flags, or in the configuration file, then with its line."""
    chain: list[BaseException] = [error]
    while (within := chain[-1].__context__) is not None:  # what absl and ml_collections wrapped
        chain.append(within)
    if known := [cause for cause in chain if isinstance(cause, UserError)]:
        return str(known[-1])
    for cause in chain:
        if place := _place_in_file(cause):
            return f"--config fails at {place}: {type(cause).__name__}: {cause}"
    said = str(chain[-1]).strip() or type(chain[-1]).__name__
    name = next((word.partition("=")[2] for word in words if re.match("--?config=", word)), "")
    if isinstance(chain[-1], OSError):
        if name and Path(name.partition(":")[0]).is_file():
            return f"--config={name} opens a file that is not there: {said}"
        recipes = {file.name for file in (find_recipe("recipe.py") or Path()).parent.glob("*.py")} - {"recipe.py"}
        return f"--config={name} names no readable file; give a path, or a recipe of the package: {', '.join(sorted(recipes))}"
    if isinstance(error, AttributeError) and "'get_config'" in said:
        return f"--config={name} has no function get_config, which returns the configuration"
    if isinstance(error, AttributeError | KeyError):  # a name that data.sets or optimizer.groups of the file do not have
        flag = next((word.partition("=")[0] for word in words if said.strip("'").partition("'")[0] in word.split(".")), said)
        return f"unknown key {flag}; the names that the file gives are shown by --config.help"
    if isinstance(error, flags.Error):
        return str(error)
    return f"a flag cannot be read: {said}; flags look like --config.KEY=VALUE"


def _place_in_file(error: BaseException) -> str:
    """FILE:LINE of the user's own code, or a recipe's, in which an error was raised; "" for another's code."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f"{error.filename}:{error.lineno}"
    package = Path(__file__).parent
    others = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    others += [str(file) for file in package.iterdir() if file.name != "configs"]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_file() and not frame.filename.startswith(tuple(others))]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


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
    main: Callable[[], int], usage: str, table: Sequence[Flag] = (), needs_less_memory: str = "use a machine with more"
) -> None:
    """Parse the flags, run `main`, and exit with its code; a `UserError` becomes one line on stderr.

    So does a full disk, and a device whose memory does not suffice. Anything else is a defect of this package and keeps its
    traceback.

    Args:
      table: the verb's flags.
      needs_less_memory: what to do when there is too little of it.
    """
    guard_streams()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].addFilter(_is_for_the_user)
    logging.getLogger().handlers[0].setFormatter(_OneLine("%(levelname)s: %(message)s"))
    warnings.showwarning = _show_once()
    sys.unraisablehook = _unraisable
    if any(arg in ("--help", "-h", "-help") for arg in sys.argv[1:]):
        print(usage.strip())
        sys.exit(EXIT_DONE)
    try:
        wants_keys = any(flag.name == "config" for flag in table) and "--config.help" in sys.argv
        if wants_keys:
            sys.argv.remove("--config.help")
        parse_flags(table)
        code = _print_keys() if wants_keys else main()
    except UserError as error:
        _fail(*(map(str, error.args) if isinstance(error, ConfigError) else [str(error)]))
    except OSError as error:
        where = f" {error.filename}" if error.filename else _shared_memory_full()
        if error.errno in _NO_ROOM:
            _fail(f"cannot write{where}: {error.strerror}; make room and run the same command again")
        if error.errno not in _FAILING:
            raise
        _fail(f"cannot read or write{where}: {error.strerror}; run the same command again when that is fixed")
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


def _show_once() -> Callable[..., None]:
    """How warnings are shown: in one line, and once, from wherever they come."""
    shown = set[str]()

    def show(message: Warning | str, *_: Any) -> None:
        if (line := one_line(str(message))) not in shown and not is_after_failed_save(line):
            shown.add(line)
            print(f"warning: {line}", file=sys.stderr)

    return show


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


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """As Python's own, but for what follows a save that has failed, which is said already."""
    if not is_after_failed_save(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _fail(*problems: str) -> NoReturn:
    """Say what is wrong, in a line each, and exit."""
    lines = [one_line(problem.replace("\\n", " ")) for problem in problems]
    if len(lines) > 1:
        lines = ["more than one thing is wrong; each with what to do:", *lines]
    print("error: " + "\n  ".join(lines), file=sys.stderr)
    sys.exit(EXIT_ERROR)
