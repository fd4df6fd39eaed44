"""The batch script's body, with a stub srun that starts real local processes as SLURM does: one per GPU."""

import json
import os
import re
import signal
import sys

import pytest

from tests.launch.scripts import LAUNCH, SECONDS, TRAIN, Tools, background, run, wait_for

JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "3"}

# Starts SLURM_NTASKS_PER_NODE tasks with SLURM's variables, passes SIGTERM on and exits with the highest code, as srun does.
SRUN = f"""#!{sys.executable} -S
import os, signal, subprocess, sys
command = sys.argv[1:]
open(os.environ["CALLS"], "a").write("srun " + " ".join(command) + "\\n")
while command[0].startswith("--"):
    command.pop(0)
count = int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = []
for number in range(count):
    variables = dict(SLURM_NTASKS=str(count), SLURM_PROCID=str(number), SLURM_LOCALID=str(number))
    variables |= dict(SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_NODES="1")
    tasks.append(subprocess.Popen(command, env=os.environ | variables))
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

# Stands for the interpreter that runs train: notes what it sees, waits WAIT seconds, exits with CODE, or with 75 on SIGTERM.
TASK = f"""#!{sys.executable} -S
import json, os, signal, sys, time
def stop(*_):
    time.sleep(0.2)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
seen = dict(arguments=sys.argv[1:], environment=dict(os.environ))
place = os.path.join(os.environ["SEEN"], os.environ["SLURM_PROCID"])
open(place + ".part", "w").write(json.dumps(seen))
os.rename(place + ".part", place + ".json")
time.sleep(float(os.environ.get("WAIT", "0")))
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def tools(tmp_path):
    tools = Tools(tmp_path)
    for name, text in (("srun", SRUN), ("task", TASK)):
        (tools.bin / name).write_text(text)
        (tools.bin / name).chmod(0o755)
    tools.add("scontrol")
    tools.add("squeue", "echo ${STATE:-RUNNING}")
    return tools


def variables(tools, **more):
    folder = tools.bin.parent
    return JOB | {"CALLS": str(tools.log), "SEEN": str(folder), "SLURM_SUBMIT_DIR": str(folder)} | more


def submit(tools, *options, **more):
    return run("slurm.sbatch", "--python=task", *options, "--", *TRAIN, tools=tools, **variables(tools, **more))


def seen(tools):
    return [json.loads(path.read_text()) for path in sorted(tools.bin.parent.glob("[0-9].json"))]


def test_one_task_per_gpu_with_what_jax_looks_for(tools):
    done = submit(tools)
    assert done.returncode == 0, done.stderr
    tasks = seen(tools)
    assert [task["arguments"] for task in tasks] == [["-m", "deepstack_jax.train", *TRAIN]] * 2
    assert [task["environment"]["SLURM_LOCALID"] for task in tasks] == ["0", "1"]
    (call,) = tools.calls()
    assert call.startswith("srun --gpu-bind=none --cpus-per-task=3 --kill-on-bad-exit=0 --wait=120 --label task -m")


