"""What one GPU does with this package, beside PyTorch, in at most nine minutes: `python -m benchmarks.gpu_check`.

  --list          print the stages with their seconds, and end
  --only=A,B      these stages alone, again where they are done
  --anew          leave out what was found before
  --size=tiny     small models, which a CPU runs to the end too
  --output=FILE   where the results go; benchmarks/results/gpu-NAME.json, by the name of the device, unless given; those of
                  small models, which no document shows, are left in --work
  --work=DIR      logs and compiled programs; .cache/gpu_check unless given
  --budget=N      seconds that all stages may take together; 540 unless given

Every stage runs in a process of its own, prints and saves each figure as it is known, and is ended at its limit, with all that
it started. SIGTERM or Ctrl-C ends the stage that runs and then the check; a check that is killed takes its stage along. A stage
that is done is not run again: the same call made again goes on with what failed, ran out of time or came too late. Results of
another device, size, jax or other sources are begun anew, which --only refuses without --anew; those of another torch lose
PyTorch's stages. Then `python -m benchmarks.gpu_check.tables` writes the tables of the documents. Exits with 1 where a stage
failed, was late or found no time left, with 75 after SIGTERM, with 130 after Ctrl-C. What it needs beyond the package is in
benchmarks/gpu_check/requirements.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.stages import BUDGET, EXIT_ABSENT, NAMES, STAGES, Stage, listing
from deepstack_jax.atomic import write_json
from deepstack_jax.stop_signals import StopSignals

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
SAME = ("device", "sources")  # of the machine, in results that are gone on with
SOURCES = (
    "deepstack_jax/**/*.py",
    "configs/*.py",
    "benchmarks/gpu_check/*.py",
    "benchmarks/attention_check.py",
    "benchmarks/decode.py",
)
SHOWS = "tables.py"  # measures nothing
PEERS = ("torch", "transformers")  # packages that the stages in PyTorch measure
SLOW = 5  # times its limit that a stage has where the models are small: on a CPU, which may be busy
NEEDED = "step"
LEAST = 20  # seconds that must be left for a stage to begin
SHOWN = 12  # last lines of what a stage that failed wrote to stderr
PLACE = 40  # the same of one that was late: where its threads were then
TICK = 1.0  # seconds between looks at a stage that runs
LEAVE = 10  # seconds that a killed process has to go: one that waits within the driver may never
# As launch/slurm.sbatch; in a process that computes on the GPU the rest of the memory is the driver's and the libraries'.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
ENVIRONMENT["HF_HUB_OFFLINE"] = "1"  # nothing is fetched, and no stage waits for a network that is not there
QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]


def machine() -> dict[str, Any]:
    """Device, driver, processor, versions and revision, without starting jax."""
    try:
        found = subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        name, driver, memory = (part.strip() for part in found.split(","))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        name, driver, memory = "cpu", "", ""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        revision = git.stdout.strip()
    except OSError:  # no git here
        revision = ""
    return {
        "device": name,
        "driver": driver,
        "memory": memory,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
        "revision": revision or "unknown",
        "sources": digest(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def digest() -> str:
    """Of what is measured and what measures: results of other sources are not gone on with."""
    found = hashlib.sha256()
    for place in SOURCES:
        for file in sorted(REPOSITORY.glob(place)):
            if file.name != SHOWS:
                found.update(file.read_bytes())
    return found.hexdigest()[:16]


def slug(device: str) -> str:
    """A device's name as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia")).strip("-")


def open_results(
    file: Path, here: dict[str, Any], size: str, only: Sequence[str] = (), *, anew: bool = False
) -> dict[str, Any]:
    """Those of the file where they are of the same machine, sources and size, else none.

    Raises:
      SystemExit: they are not, and some stages alone are to be run in their place.
    """
    fresh = {"size": size, "machine": here, "stages": {}}
    if anew or not file.exists():
        return fresh
    found = json.loads(file.read_text())
    before, now = ({key: one["machine"][key] for key in SAME} | {"size": one["size"]} for one in (found, fresh))
    before["jax"], now["jax"] = (one["machine"]["versions"]["jax"] for one in (found, fresh))
    changed = [key for key in now if before[key] != now[key]]
    if not changed:
        if any(found["machine"]["versions"].get(name) != here["versions"].get(name) for name in PEERS):
            for stage in STAGES:
                if stage.peer:
                    found["stages"].pop(stage.name, None)
        return found | {"machine": here}
    if only:
        raise SystemExit(
            f"{file} is of another {', '.join(changed)}; --only={','.join(only)} would leave nothing of it but these stages: "
            f"run all, add --anew, or name another file by --output"
        )
    print(f"{file} is of another {', '.join(changed)}; its stages are run anew", flush=True)
    return fresh


