"""xpk.sh against a stub xpk: the flags of XPK's parser (src/xpk/parser/workload.py) and its device types."""

import shlex

import pytest

from tests.launch.jobset_schema import filled_in
from tests.launch.scripts import TRAIN, Tools, run

CLUSTER = ("--cluster=c", "--zone=us-east5-a")


@pytest.fixture
def tools(tmp_path):
    tools = Tools(tmp_path)
    tools.add("xpk", f'printf "%s\\n" "$@" > {tmp_path}/arguments')
    tools.add("kubectl")
    return tools


def create(tools, *options, train=TRAIN):
    done = run("xpk.sh", "create", "--name=a", *CLUSTER, "--image=r/i:t", *options, "--", *train, tools=tools)
    assert done.returncode == 0, done.stderr
    words = (tools.bin.parent / "arguments").read_text().splitlines()
    assert words[:2] == ["workload", "create"]
    flags = [word.split("=", 1) for word in words[2:]]
    return {name: value for name, value in flags if name != "--env"}, [value for name, value in flags if name == "--env"]


@pytest.mark.parametrize(
    ("topology", "kind"),
    [("v5p:4x4x4", "v5p-4x4x4"), ("v5p:2x2x1", "v5p-2x2x1"), ("v5e:4x4", "v5litepod-16"), ("v6e:16x16", "v6e-256")],
)
def test_create_names_the_slice_as_xpk_does(topology, kind, tools):
    flags, environment = create(tools, f"--topology={topology}", "--slices=2", "--project=p")
    assert flags == {
        "--cluster": "c",
        "--zone": "us-east5-a",
        "--project": "p",
        "--workload": "a",
        "--tpu-type": kind,
        "--num-slices": "2",
        "--docker-image": "r/i:t",
        "--priority": "medium",
        "--max-restarts": "50",
        "--restart-on-exit-codes": "75",
        "--termination-grace-period-seconds": "120",
        "--command": "exec python -m deepstack_jax.train --config=configs/llava15.py:finetune --workdir=/gcs/runs/a",
    }
    assert environment == ["PYTHONUNBUFFERED=1"]


def test_the_command_is_read_by_a_shell_as_it_was_given(tools):
    tricky = [*TRAIN, '--config.name=it\'s $HOME "q"', "--config.x=$(PYTHONUNBUFFERED) $$ $$(HOME)"]
    flags, _ = create(tools, "--topology=v6e:4x4", train=tricky)
    assert shlex.split(filled_in(flags["--command"])) == ["exec", "python", "-m", "deepstack_jax.train", *tricky]


def test_storage_brings_the_compilation_cache(tools):
    flags, environment = create(tools, "--topology=v6e:4x4", "--storage=bucket")
    assert flags["--storage"] == "bucket"
    assert "JAX_COMPILATION_CACHE_DIR=/gcs/cache/jax" in environment


def test_list_logs_and_delete(tools):
    assert run("xpk.sh", "list", *CLUSTER, tools=tools).returncode == 0
    assert run("xpk.sh", "logs", "--name=a", tools=tools).returncode == 0
    assert run("xpk.sh", "delete", "--name=a", *CLUSTER, tools=tools).returncode == 0
    listed, logs, deleted = tools.calls()
    assert listed == "xpk workload list --cluster=c --zone=us-east5-a"
    assert "kubectl logs --follow" in logs
    assert deleted == "xpk workload delete --cluster=c --zone=us-east5-a --workload=a"
