"""tpu_vm.sh against a stub gcloud that records its calls and plays a slice of two workers, where worker.sh really runs."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.scripts import LAUNCH, SECONDS, TRAIN, Tools, background, wait_for

SLICE = ("--name=a", "--zone=z", "--topology=v5e:4x4", "--bucket=my-bucket", "--poll=0.05")
WHERE = "--zone=z --quiet"

# A state file each for the queue entry and the node, a home folder for each worker. `queue` lists the answers to come, OFFLINE
# for a call that fails; the last stays. A new entry starts with `new_queue`, the one after it with `later_queue`. `offline`
# makes every call fail; lines of `fails` calls of that kind, one after another: "ssh 0" where that worker is asked, "scp",
# "create", "delete"; "not yet ssh 0" lets one pass.
GCLOUD = r"""
shift 2; group=$1 verb=$2 worker=all command=""
for word in "$@"; do case $word in --command=*) command=${word#*=} ;; --worker=*) worker=${word#*=} ;; esac; done
cd "$STATE" || exit 9
fail() { echo "ERROR: cannot reach the server" >&2; exit 1; }
may_fail() {
  case $(head -n 1 fails 2>/dev/null) in "$*") sed -i 1d fails; fail ;; "not yet $*") sed -i 1d fails ;; esac
}
[ ! -e offline ] || fail
case "$verb" in create | delete | scp) may_fail "$verb" ;; esac
make_slice() { mkdir -p w0 w1; echo READY > node; }
gone() { echo "ERROR: NOT_FOUND: a" >&2; exit 1; }
case "$group $verb" in
  "queued-resources create") cp new_queue queue; [ ! -e later_queue ] || mv later_queue new_queue; make_slice ;;
  "tpu-vm create") make_slice ;;
  "queued-resources describe")
    [ -e queue ] || gone
    answer=$(head -n 1 queue)
    [ "$(wc -l < queue)" = 1 ] || sed -i 1d queue
    [ "$answer" != OFFLINE ] || fail
    echo "$answer" ;;
  "tpu-vm describe") [ -e node ] || gone; cat node ;;
  *" delete") rm -rf queue node w0 w1 ;;
  "tpu-vm scp") for i in 0 1; do cp "$3" "w$i/${4#a:}"; done ;;
  "tpu-vm ssh")
    [ "$worker" = all ] && worker="0 1"
    for i in $worker; do may_fail ssh "$i"; (export HOME=$STATE/w$i; cd "$HOME" && bash -c "$command") || exit; done ;;
esac
"""
# The system's Python: installs uv into --target=FOLDER.
PYTHON3 = r"""
for word in "$@"; do case $word in --target=*) mkdir -p "${word#*=}/bin"; cp "$STATE/uv" "${word#*=}/bin/uv" ;; esac; done
"""
UV = r"""#!/bin/bash
echo "uv $*" >> "$STATE/uv.log"
if [ "$1" = venv ]; then mkdir -p "${!#}/bin" && cp "$STATE/python" "${!#}/bin/python"; fi
"""
# In place of train: worker I does in its N-th run what the I-th word of line N of `plan` says: a code, or `wait` for SIGTERM.
PYTHON = r"""#!/bin/bash
number=${HOME: -1}
echo "$PWD $JAX_COMPILATION_CACHE_DIR $*" >> "$STATE/train.$number"
trap 'exit 75' TERM
todo=$(sed -n "$(wc -l < "$STATE/train.$number")p" "$STATE/plan" | cut -d' ' -f$((number + 1)))
while [ "$todo" = wait ]; do sleep 0.02; done
exit "$todo"
"""


class Slice:
    """The stub's state, and tpu_vm.sh in a repository of its own, so that what is committed there is what gets installed."""

    def __init__(self, folder: Path) -> None:
        self.state, self.tools = folder / "state", Tools(folder)
        self.state.mkdir()
        self.answers("WAITING_FOR_RESOURCES", "ACTIVE")
        self.tools.add("gcloud", GCLOUD)
        self.tools.add("mountpoint")  # the bucket is there
        self.tools.add("python3", PYTHON3)
        for name, text in (("uv", UV), ("python", PYTHON)):
            (self.state / name).write_text(text)
            (self.state / name).chmod(0o755)
        self.repository = folder / "repository"
        shutil.copytree(LAUNCH, self.repository / "launch")
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "all")):
            subprocess.run(["git", *command], cwd=self.repository, check=True)

    def answers(self, *states: str) -> None:
        (self.state / "new_queue").write_text("".join(f"{line}\n" for line in states))

    def fail(self, *calls: str) -> None:
        (self.state / "fails").write_text("".join(f"{line}\n" for line in calls))

    def plan(self, *runs: str) -> None:
        (self.state / "plan").write_text("".join(f"{line}\n" for line in runs))

    def command(self, verb: str, *options: str) -> list[str]:
        script = str(self.repository / "launch" / "tpu_vm.sh")
        return ["bash", script, verb, *SLICE, *options, "--", *TRAIN]

    @property
    def environment(self) -> dict[str, str]:
        return self.tools.environment(STATE=str(self.state))

    def run(self, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = self.command(verb, *options)
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=SECONDS, check=False)

    def calls(self) -> list[str]:
        """Calls that change something, the archive's name and what is in all of them left out."""
        calls = [call for call in self.tools.calls() if call.startswith("gcloud ")]
        archive = [word for call in calls for word in call.split() if word.endswith(".tar.gz") and "/tmp" in word]
        calls = [call.removeprefix("gcloud compute tpus ").removesuffix(f" {WHERE}") for call in calls]
        calls = [call for call in calls if " describe " not in call and not call.endswith("worker.sh status")]
        return [
            call.replace(name, "ARCHIVE") for call in calls for name in [next((n for n in archive if n in call), "ARCHIVE")]
        ]

    def runs(self, worker: int) -> list[str]:
        path = self.state / f"train.{worker}"
        return path.read_text().splitlines() if path.exists() else []

    def exit_codes(self) -> list[str]:
        return [path.read_text().strip() for path in sorted(self.state.glob("w?/run/exit"))]