def test_a_dry_run_names_the_cores_that_the_head_asks_for(tmp_path):
    """SLURM has not read the options then; in a job its own variable counts."""
    (cores,) = re.findall(r"^#SBATCH --cpus-per-task=(\d+)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    done = run("slurm.sbatch", "--dry-run", "--", *TRAIN, tools=Tools(tmp_path))
    assert f"'--cpus-per-task={cores}'" in done.stdout


def test_results_can_be_repeated_and_the_choice_of_kernels_is_kept(tools):
    assert submit(tools, XLA_FLAGS="--xla_dump_to=dump").returncode == 0
    for task in seen(tools):
        environment = task["environment"]
        assert environment["XLA_FLAGS"].split() == ["--xla_dump_to=dump", "--xla_gpu_deterministic_ops=true"]
        assert environment["JAX_COMPILATION_CACHE_DIR"] == f"{tools.bin.parent}/.cache/jax"
        assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    assert (tools.bin.parent / ".cache" / "jax").is_dir()


def test_train_gets_its_arguments_as_they_were_given(tools):
    tricky = ["--config.name=it's; touch owned", '--config.x=$(touch owned) "q"', "--config.y=* a  b \\ # & |"]
    done = run("slurm.sbatch", "--python=task", "--", *TRAIN, *tricky, tools=tools, **variables(tools))
    assert done.returncode == 0, done.stderr
    assert [task["arguments"] for task in seen(tools)] == [["-m", "deepstack_jax.train", *TRAIN, *tricky]] * 2


def test_fast_leaves_the_operations_as_they_are(tools):
    folder = tools.bin.parent / "elsewhere"
    assert submit(tools, "--fast", f"--cache={folder}").returncode == 0
    assert "XLA_FLAGS" not in seen(tools)[0]["environment"]
    assert seen(tools)[0]["environment"]["JAX_COMPILATION_CACHE_DIR"] == str(folder)


def test_xla_knows_the_flag_and_jax_keeps_autotuning_in_its_cache():
    """XLA ends a process with an unknown flag, on the CPU too; jax's own default ties autotuning to the compilation cache."""
    import jax

    flag = "--xla_gpu_deterministic_ops=true"
    assert flag in (LAUNCH / "slurm.sbatch").read_text()
    done = jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_deterministic_ops": True}).lower(1.0).compile()
    assert float(done(1.0)) == 2.0
    assert "xla_gpu_per_fusion_autotune_cache_dir" in jax.config.jax_persistent_cache_enable_xla_caches


def test_preempted_goes_back_into_the_queue(tools):
    done = submit(tools, CODE="75", SLURM_RESTART_COUNT="2")
    assert done.returncode == 75
    assert tools.calls()[1:] == ["squeue --noheader --jobs=4711 --format=%T", "scontrol requeue 4711"]
    assert "back into the queue (restart 3)" in done.stdout


@pytest.mark.parametrize("code", ["0", "1", "130", "134"])
def test_every_other_code_is_the_jobs_own(code, tools):
    assert submit(tools, CODE=code).returncode == int(code)
    assert len(tools.calls()) == 1


def test_a_cancelled_job_does_not_come_back(tools):
    done = submit(tools, CODE="75", STATE="COMPLETING")
    assert done.returncode == 75
    assert "the same sbatch command goes on" in done.stdout
    assert not [call for call in tools.calls() if call.startswith("scontrol")]


def test_the_shell_outlives_the_saving_when_only_it_is_told(tools):
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "--python=task", "--", *TRAIN]
    with background(command, tools.environment(**variables(tools, WAIT="60"))) as process:
        wait_for(lambda: len(seen(tools)) == 2, "both tasks")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=SECONDS) == 75
    assert tools.calls()[-1] == "scontrol requeue 4711"


def test_jax_finds_its_processes_by_itself(tools):
    """jax.distributed.initialize() without arguments: two processes, each with the device of its local number."""
    program = tools.bin.parent / "deepstack_jax" / "train.py"
    program.parent.mkdir()
    (program.parent / "__init__.py").touch()
    program.write_text(
        "import jax, os\n"
        "jax.distributed.initialize()\n"
        "seen = jax.process_index(), jax.process_count(), len(jax.devices()), len(jax.local_devices())\n"
        "os.write(1, f'seen {seen}\\n'.encode())\n"  # in one piece: both write to one pipe
    )
    options = (f"--python={sys.executable}", "--", *TRAIN)
    environment = variables(
        tools, JAX_PLATFORMS="cpu", SLURM_JOB_ID=str(os.getpid())
    )  # jax takes the port from the job's number
    done = run("slurm.sbatch", *options, tools=tools, folder=tools.bin.parent, **environment)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"seen .*", done.stdout)) == ["seen (0, 2, 2, 1)", "seen (1, 2, 2, 1)"]


def test_the_options_of_the_job():
    text = (LAUNCH / "slurm.sbatch").read_text()
    head = text[: text.index("set -euo")]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", head, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["requeue"] == ""
    assert options["signal"] == "TERM@600"  # to the tasks, ten minutes before the end; B: would tell the shell alone
    assert options["open-mode"] == "append"  # else a requeued job empties its log
    assert "gpus-per-task" not in options
    assert re.match(r"#!/usr/bin/env bash\n#SBATCH", text)  # sbatch reads options up to the first command only
