"""The `plan` verb as a user runs it."""

import importlib.util
import json

import pytest

from tests.e2e.verb import Done, verb

SMALL = {
    "image.size": 32,
    "vision.patch_size": 16,
    "vision.layers": 2,
    "decoder.layers": 5,
    "decoder.width": 64,
    "decoder.heads": 2,
    "decoder.kv_heads": 2,
    "decoder.mlp": 64,
    "train.batch_size": 8,
}


def plan(*flags: str, config: str = "configs/demo.py", changes: dict | None = None) -> Done:
    return verb(
        "plan", f"--config={config}", *(f"--config.{key}={value}" for key, value in (SMALL | (changes or {})).items()), *flags
    )


def test_plan_for_the_devices_here_as_json():
    done = plan("--topology=here", "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert (numbers["source"], numbers["devices"], numbers["fits"]) == ("here", 1, None)
    assert numbers["used"] == pytest.approx(sum(numbers["memory"].values()))
    assert numbers["memory"]["optimizer"] > numbers["memory"]["parameters"] / 2
    assert numbers["load"]["steps"] == 300
    assert 0 < numbers["model_flops"] < numbers["executed_flops"]


def test_plan_for_gpus_says_what_it_costs_and_what_fits():
    done = plan("--topology=gpu:4xH100", "--estimate_only")
    assert done.returncode == 0, done.stderr
    for words in (
        "4 devices",
        "estimated from shapes",
        "parameters",
        "TFLOPs per step",
        "all-reduce",
        "roofline",
        "MFU",
        "fits:",
    ):
        assert words in done.stdout


def test_a_model_that_does_not_fit_names_the_nearest_mesh_that_does():
    large = {"decoder.width": 16384, "decoder.mlp": 40000, "mesh.data": 4, "mesh.fsdp": 1}
    done = plan("--topology=gpu:4xH100", "--estimate_only", changes=large)
    assert done.returncode == 2, done.stderr
    assert "does not fit" in done.stdout
    assert "nearest that fits, as estimated: --config.mesh.data=1 --config.mesh.fsdp=4" in done.stdout


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ((), {}, "--topology is missing"),
        (("--topology=v7:2x2",), {}, "v5p:4x4x4"),
        (("--topology=gpu:8xH1000",), {}, "'H100'"),
        (("--topology=gpu:4xH100", "--slices=2"), {}, "only TPUs come in slices"),
        (("--topology=gpu:4xH100",), {"mesh.data": 3}, "does not cover 4 devices"),
        (("--topology=gpu:4xH100",), {"train.batch_size": 6}, "nearest valid"),
        (("--topology=here", "--estimate_only", "--config.decoder.remat=all"), {}, "remat"),
    ],
)
def test_mistakes_are_one_line(flags, changes, message):
    done = plan(*flags, changes=changes)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_without_the_compiler_the_extra_is_named():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed: there is nothing to name")
    done = plan("--topology=v5p:4x4x4")
    assert done.returncode == 1
    assert "in a clone of the repository: pip install '.[plan]'" in done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: pip install -e '.[plan]'")
def test_a_step_is_compiled_for_a_tpu_slice():
    done = plan("--topology=v5e:2x2", "--json", changes={"mesh.data": 1, "mesh.fsdp": -1})
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert (numbers["source"], numbers["devices"], numbers["hosts"], numbers["fits"]) == ("libtpu", 4, 1, True)
    assert numbers["usable"] == 15.75 * 2**30
    assert {one["kind"] for one in numbers["collectives"]} >= {"all-gather", "all-reduce"}
    assert numbers["roofline"]["step"] > 0
    several = plan("--topology=v5e:2x2", "--slices=2", "--json", changes={"mesh.data": 2, "mesh.fsdp": -1})
    assert several.returncode == 0, several.stderr
    numbers = json.loads(several.stdout)
    assert (numbers["topology"], numbers["devices"], numbers["hosts"]) == ("2 slices of v5e:2x2", 8, 2)
    crossing = [one for one in numbers["collectives"] if one["across"]]
    assert {(one["kind"], one["group"]) for one in crossing} == {("all-reduce", 2)}, "gradients along data, no parameters"
    unknown = plan("--topology=v5e:3x3")
    assert unknown.returncode == 1
    assert "nearest: v5e:2x4" in unknown.stderr
    assert unknown.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: pip install -e '.[plan]'")
def test_sparse_cores_gather_and_scatter_beside_the_products():
    """In the compiled step of a small model: each weight twice in bfloat16, each gradient once, no sum of either."""
    layers, width, mlp = 2, 1024, 2816
    sizes = {"layers": layers, "width": width, "mlp": mlp, "heads": 8, "kv_heads": 8, "head_dim": 128, "remat": "block"}
    changes = {f"decoder.{key}": size for key, size in sizes.items()} | {
        "train.compute_dtype": "bfloat16",
        "mesh.data": 1,
        "mesh.fsdp": -1,
    }
    done = plan("--topology=v6e:2x2", "--json", changes=changes)
    assert done.returncode == 0, done.stderr
    found = [one for one in json.loads(done.stdout)["collectives"] if "/block.layer/" in one["source"]]
    moved = [one["times"] * one["moved"] for one in found]
    ideal = 3 / 4 * (2 * 2 + 4) * layers * (4 * width**2 + 3 * width * mlp)
    assert sum(moved) == pytest.approx(ideal, rel=0.05)
    assert sum(size * one["hidden"] for size, one in zip(moved, found, strict=True)) >= 0.95 * sum(moved)