@pytest.fixture
def tpu(tmp_path):
    made = Slice(tmp_path)
    yield made
    for path in made.state.glob("w?/run/pid"):
        if not path.with_name("exit").exists():
            subprocess.run(["kill", "-KILL", "--", f"-{path.read_text().strip()}"], stderr=subprocess.DEVNULL, check=False)


CREATE = "queued-resources create a --node-id=a --runtime-version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-16"
COPY = "tpu-vm scp ARCHIVE a:deepstack_jax.tar.gz --worker=all"
INSTALL = (
    "tpu-vm ssh a --worker=all --command=rm -rf deepstack_jax && tar xzf deepstack_jax.tar.gz && "
    "bash deepstack_jax/launch/worker.sh install --bucket=my-bucket"
)
START = f"tpu-vm ssh a --worker=all --command=bash deepstack_jax/launch/worker.sh start --unless-running -- {' '.join(TRAIN)}"
DELETE = "queued-resources delete a --force"


def test_up_waits_installs_runs_and_ends_with_the_run(tpu):
    tpu.plan("0 0")
    done = tpu.run("up")
    assert done.returncode == 0, done.stderr
    assert tpu.calls() == [CREATE, COPY, INSTALL, START]
    assert "a waits for its chips" in done.stdout
    assert "a is done" in done.stdout
    for worker in (0, 1):
        home = tpu.state / f"w{worker}"
        assert tpu.runs(worker) == [f"{home}/deepstack_jax /gcs/cache/jax -m deepstack_jax.train {' '.join(TRAIN)}"]
        pinned = f"--constraints={home}/deepstack_jax/constraints.txt --build-constraints={home}/deepstack_jax/constraints.txt"
        installed = f"pip install --quiet --python={home}/venv/bin/python {pinned} {home}/deepstack_jax[tpu]"
        assert installed in (tpu.state / "uv.log").read_text()
    assert tpu.exit_codes() == ["0", "0"]


def test_a_preempted_slice_is_made_anew_and_the_run_goes_on(tpu):
    tpu.plan("wait wait", "0 0")
    with background(tpu.command("up"), tpu.environment) as process:
        wait_for(lambda: tpu.runs(0) and tpu.runs(1), "both workers")
        pids = [path.read_text().strip() for path in tpu.state.glob("w?/run/pid")]
        for pid in pids:
            os.killpg(int(pid), signal.SIGKILL)
        (tpu.state / "node").write_text("PREEMPTED\n")
        (tpu.state / "queue").write_text("SUSPENDED\n")
        assert process.wait(timeout=SECONDS) == 0
        assert "a: preempted; restart 1 of 20" in process.stdout.read()
    assert tpu.calls() == [CREATE, COPY, INSTALL, START, DELETE, CREATE, COPY, INSTALL, START]
    assert len(pids) == len(tpu.runs(0)) == len(tpu.runs(1)) == 2
    assert len(set(tpu.runs(0))) == 1  # the very same command: train resumes from its workdir


