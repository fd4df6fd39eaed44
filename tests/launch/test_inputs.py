"""Every script: help, a dry run that runs nothing, and one line for every mistake."""

import re

import pytest

from tests.launch.scripts import LAUNCH, TRAIN, Tools, bare_path, run

SCRIPTS = ("gke.sh", "xpk.sh", "tpu_vm.sh", "worker.sh", "slurm.sbatch", "local_multiprocess.sh")
GKE = ("create", "--name=a", "--topology=v5p:4x4x4", "--image=r/i:t", "--bucket=bucket")
XPK = ("create", "--name=a", "--cluster=c", "--zone=z", "--topology=v5p:4x4x4", "--image=r/i:t")
VM = ("up", "--name=a", "--zone=z", "--topology=v5e:4x4", "--bucket=bucket")
ARGUMENTS = {
    "gke.sh": GKE,
    "xpk.sh": XPK,
    "tpu_vm.sh": VM,
    "worker.sh": ("start",),
    "slurm.sbatch": (),
    "local_multiprocess.sh": (),
}


def test_every_script_is_known_here():
    found = {path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")}
    assert found == {*SCRIPTS, "lib.sh"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_strict_and_executable(script):
    text = (LAUNCH / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert script == "slurm.sbatch" or (LAUNCH / script).stat().st_mode & 0o100


@pytest.mark.parametrize("arguments", [(), ("--help",)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_every_flag_and_an_example(script, arguments):
    done = run(script, *arguments)
    assert done.returncode == 0
    assert f"launch/{script} " in done.stdout
    assert "set -euo" not in done.stdout
    text = (LAUNCH / script).read_text()
    taken = re.findall(r"^ +(--[a-z-]+)(?:=\*)?\)", text, re.MULTILINE)
    listed = re.findall(r'^readonly (?:FLAGS|SWITCHES)="([^"]*)"', text, re.MULTILINE)  # for parse_flags of lib.sh
    taken += [f"--{name}" for words in listed for name in re.findall(r"([a-z-]+)=", words)]
    if listed:
        taken.append("--dry-run")
    assert len(taken) > 1
    assert not [flag for flag in taken if flag not in done.stdout]


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_runs_nothing_and_passes_train_its_arguments(script, tmp_path):
    tools = Tools(tmp_path)
    for name in ("gcloud", "kubectl", "xpk", "srun", "scontrol", "squeue", "setsid", "sudo", "curl", "python"):
        tools.add(name)
    tricky = '--config.name=it\'s $HOME "q"'
    done = run(script, *ARGUMENTS[script], "--dry-run", "--", *TRAIN, tricky, tools=tools, HOME=str(tmp_path))
    assert (done.returncode, tools.calls()) == (0, [])
    assert "--config=configs/llava15.py:finetune" in done.stdout
    assert "$HOME" in done.stdout


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "worker.sh"])
def test_a_missing_tool_is_one_line_that_says_where_to_get_it(script, tmp_path):
    arguments = ("--python=python9",) if script == "slurm.sbatch" else ARGUMENTS[script]
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2"}
    done = run(script, *arguments, "--", *TRAIN, tools=Tools(tmp_path / "tools"), **job | {"PATH": bare_path(tmp_path / "bin")})
    assert one_line(done).endswith(
        {
            "gke.sh": "kubectl is not on PATH; install it with: gcloud components install kubectl gke-gcloud-auth-plugin",
            "xpk.sh": "xpk is not on PATH; install it with: pip install xpk",
            "tpu_vm.sh": "gcloud is not on PATH; install it from https://cloud.google.com/sdk/docs/install",
            "slurm.sbatch": "python9 is not on PATH; name the interpreter with --python=PATH",
            "local_multiprocess.sh": "python is not on PATH; activate the environment that has it",
        }[script]
    )


def without(arguments, flag):
    return tuple(argument for argument in arguments if not argument.startswith(f"--{flag}"))


FLAT = "valid: 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
MISTAKES = [
    ("gke.sh", ("fly",), "unknown verb 'fly'; valid: render create"),
    ("gke.sh", ("create", "--speed=9"), "unknown argument --speed=9"),
    ("gke.sh", ("create", "--slices"), "unknown argument --slices"),
    ("tpu_vm.sh", ("create", "--spot=yes"), "unknown argument --spot=yes"),
    ("gke.sh", without(GKE, "name"), "--name is missing; e.g. --name=stage2-7b"),
    ("gke.sh", (*GKE, "--name=Seven_B"), "--name=Seven_B: expected at most 40 lower-case letters"),
    ("gke.sh", (*GKE, f"--name={'a' * 41}"), "expected at most 40"),
    ("gke.sh", without(GKE, "topology"), "--topology is missing; e.g. --topology=v5p:4x4x4"),
    ("gke.sh", (*GKE, "--topology=v9:4x4"), "unknown generation 'v9'; valid: v5e v5p v6e"),
    ("gke.sh", (*GKE, "--topology=v5e:3x4"), f"v5e has no slice '3x4'; {FLAT}"),
    ("gke.sh", (*GKE, "--topology=v6e:4x4x4"), f"v6e has no slice '4x4x4'; {FLAT}"),
    ("gke.sh", (*GKE, "--topology=v5p:8x4x4"), "v5p has no slice '8x4x4'; valid: 2x2x1, 2x2x2, 2x2x4, 2x4x4, or AxBxC"),
    ("gke.sh", (*GKE, "--topology=v5p:16x20x20"), "at most 6144 chips"),
    ("gke.sh", (*GKE, "--topology=v5e:2x2", "--slices=2"), "GKE joins slices of several hosts only"),
    ("gke.sh", (*GKE, "--slices=0"), "--slices=0: expected a positive whole number"),
    ("gke.sh", without(GKE, "image"), "--image is missing"),
    ("gke.sh", without(GKE, "bucket"), "--bucket is missing"),
    ("gke.sh", (*GKE, "--bucket=gs://bucket/data"), "expected the bucket's name alone"),
    ("gke.sh", (*GKE, "--queue=a: b"), "--queue=a: b is not the name of a LocalQueue"),
    ("gke.sh", (*GKE, "--", "--config=c"), "train needs --config=FILE and --workdir=DIR after --"),
    (
        "gke.sh",
        (*GKE, "--", *TRAIN, "--a=b\nc"),
        "an argument of train holds a line break or another control character: $'--a=b\\nc'",
    ),
    ("gke.sh", (*GKE, "--", *TRAIN, "--a=b\rc"), "a line break or another control character: $'--a=b\\rc'"),
    ("gke.sh", (*GKE, "--", *TRAIN, "--a=b\u2028c"), "a line break or another control character"),
    ("gke.sh", (*GKE, "--slices=99999999999999999999"), "--slices=99999999999999999999: expected a positive whole number"),
    ("gke.sh", (*GKE, "--user=root"), "--user=root: expected the number of a user; e.g. --user=1000"),
    ("gke.sh", (*GKE, '--image=i" # '), '--image=i" #  is not the name of an image'),
    ("xpk.sh", (*XPK, "--image=-v"), "--image=-v is not the name of an image"),
    ("xpk.sh", without(XPK, "cluster"), "--cluster is missing"),
    ("xpk.sh", without(XPK, "zone"), "--zone is missing"),
    ("xpk.sh", (*XPK, "--topology=v5e:2x2"), "XPK has no v5e slice below 2x4"),
    ("xpk.sh", (*XPK, "--priority=urgent"), "--priority=urgent; valid: very-low low medium high very-high"),
    ("xpk.sh", XPK, "train needs --config=FILE"),
    ("tpu_vm.sh", without(VM, "zone"), "--zone is missing; e.g. --zone=us-east5-a"),
    ("tpu_vm.sh", (*VM, "--topology=v5p:4x4x16"), "the Cloud TPU API makes v5p-512 as 4x8x8; take that, or launch/gke.sh"),
    ("tpu_vm.sh", (*VM, "--worker=some"), "--worker=some: expected a number or all"),
    ("tpu_vm.sh", (*VM, "--poll=soon"), "--poll=soon: expected seconds"),
    ("tpu_vm.sh", VM, "train needs --config=FILE"),
    ("tpu_vm.sh", (*VM, "--bucket=gs://bucket", "--", *TRAIN), "expected the bucket's name alone"),
    ("tpu_vm.sh", (*without(VM, "bucket"), "--", *TRAIN), "--bucket is missing: train is given paths in /gcs"),
    ("worker.sh", ("install", "--bucket=-o allow_root"), "expected the bucket's name alone"),
    ("worker.sh", ("rest",), "unknown verb 'rest'; valid: install start status stop"),
    ("local_multiprocess.sh", ("--processes=two",), "--processes=two: expected a positive whole number"),
    ("local_multiprocess.sh", ("--port=70000", "--", *TRAIN), "--port=70000: expected 1 to 65535"),
    ("local_multiprocess.sh", ("--program=python -m deepstack_jax.train",), "train needs --config=FILE"),
    ("slurm.sbatch", ("--nodes=2",), "unknown argument --nodes=2"),
    ("slurm.sbatch", ("--", "--config=c"), "train needs --config=FILE and --workdir=DIR after --"),
    ("slurm.sbatch", ("--", *TRAIN), "submit it with sbatch, or look at it with --dry-run"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line(script, arguments, message, tmp_path):
    tools = Tools(tmp_path)
    for name in ("gcloud", "kubectl", "xpk", "python"):
        tools.add(name)
    assert message in one_line(run(script, *arguments, tools=tools))
    assert tools.calls() == []


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"SLURM_NTASKS_PER_NODE": "8"}, "the job has no GPUs; ask for them with sbatch --gpus-per-node=N --ntasks-per-node=N"),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}, "1 tasks per node on 8 GPUs; JAX wants one task for each"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "no tasks per node on 8 GPUs"),
    ],
)
def test_a_job_without_one_task_per_gpu_is_one_line(job, message, tmp_path):
    assert message in one_line(run("slurm.sbatch", "--", *TRAIN, tools=Tools(tmp_path), SLURM_JOB_ID="1", **job))


def one_line(done):
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.rstrip()