def run_stage(
    stage: Stage, results: dict[str, Any], output: Path, work: Path, limit: float, stop: StopSignals
) -> dict[str, Any]:
    """Run it, and keep in the results what is known of it while it runs: status, seconds, figures, and the end of its log."""
    figures, earlier, log = (work / f"{stage.name}{end}" for end in (".json", ".earlier.json", ".log"))
    figures.unlink(missing_ok=True)
    write_json(earlier, {name: one["figures"] for name, one in results["stages"].items()})
    before = results["stages"].get(stage.name, {}).get("figures", {})
    command = child_command(stage, results["size"], figures, earlier, limit)
    began = time.monotonic()

    def keep(status: str, **more: Any) -> dict[str, Any]:
        found = json.loads(figures.read_text()) if figures.exists() else {}
        kept = found if status == "done" else before | found
        seconds = round(time.monotonic() - began, 1)
        results["stages"][stage.name] = {"status": status, "seconds": seconds, "limit": round(limit), "figures": kept, **more}
        write_json(output, results)
        return results["stages"][stage.name]

    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(stage, results["size"], work), stderr=file, start_new_session=True
        )
        try:
            code = _watch(process, began + limit, stop, figures, lambda: keep("cut off"))
        finally:
            _end(process)
    said = log.read_text(errors="replace").strip().splitlines()
    if code is None:
        return keep("stopped") if stop.received else keep("late", where=said[-PLACE:])
    if code == 0:
        return keep("done")
    said += [f"ended by signal {-code}"] if code < 0 else []
    return keep("absent" if code == EXIT_ABSENT else "failed", said=said[-SHOWN:])


def _watch(
    process: subprocess.Popen[bytes], ends: float, stop: StopSignals, figures: Path, save: Callable[[], Any]
) -> int | None:
    """What it exits with, None where it did not until then or a signal came; whenever it has new figures they are saved."""
    seen = 0
    while not stop.received and (left := ends - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=min(TICK, left))
        if figures.exists() and (now := figures.stat().st_mtime_ns) != seen:
            seen = now
            save()
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it if it runs, and what it started itself, which would keep the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LEAVE)


def child_command(stage: Stage, size: str, figures: Path, earlier: Path, limit: float) -> list[str]:
    """What a stage's process is started by."""
    return [sys.executable, "-m", "benchmarks.gpu_check.child", stage.name, size, str(figures), str(earlier), str(limit)]


def environment(stage: Stage, size: str, work: Path) -> dict[str, str]:
    """Of a stage's process: what it compiles is kept, so that a stage that is run again begins sooner."""
    caches = {"JAX_COMPILATION_CACHE_DIR": "jax", "TORCHINDUCTOR_CACHE_DIR": "torch"}
    chosen = {**ENVIRONMENT, **{name: str(work.resolve() / folder) for name, folder in caches.items()}, **os.environ}
    if size == "full":
        chosen["JAX_PLATFORMS"] = stage.platforms or "cuda,cpu"  # or jax would take the CPU where CUDA does not start
        return chosen
    chosen.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other by spinning, for minutes on a busy CPU
    if stage.platforms and os.environ.get("JAX_PLATFORMS") != "cpu":
        chosen["JAX_PLATFORMS"] = stage.platforms
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    parser.add_argument("--anew", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", default="full", choices=("full", "tiny"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".cache" / "gpu_check", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=BUDGET, help=argparse.SUPPRESS)
    given = parser.parse_args()
    only = given.only.split(",") if given.only else []
    if unknown := set(only) - set(NAMES):
        parser.error(f"--only={given.only} names {', '.join(sorted(unknown))}, expected some of {', '.join(NAMES)}")
    if given.list:
        print(listing())
        return 0
    here = machine()
    if here["device"] == "cpu" and given.size == "full":
        parser.error("there is no NVIDIA GPU here (nvidia-smi); on a CPU run it with --size=tiny")
    folder = REPOSITORY / "benchmarks" / "results" if given.size == "full" else given.work
    output = given.output or folder / f"gpu-{slug(here['device'])}.json"
    given.work.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    results = open_results(output, here, given.size, only, anew=given.anew)
    return run_all(results, output, only, given.work, given.budget)


def run_all(results: dict[str, Any], output: Path, only: list[str], work: Path, budget: float) -> int:
    """Every stage that is still to run, as long as time is left; the file is whole after each, and whenever one has figures."""
    ends, stages, whole, stop = time.monotonic() + budget, results["stages"], True, StopSignals()
    try:
        waiting = [one for one in STAGES if (one.name in only if only else stages.get(one.name, {}).get("status") != "done")]
        again = {NEEDED}  # by most others: where attention brought its process down, it takes another one
        while waiting:
            stage = waiting.pop(0)
            left = ends - time.monotonic()
            if left < LEAST:
                print(f"{stage.name}: no time is left; make the same call again", flush=True)
                whole = False
                continue
            print(f"{stage.name} ({stage.part}): {stage.what}", flush=True)
            limit = stage.limit * (SLOW if results["size"] == "tiny" else 1)
            found = run_stage(stage, results, output, work, min(limit, left), stop)
            print(f"{stage.name}: {found['status']} in {found['seconds']:.0f} s{_said(found)}", flush=True)
            if stop.received:
                print(f"stopped by a signal; what was found is in {output}, and the same call made again goes on", flush=True)
                return stop.exit_code
            if stage.name in again and found["status"] in ("failed", "late"):
                again.remove(stage.name)
                waiting.insert(0, stage)
    finally:
        stop.release()
    print(f"results: {output}")
    return int(not whole or any(one["status"] in ("failed", "late") for one in stages.values()))


def _said(found: dict[str, Any]) -> str:
    return f": {found['said'][-1]}" if found.get("said") else ""


if __name__ == "__main__":
    sys.exit(main())