@pytest.mark.parametrize(
    ("fails", "calls"),
    [
        (["scp", "scp"], [COPY, COPY, COPY, INSTALL, START]),
        (["ssh 1"], [COPY, INSTALL, COPY, INSTALL, START]),
        (["not yet ssh 1", "ssh 1"], [COPY, INSTALL, START, START]),
    ],
    ids=["copying", "installing", "starting"],
)
def test_ssh_that_does_not_answer_yet_is_tried_again(fails, calls, tpu):
    """A new slice is READY before its ssh is; a worker that started already is not started twice."""
    tpu.plan("wait wait")
    tpu.fail(*fails)
    with background(tpu.command("up"), tpu.environment) as process:
        wait_for(lambda: tpu.runs(0) and tpu.runs(1), "both workers")
        assert tpu.run("stop").returncode == 0
        assert process.wait(timeout=SECONDS) == 75
    assert tpu.calls()[: len(calls) + 1] == [CREATE, *calls]
    assert len(tpu.runs(0)) == len(tpu.runs(1)) == 1


@pytest.mark.parametrize(
    ("fails", "calls"),
    [
        (["delete"], [DELETE, DELETE, CREATE, COPY, INSTALL, START]),
        (["create"], [DELETE, CREATE, CREATE, COPY, INSTALL, START]),
    ],
    ids=["deleting", "creating"],
)
def test_a_call_that_fails_after_a_preemption_is_tried_again(fails, calls, tpu):
    tpu.plan("0 0")
    tpu.fail(*fails)
    (tpu.state / "queue").write_text("SUSPENDED SERVICE\n")
    assert tpu.run("watch").returncode == 0
    assert tpu.calls() == calls


def test_up_on_a_slice_that_was_taken_away_makes_it_anew(tpu):
    tpu.plan("0 0")
    (tpu.state / "queue").write_text("SUSPENDED SERVICE\n")
    assert tpu.run("up").returncode == 0
    assert tpu.calls() == [DELETE, CREATE, COPY, INSTALL, START]


def test_taken_away_while_it_is_installed_the_slice_is_made_anew(tpu):
    tpu.plan("0 0")
    tpu.fail("scp")
    tpu.answers("ACTIVE", "SUSPENDED SERVICE")
    (tpu.state / "later_queue").write_text("ACTIVE\n")
    assert tpu.run("up").returncode == 0
    assert tpu.calls() == [CREATE, COPY, DELETE, CREATE, COPY, INSTALL, START]


def test_what_fails_again_and_again_ends_with_the_slice_kept(tpu):
    tpu.plan("0 0")
    tpu.fail(*5 * ["scp"])
    done = tpu.run("up")
    assert done.returncode == 1
    assert "error: gcloud failed 5 times in a row; the slice costs until launch/tpu_vm.sh delete" in done.stderr
    assert tpu.calls() == [CREATE, *5 * [COPY]]
    assert tpu.run("up").returncode == 0  # on the slice that is there
    assert tpu.calls()[6:] == [COPY, INSTALL, START]


def test_up_beside_a_run_is_refused(tpu):
    tpu.plan("wait wait")
    assert [tpu.run(verb).returncode for verb in ("create", "install", "run")] == [0, 0, 0]
    done = tpu.run("up")
    assert done.returncode == 1
    assert "error: a run goes on already on a; launch/tpu_vm.sh watch follows it, stop ends it" in done.stderr
    assert len(tpu.runs(0)) == 1
    assert tpu.run("stop").returncode == 0


def test_a_lost_worker_is_no_failure_of_those_that_miss_it(tpu):
    tpu.plan("wait wait", "0 0")
    with background(tpu.command("up"), tpu.environment) as process:
        wait_for(lambda: tpu.runs(0) and tpu.runs(1), "both workers")
        pids = [int((tpu.state / f"w{worker}/run/pid").read_text()) for worker in (0, 1)]
        os.killpg(pids[0], signal.SIGKILL)
        wait_for(lambda: "exit=lost\nexit=running\n" in tpu.run("status").stdout, "worker 0 to be missed")
        (tpu.state / "w1/run/exit").write_text("134\n")
        os.killpg(pids[1], signal.SIGKILL)
        assert process.wait(timeout=SECONDS) == 0
    assert len(tpu.runs(0)) == len(tpu.runs(1)) == 2


