"""Runs verbs and pieces of Python in processes that begin with everything imported: `python -m tests.forks`.

Reads one request a line, {"module" and "arguments", or "code"; "folder", "seconds", "variables", "typed", "flags_only"}, and
answers with {"code", "out", "err"}: the exit code and what was printed. Each runs in a process that was forked before jax
began a thread, and is ended after so many seconds.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import tempfile
import traceback
from typing import Any

import deepstack_jax

VERBS = ("train", "evaluate", "generate", "convert", "prepare", "audit", "plan", "serve")


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as typed, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            typed.write(request.get("typed", "").encode())
            typed.seek(0)
            child = os.fork()
            if child == 0:
                for number, file in enumerate((typed, out, err)):
                    os.dup2(file.fileno(), number)
                signal.alarm(request["seconds"])
                sys.exit(_run(request))  # as any program ends: what it left for its exit is done
            _, ended = os.waitpid(child, 0)
            answer: dict[str, Any] = {"code": os.waitstatus_to_exitcode(ended)}
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                answer[name] = file.read().decode(errors="replace")
            print(json.dumps(answer), flush=True)


def _run(request: dict[str, Any]) -> int:
    code = 0
    try:
        os.chdir(request["folder"])
        os.environ.update(request.get("variables", {}))
        sys.stdin = open(0)  # noqa: SIM115 # what was read ahead belongs to the server
        if "code" in request:
            exec(compile(request["code"], "<document>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [request["module"], *request["arguments"]]
            if request.get("flags_only"):
                _only_flags()
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _only_flags() -> None:
    """A verb reads its flags, the configuration is built and checked, and that is all; weights are those of the defaults."""
    from absl import flags

    from deepstack_jax import cli
    from deepstack_jax.config import Config, build_config, filled_in

    run = cli.run

    def read() -> int:
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            build_config(filled_in(flags.FLAGS["config"].value.to_dict(), Config()))
        return cli.EXIT_DONE

    cli.run = lambda _, *rest: run(read, *rest)


if __name__ == "__main__":
    # All but the verbs, which define their flags when they are imported, and each may have one of the same name; and but for
    # what needs an extra.
    for module in pkgutil.walk_packages(deepstack_jax.__path__, "deepstack_jax."):
        if not module.name.endswith((".__main__", ".convert", ".serve.app", ".lmms_eval_plugin")):
            importlib.import_module(module.name)
    gc.freeze()  # or each process would look through all of it, and copy its pages, when it ends
    serve()