def test_a_slice_that_is_gone_is_not_rented_again(tpu):
    done = tpu.run("watch")
    assert done.returncode == 1
    assert done.stderr == "error: a was deleted, or is not in z; launch/tpu_vm.sh up makes it again\n"
    assert tpu.calls() == []


@pytest.mark.parametrize("seen", [None, "SUSPENDING USER", "SUSPENDED USER", "DELETING"])
def test_deleted_while_it_is_watched_it_stays_deleted(seen, tpu):
    """Whatever of the deletion the watcher happens to see."""
    tpu.plan("wait wait")
    with background(tpu.command("up"), tpu.environment) as process:
        wait_for(lambda: any("worker.sh status" in call for call in tpu.tools.calls()), "the watch to begin")
        pids = [int(path.read_text()) for path in tpu.state.glob("w?/run/pid")]
        if seen:
            (tpu.state / "queue").write_text(f"{seen}\n")
            looks = len(tpu.tools.calls())
            wait_for(lambda: len(tpu.tools.calls()) > looks + 2 or process.poll() is not None, "the watcher to see it")
        assert tpu.run("delete").returncode == 0
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)
        assert process.wait(timeout=SECONDS) == 1
        assert "error: a was deleted" in process.stdout.read()
    assert tpu.calls().count(CREATE) == 1


def test_preempted_by_the_service_while_it_is_watched(tpu):
    tpu.plan("0 0")
    (tpu.state / "queue").write_text("SUSPENDING SERVICE\nSUSPENDED SERVICE\n")
    assert tpu.run("watch").returncode == 0
    assert tpu.calls() == [DELETE, CREATE, COPY, INSTALL, START]


def test_exit_code_75_starts_again_on_the_same_slice(tpu):
    tpu.plan("75 75", "75 0", "0 0")
    done = tpu.run("up")
    assert done.returncode == 0, done.stderr
    assert tpu.calls() == [CREATE, COPY, INSTALL, START, START, START]
    assert "a: again; restart 2 of 20" in done.stdout


def test_restarts_are_bounded(tpu):
    tpu.plan("75 75", "75 75", "75 75")
    done = tpu.run("up", "--max-restarts=2")
    assert done.returncode == 1
    assert "error: a was stopped more than 2 times; --max-restarts allows more" in done.stderr


def test_a_failure_stops_the_other_workers_and_is_the_exit_code(tpu):
    tpu.plan("wait 3")
    done = tpu.run("up")
    assert done.returncode == 3
    assert "error: train failed on a with code 3; launch/tpu_vm.sh tail shows why" in done.stderr
    assert tpu.calls()[-1].endswith("worker.sh stop")
    wait_for(lambda: tpu.exit_codes() == ["75", "3"], "worker 0 to save")


def test_stop_saves_and_is_no_preemption(tpu):
    tpu.plan("wait wait")
    with background(tpu.command("up"), tpu.environment) as process:
        wait_for(lambda: tpu.runs(0) and tpu.runs(1), "both workers")
        assert tpu.run("stop").returncode == 0
        assert process.wait(timeout=SECONDS) == 75
        assert "a was stopped by hand" in process.stdout.read()
    assert tpu.exit_codes() == ["75", "75"]
    assert len(tpu.runs(0)) == 1


def test_a_vanished_process_is_started_again(tpu):
    tpu.plan("wait wait", "0 0")
    with background(tpu.command("up"), tpu.environment) as process:
        wait_for(lambda: tpu.runs(0) and tpu.runs(1), "both workers")
        for path in tpu.state.glob("w?/run/pid"):
            os.killpg(int(path.read_text()), signal.SIGKILL)
        assert process.wait(timeout=SECONDS) == 0


def test_two_runs_at_once_are_refused(tpu):
    tpu.plan("wait wait")
    assert [tpu.run(verb).returncode for verb in ("create", "install", "run")] == [0, 0, 0]
    again = tpu.run("run")
    assert again.returncode == 1
    assert "a run goes on already on" in again.stderr
    assert "exit=running\nexit=running\n" in tpu.run("status").stdout
    assert tpu.run("stop").returncode == 0


def test_without_a_network_nothing_is_deleted(tpu):
    (tpu.state / "offline").touch()
    done = tpu.run("watch")
    assert done.returncode == 1
    assert "gcloud failed 5 times in a row; the slice costs until launch/tpu_vm.sh delete, a run may go on" in done.stderr
    assert tpu.calls() == []


def test_a_call_that_fails_does_not_end_the_waiting(tpu):
    tpu.plan("0 0")
    tpu.answers("OFFLINE", "WAITING_FOR_RESOURCES", *4 * ["OFFLINE"], "PROVISIONING", "OFFLINE", "ACTIVE")
    done = tpu.run("up")
    assert done.returncode == 0, done.stderr
    assert tpu.calls() == [CREATE, COPY, INSTALL, START]


def test_many_failed_calls_end_the_waiting(tpu):
    tpu.answers("WAITING_FOR_RESOURCES", "OFFLINE")
    done = tpu.run("create")
    assert done.returncode == 1
    assert "gcloud failed 5 times in a row; a stays in the queue, and the same command goes on waiting" in done.stderr
    assert tpu.calls() == [CREATE]


def test_interrupted_in_the_queue_up_goes_on_waiting(tpu):
    tpu.plan("0 0")
    tpu.answers("WAITING_FOR_RESOURCES")
    with background(tpu.command("up"), tpu.environment) as process:
        wait_for(lambda: sum(" describe " in call for call in tpu.tools.calls()) > 1, "the queue")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=SECONDS) != 0
    (tpu.state / "queue").write_text("WAITING_FOR_RESOURCES\nACTIVE\n")
    done = tpu.run("up")
    assert done.returncode == 0, done.stderr
    assert "a is in the queue already" in done.stdout
    assert tpu.calls() == [CREATE, COPY, INSTALL, START]


def test_on_demand_spot_project_and_version(tpu):
    tpu.plan("0 0")
    assert tpu.run("create", "--on-demand", "--spot", "--topology=v6e:2x4", "--runtime-version=v9").returncode == 0
    assert tpu.run("delete", "--on-demand", "--project=p").returncode == 0
    looked, create, *_, delete = tpu.tools.calls()
    assert looked == f"gcloud compute tpus tpu-vm describe a --format=value(state) {WHERE}"
    assert create == f"gcloud compute tpus tpu-vm create a --version=v9 --accelerator-type=v6e-8 --spot {WHERE}"
    assert delete == "gcloud compute tpus tpu-vm delete a --zone=z --project=p --quiet"


def test_a_queue_entry_that_fails_is_said(tpu):
    tpu.plan("0 0")
    (tpu.state / "queue").write_text("FAILED\n")
    done = tpu.run("watch")
    assert done.returncode == 1
    assert "the queue entry of a failed; launch/tpu_vm.sh status shows why" in done.stderr


def test_tail_follows_one_worker(tpu):
    assert tpu.run("tail", "--worker=1", "--dry-run").stdout == (
        f"gcloud compute tpus tpu-vm ssh a --worker=1 '--command=tail -n 100 -F run/log' {WHERE}\n"
    )


def test_changes_that_are_not_committed_are_told(tpu):
    (tpu.repository / "new.py").touch()
    assert "warning: changes that are not committed are not installed" in tpu.run("install", "--dry-run").stderr


@pytest.mark.parametrize(("topology", "kind"), [("v5p:4x4x4", "v5p-128"), ("v5p:2x2x1", "v5p-8"), ("v5p:4x8x12", "v5p-768")])
def test_v5p_is_counted_in_tensorcores(tpu, topology, kind):
    done = tpu.run("create", f"--topology={topology}", "--dry-run")
    assert f"--runtime-version=v2-alpha-tpuv5 --accelerator-type={kind} " in done.stdout


class Worker:
    """worker.sh on a machine of its own, with python that ends at once."""

    def __init__(self, tpu):
        self.home, self.tools, self.environment = tpu.state / "home", tpu.tools, tpu.environment
        tpu.plan("0")
        (self.home / "venv" / "bin").mkdir(parents=True)
        shutil.copy(tpu.state / "python", self.home / "venv" / "bin" / "python")

    def run(self, *arguments):
        command = ["bash", str(LAUNCH / "worker.sh"), *arguments]
        environment = self.environment | {"HOME": str(self.home)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def worker(tpu):
    return Worker(tpu)


OWNER = f"--uid={os.getuid()} --gid={os.getgid()}"  # else root's, and train could not write there
MOUNT = ["sudo mkdir -p /gcs", f"sudo gcsfuse --implicit-dirs {OWNER} -o allow_other my-bucket /gcs"]


def test_worker_mounts_the_bucket_once_and_again_after_a_restart_of_the_machine(worker):
    for name, body in (("mountpoint", "exit 1"), ("sudo", ""), ("gcsfuse", "")):
        worker.tools.add(name, body)
    worker.run("install", "--bucket=my-bucket")
    assert worker.tools.calls()[-2:] == MOUNT
    worker.tools.add("mountpoint", "exit 0")
    for command in (("install", "--bucket=my-bucket"), ("start", "--", *TRAIN)):
        before = len(worker.tools.calls())
        worker.run(*command)
        assert {call for call in worker.tools.calls()[before:] if "python3" not in call} == {"mountpoint -q /gcs"}
    wait_for(lambda: worker.run("status") == "exit=0\n", "the run")
    worker.tools.add("mountpoint", "exit 1")
    before = len(worker.tools.calls())
    worker.run("start", "--", *TRAIN)
    assert [call for call in worker.tools.calls()[before:] if call.startswith("sudo")] == MOUNT


def test_worker_installs_what_is_pinned_and_runs_nothing_that_it_downloads(worker):
    """uv by its checksum, gcsfuse by its version and Google's key, without a shell of root's that reads what was fetched."""
    for name, body in (("mountpoint", "exit 1"), ("sudo", ""), ("lsb_release", "echo jammy"), ("curl", "")):
        worker.tools.add(name, body)
    for name in ("bash", "cat", "chmod", "cp", "dirname", "grep", "id", "mkdir", "mktemp", "rm", "sed"):
        (worker.tools.bin / name).symlink_to(shutil.which(name))
    worker.environment["PATH"] = str(worker.tools.bin)  # no gcsfuse
    worker.run("install", "--bucket=my-bucket")
    calls = [call for call in worker.tools.calls() if not call.startswith(("mountpoint", "lsb_release"))]
    scratch = next(word for word in calls[2].split() if word.endswith("/key")).removesuffix("/key")
    assert [call.replace(scratch, "SCRATCH").replace(str(LAUNCH), "LAUNCH") for call in calls] == [
        "python3 -m pip --version",
        f"python3 -m pip install --quiet --upgrade --target={worker.home}/.local/uv --require-hashes --only-binary=:all: "
        "--requirement=LAUNCH/uv.txt",
        "curl --fail --silent --show-error --location --proto =https --output SCRATCH/key "
        "https://packages.cloud.google.com/apt/doc/apt-key.gpg",
        "sudo install -m 644 SCRATCH/key /usr/share/keyrings/cloud.google.asc",
        "sudo install -m 644 SCRATCH/list /etc/apt/sources.list.d/gcsfuse.list",
        "sudo apt-get update -qq -o DPkg::Lock::Timeout=600",
        "sudo apt-get install -qq -o DPkg::Lock::Timeout=600 gcsfuse=3.11.2",
        *MOUNT,
    ]
    assert not Path(scratch).exists()


def test_train_gets_its_arguments_as_they_were_given(tpu):
    """Through ssh, the shell of every worker and the one around train: nothing in them is read as code or as another word."""
    tpu.plan("0 0")
    tricky = ["--config.name=it's; touch owned", '--config.x=$(touch owned) `touch owned` "q"', "--config.y=* a  b \\ # & |"]
    command = [*tpu.command("up"), *tricky]
    done = subprocess.run(command, capture_output=True, text=True, env=tpu.environment, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    for worker in (0, 1):
        (run,) = tpu.runs(worker)
        assert run.endswith(" ".join(tricky))
    assert not list(tpu.state.parent.rglob("owned"))


def test_what_a_worker_writes_of_a_run_is_for_its_owner_alone(worker):
    worker.run("start", "--", *TRAIN)
    wait_for(lambda: worker.run("status") == "exit=0\n", "the run")
    assert (worker.home / "run").stat().st_mode & 0o777 == 0o700


def test_after_a_restart_of_the_machine_the_process_id_is_a_strangers(worker):
    run_folder = worker.home / "run"
    run_folder.mkdir()
    with background(["sleep", "600"], worker.environment) as stranger:
        (run_folder / "pid").write_text(f"{stranger.pid}\n")
        for boot in (None, "11111111-2222-3333-4444-555555555555\n"):
            if boot:
                (run_folder / "boot").write_text(boot)
            assert worker.run("status") == "exit=lost\n"
            worker.run("stop")
            assert stranger.poll() is None
        shutil.copy("/proc/sys/kernel/random/boot_id", run_folder / "boot")
        assert worker.run("status") == "exit=running\n"
        worker.run("stop")
        assert stranger.wait(timeout=SECONDS) == -signal.SIGTERM
