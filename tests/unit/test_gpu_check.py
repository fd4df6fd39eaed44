"""The check of a GPU, on a CPU: its stages go on without each other, the tables say what the results say."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check import attention, child, profile, programs, step, tables
from benchmarks.gpu_check.record import AbsentError, Record, target
from benchmarks.gpu_check.sizes import SIZES
from benchmarks.gpu_check.stages import BUDGET, NAMES, STAGES, Stage, listing
from benchmarks.gpu_check.step import fp8, full
from deepstack_jax.data.order.packing import RowCapacity
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core.optimizer import flatten
from deepstack_jax.weights.names import NameTable
from tests.e2e.verb import ENVIRONMENT, REPOSITORY

TINY = SIZES["tiny"]
WRITES = "import json, os, signal, sys; json.dump({'one': {'got': 1}}, open(sys.argv[1], 'w')); "
ENDS = {
    "well": "",
    "crash": "os.kill(os.getpid(), signal.SIGKILL)",
    "error": "raise ValueError('no such kernel')",
    "absent": "sys.exit(3)",
    "last": "",
}


@pytest.fixture
def stages(monkeypatch):
    """Stages that end in every way, and how often each ran."""
    ran = []

    def command(stage, size, figures, earlier, limit):
        ran.append(stage.name)
        return [sys.executable, "-c", WRITES + ENDS[stage.name], str(figures)]

    monkeypatch.setattr(check, "STAGES", tuple(Stage(name, "a", "", 1, 60, name) for name in ENDS))
    monkeypatch.setattr(check, "child_command", command)
    return ran


def run(tmp_path, only=(), budget=1000.0):
    output = tmp_path / "results.json"
    here = {"device": "cpu", "sources": "x", "versions": {"jax": "1"}}
    results = check.open_results(output, here, "tiny")
    code = check.run_all(results, output, list(only), tmp_path, budget)
    return code, json.loads(output.read_text())["stages"] if output.exists() else {}


def test_a_stage_that_ends_badly_loses_no_figures_of_its_own_nor_of_others(stages, tmp_path):
    code, found = run(tmp_path)
    assert code == 1
    assert {name: one["status"] for name, one in found.items()} == {
        "well": "done",
        "crash": "failed",
        "error": "failed",
        "absent": "absent",
        "last": "done",
    }
    assert all(one["figures"] == {"one": {"got": 1}} for one in found.values())
    assert found["error"]["said"][-1] == "ValueError: no such kernel"


def test_the_same_call_runs_what_is_not_done_and_only_that(stages, tmp_path):
    run(tmp_path)
    stages.clear()
    _, found = run(tmp_path)
    assert stages == ["crash", "error", "absent"]
    assert list(found) == list(ENDS)
    stages.clear()
    run(tmp_path, only=["well"])
    assert stages == ["well"], "named, it runs again"


def test_a_stage_beyond_its_limit_is_ended_and_the_next_one_runs(stages, tmp_path, monkeypatch):
    monkeypatch.setitem(ENDS, "crash", "signal.pause()")
    monkeypatch.setattr(check, "STAGES", tuple(Stage(name, "a", "", 1, 1 if name == "crash" else 60, "") for name in ENDS))
    code, found = run(tmp_path)
    assert (code, found["crash"]["status"], found["last"]["status"]) == (1, "late", "done")


def test_what_a_stage_started_ends_with_it(stages, tmp_path, monkeypatch):
    held = tmp_path / "held"
    held.touch()
    keeps = "import fcntl, subprocess; file = open(r'%s'); fcntl.flock(file, fcntl.LOCK_EX); "
    keeps += "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], pass_fds=[file.fileno()]); "
    monkeypatch.setitem(ENDS, "well", keeps % held + "signal.pause()")
    monkeypatch.setattr(check, "STAGES", (Stage("well", "a", "", 1, 1, ""),))
    assert run(tmp_path)[1]["well"]["status"] == "late"
    with held.open() as file:
        free = threading.Thread(target=fcntl.flock, args=(file, fcntl.LOCK_EX), daemon=True)
        free.start()
        free.join(60)
        assert not free.is_alive(), "a process of the stage still holds the file"


@pytest.fixture
def check_process(tmp_path):
    """The check as a process, whose only stage starts a process, saves a figure, and then hangs where no signal is heard."""
    held, code = tmp_path / "held", tmp_path / "code.py"
    held.touch()
    hangs = f"import fcntl, signal, subprocess; file = open({str(held)!r}); fcntl.flock(file, fcntl.LOCK_EX); "
    hangs += "[signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)]; "
    hangs += "subprocess.Popen(['sleep', '600'], pass_fds=[file.fileno()]); " + WRITES + "signal.sigwait([signal.SIGUSR1])"
    started = "from benchmarks.gpu_check import child; child.watched(600.0); " + hangs
    code.write_text(
        "import sys\nfrom pathlib import Path\nfrom benchmarks.gpu_check import __main__ as check\n"
        f"check.STAGES = (check.Stage('one', 'a', '', 1, 600, ''), check.Stage('two', 'a', '', 1, 600, ''))\n"
        f"check.child_command = lambda stage, size, figures, *_: [sys.executable, '-c', {started!r}, str(figures)]\n"
        "results = {'size': 'tiny', 'machine': {}, 'stages': {}}\n"
        f"sys.exit(check.run_all(results, Path({str(tmp_path / 'out.json')!r}), [], Path({str(tmp_path)!r}), 1000.0))\n"
    )
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, str(code)], stdout=subprocess.PIPE, text=True, env=environment)
    yield process
    process.kill()
    process.wait()


def saved(tmp_path):
    """The results as soon as they have a figure."""
    for _ in range(6000):
        if (file := tmp_path / "out.json").exists() and (found := json.loads(file.read_text())["stages"])["one"]["figures"]:
            return found
        threading.Event().wait(0.02)
    raise AssertionError("no figure was saved")


def freed(tmp_path):
    """Whether all processes end that hold the file."""
    with (tmp_path / "held").open() as file:
        free = threading.Thread(target=fcntl.flock, args=(file, fcntl.LOCK_EX), daemon=True)
        free.start()
        free.join(60)
        return not free.is_alive()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_stage_with_what_it_started_and_keeps_its_figures(number, code, check_process, tmp_path):
    assert saved(tmp_path)["one"]["status"] == "cut off", "as it would be told if nothing came after"
    check_process.send_signal(number)
    said, _ = check_process.communicate(timeout=60)
    assert check_process.returncode == code
    assert said.splitlines()[-1].startswith(f"stopped by a signal; what was found is in {tmp_path / 'out.json'}")
    found = json.loads((tmp_path / "out.json").read_text())["stages"]
    assert list(found) == ["one"]
    assert (found["one"]["status"], found["one"]["figures"]) == ("stopped", {"one": {"got": 1}})
    assert freed(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_a_check_that_is_killed_leaves_its_figures_and_no_stage_behind(check_process, tmp_path):
    saved(tmp_path)
    stage = subprocess.run(["ps", "-o", "pid=", "--ppid", str(check_process.pid)], capture_output=True, text=True, check=True)
    check_process.kill()
    check_process.wait()
    for _ in range(3000):
        if not Path(f"/proc/{int(stage.stdout)}").exists():
            break
        threading.Event().wait(0.02)
    assert not Path(f"/proc/{int(stage.stdout)}").exists()
    assert json.loads((tmp_path / "out.json").read_text())["stages"]["one"]["figures"] == {"one": {"got": 1}}


def test_a_stage_that_is_run_again_and_ends_badly_keeps_what_it_had(stages, tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(check, "child_command", lambda *_: [sys.executable, "-c", "raise SystemExit(1)"])
    _, found = run(tmp_path, only=["well"])
    assert (found["well"]["status"], found["well"]["figures"]) == ("failed", {"one": {"got": 1}})


def test_without_time_left_no_stage_begins(stages, tmp_path, capsys):
    code, found = run(tmp_path, budget=check.LEAST / 2)
    assert (code, found, stages) == (1, {}, [])
    assert "make the same call again" in capsys.readouterr().out


def test_results_of_another_device_are_not_gone_on_with(stages, tmp_path):
    run(tmp_path)
    other = {"device": "gpu", "sources": "x", "versions": {"jax": "1"}}
    file = tmp_path / "results.json"
    assert check.open_results(file, other, "tiny")["stages"] == {}
    with pytest.raises(SystemExit, match=r"another device; --only=well would leave nothing .* add --anew"):
        check.open_results(file, other, "tiny", ["well"])
    assert check.open_results(file, other, "tiny", ["well"], anew=True)["stages"] == {}


def test_results_of_another_torch_lose_its_stages_alone(stages, tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(check, "STAGES", tuple(Stage(name, "a", "", 1, 60, "", peer=name == "last") for name in ENDS))
    other = {"device": "cpu", "sources": "x", "versions": {"jax": "1", "torch": "2"}}
    kept = check.open_results(tmp_path / "results.json", other, "tiny")["stages"]
    assert list(kept) == [name for name in ENDS if name != "last"]


def test_the_list_names_every_stage_and_together_they_fit_the_budget(capsys):
    assert all(name in listing() for name in NAMES)
    assert sum(stage.expected for stage in STAGES) <= BUDGET
    assert {stage.part for stage in STAGES} == set("abcdefg")
    for stage in STAGES:
        module, function = stage.function.split(":")
        text = (REPOSITORY / "benchmarks" / "gpu_check" / f"{module}.py").read_text()
        assert f"def {function}(record: Record)" in text


@pytest.fixture(scope="module")
def config():
    return programs.config_of(TINY, {"decoder.layers": TINY.layers})


def hashed(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a tensor of this name is, in Python's whole numbers."""
    if programs.kind_of(name) != "hashed":
        return np.full(shape, programs.kind_of(name) == "ones", np.float32)
    numbers = []
    for at in range(int(np.prod(shape))):
        mixed = (at * 2654435761 + programs.seed_of(name)) % 2**32
        mixed = (mixed ^ mixed >> 16) * 2246822507 % 2**32
        numbers.append((mixed ^ mixed >> 13) >> 8)
    spread = np.float32(programs.SPREAD)
    return ((np.array(numbers, np.float32) * np.float32(2**-24) - np.float32(0.5)) * spread).reshape(shape)


def test_parameters_are_a_function_of_official_names_to_the_bit(config):
    program = programs.build(config)
    with use_mesh(program.mesh):
        state = programs.made_state(program)
    table, leaves = NameTable(config), flatten(jax.device_get(state.params))
    names = [name for name in table.tensors if ".layers.0." in name or ".layers." not in name]
    assert {programs.kind_of(name) for name in names} == {"hashed", "ones", "zeros"}
    for name in [*names, "model.layers.4.mlp.down_proj.weight"]:
        np.testing.assert_array_equal(table.theirs(name, leaves), hashed(name, table.tensors[name].shape), name)


STRING = {"deepstack.sequence": "global_crops", "deepstack.stack": "none", "data.max_length": TINY.string[1]}


@pytest.mark.parametrize("changes", [{}, STRING], ids=["L", "string"])
def test_the_batch_is_packed_as_a_run_would_and_nearly_full(changes):
    config = programs.config_of(TINY, changes)
    batch = programs.packed_batch(config, 2)
    limits = RowCapacity.of(config.data_spec)
    assert batch.tokens.shape == (2, limits.tokens)
    assert batch.pixels.shape[1] == limits.crops
    assert (batch.segment_ids > 0).mean() > 0.8
    assert (batch.segment_ids.max(axis=1) > 1).all(), "several examples in a row"
    assert (batch.visual_index >= 0).any()
    assert batch.loss_weights.any()


def test_lengths_are_those_of_the_mixture():
    tokens, has_image = programs.lengths(20_000)
    assert 0.93 < has_image.mean() < 0.95
    assert 140 < tokens[has_image].mean() < 160
    assert tokens[~has_image].mean() > 500


@pytest.mark.slow
def test_the_step_is_measured_on_a_cpu_and_its_figures_are_kept(tmp_path):
    record = Record(TINY, tmp_path / "step.json", {}, 60)
    full(record)
    kept = json.loads((tmp_path / "step.json").read_text())
    assert list(kept) == ["plain product", "tried", "step"]
    found = kept["step"]
    assert len(found["seconds"]) == TINY.repeats
    assert found["losses"] == sorted(found["losses"], reverse=True)
    assert found["tokens/s"] * found["s/step"] == pytest.approx(TINY.rows * TINY.length * found["useful positions"])
    assert set(found["model TFLOPs"]) == {"tower", "projector", "decoder", "attention", "head"}
    assert found["MFU"] is None, "nothing is published of a CPU"


def test_a_step_that_does_not_fit_is_measured_with_fewer_layers(tmp_path, monkeypatch):
    tried = []

    def measure(record, name, config, peak=0.0, **_):
        tried.append(config.decoder.layers)
        if tried[-1] > 7:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return {"layers": config.decoder.layers}

    monkeypatch.setattr(step, "measure", measure)
    record = Record(dataclasses.replace(TINY, layers=10), tmp_path / "step.json", {}, 60)
    assert step.measure_fitting(record, 0.0).decoder.layers == 6
    assert tried == [10, 8, 6]
    record.earlier["step"] = {"step": {"layers": 10, "remat": "dots"}}
    compared = []

    def beside(record, config):
        compared.append((step.measure(record, "lora", config), step.whole_step(record, config)))

    step.with_fewer(record, beside)
    assert compared == [({"layers": 6}, {"layers": 6})], "with the step of as many layers"


OURS, MASKED = ("xla", "xla"), ("cudnn_mask", "cudnn")


@pytest.mark.parametrize(
    ("seen", "raised", "tried"),
    [
        ({}, [], [OURS]),
        ({}, [jax.errors.JaxRuntimeError("INTERNAL: no engine for this graph")], [OURS, MASKED]),
        ({}, [FloatingPointError("losses [nan]")], [OURS, MASKED]),
        ({"refused": "its results are other ones"}, [NotImplementedError("cuDNN 9.1")], [MASKED, ("xla", "xla")]),
    ],
    ids=["runs", "does not compile", "no numbers", "seen before"],
)
def test_attention_that_does_not_run_is_replaced_and_the_figures_say_so(seen, raised, tried, tmp_path, monkeypatch):
    found = []

    def measure(record, name, config, peak, kernels):
        found.append(tuple(kernels))
        if len(found) <= len(raised):
            raise raised[len(found) - 1]

    monkeypatch.setattr(step, "measure", measure)
    record = Record(TINY, tmp_path / "step.json", {"kernels": {attention.TINY[0].name: seen}}, 60)
    step.measure_fitting(record, 0.0)
    assert found == tried
    record.earlier["step"] = {"tried": {"kernels": [OURS[0]]}}
    found.clear()
    raised.clear()
    step.measure_fitting(record, 0.0)
    assert found == [MASKED], "what brought an earlier process down is not tried again"
    record.earlier["step"] = {"step": {"kernel": "cudnn_mask", "tower kernel": "cudnn"}}
    monkeypatch.setattr(programs, "build_program", lambda *given: given[-1])
    assert programs.build(programs.config_of(TINY, {}), step.kernels_in_step(record)) == MASKED, "what later stages build"


def test_a_kernel_that_fails_or_computes_something_else_does_not_end_the_others(tmp_path, monkeypatch):
    ways = iter(
        [ValueError("no such layout\nmore"), {"apart": [1e-4, float("nan")], "equal": False}, {"apart": [1e-4], "equal": True}]
    )

    def check(case):
        way = next(ways)
        if isinstance(way, Exception):
            raise way
        return way

    monkeypatch.setattr(attention, "check", check)
    attention.compare(Record(TINY, tmp_path / "kernels.json", {}, 60))
    found = json.loads((tmp_path / "kernels.json").read_text())
    goal = found.pop("goal: share of kernels that are equal")
    assert [one.get("refused") for one in found.values()] == [
        "ValueError no such layout",
        "its results are other ones",
        None,
    ]
    assert goal["got"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("wrapped_convert", "elementwise"),
        ("cudnn_convolve_sgrad", "matrix products"),
        ("nvjet_hsh_128x256", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("ncclDevKernel", "collectives"),
        ("MemcpyD2D", "copies"),
        ("unheard_of", "other"),
    ],
)
def test_kernels_are_known_by_their_names(kernel, kind):
    assert profile.kind_of(kernel) == kind


def test_without_a_test_on_the_gpu_the_stage_fails(tmp_path, monkeypatch):
    said = subprocess.CompletedProcess([], 0, "SKIPPED [10] no GPU here\n10 skipped, 40 deselected in 3.00s\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    with pytest.raises(RuntimeError, match=r"no test ran on the GPU: SKIPPED .* no GPU here"):
        attention.tests(Record(SIZES["full"], tmp_path / "tests.json", {}, 60))


def test_what_a_stage_lacks_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "earlier.json").write_text("{}")
    arguments = ["child", "injection", "tiny", str(tmp_path / "figures.json"), str(tmp_path / "earlier.json"), "60"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert child.main() == child.EXIT_ABSENT
    assert "stage 'step' has no figures 'step' yet" in capsys.readouterr().err


def test_a_goal_has_the_ratio_that_says_whether_it_was_met():
    assert target(0.6, 0.5)["ratio"] == pytest.approx(1.2)
    assert target(0.05, 0.1, at_most=True)["ratio"] == pytest.approx(2.0)
    assert target(0.0, 0.5)["ratio"] == 0.0
    assert target(0.0, 0.1, at_most=True)["ratio"] > 1


STEP = {"s/step": 0.5, "tokens/s": 32000.0, "samples/s": 46.0, "TFLOP/s": 560.0, "MFU": 0.566, "of the best product": 0.71}
STEP |= {
    "kernel": "cudnn",
    "peak, GiB": 61.5,
    "plan says, GiB": 60.0,
    "layers": 11,
    "rows": 8,
    "length": 2048,
    "remat": "dots",
    "losses": [10.4],
}
FOUND = {
    "kernels": {
        "packed": {"kernel": "cudnn", "seconds": 0.002, "portable_seconds": 0.01, "apart": [3e-4], "equal": True}
        | {"errors": [1e-3, 2e-3], "portable_errors": [2e-3]},
        "window": {"equal": False, "refused": "ValueError no such layout"},
        "goal: share of kernels that are equal": target(1.0, 1.0),
    },
    "step": {"step": STEP, "goal: step, MFU": target(0.566, 0.55)},
    "torch": {"eager": {"s/step": 0.7, "samples/s": 33.0, "losses": [10.41]}, "goal: ours / torch": target(1.2, 1.3)},
    "decode": {"batch 1": {"tokens/s": 180.0, "s/token": 1 / 180, "floor, s/token": 1 / 230, "prompt": 640}},
    "generate": {"batch 1": {"tokens/s": 30.0, "ours / theirs": 6.0}},
    "profile": {"by kind, ms a step": {"matrix products": 400.0, "attention": 100.0, "all": 500.0}},
}


def results(device: str = "NVIDIA H100 80GB HBM3", size: str = "full") -> dict:
    stages = {name: {"status": "done", "seconds": 1.0, "figures": figures} for name, figures in FOUND.items()}
    stages["fp8"] = {"status": "absent", "figures": {}, "said": ["no FP8 here"]}
    machine = {"device": device, "memory": "81559 MiB", "driver": "580.1", "cores": 16, "versions": {"jax": "0.11.2"}}
    return {"size": size, "machine": machine | {"revision": "f" * 40, "sources": "x"}, "stages": stages}


def test_tables_say_what_the_results_say(tmp_path):
    (tmp_path / "gpu-h100.json").write_text(json.dumps(results()))
    (tmp_path / "gpu-cpu.json").write_text(json.dumps(results("cpu", "tiny")))
    loaded = tables.load(tmp_path)
    assert [one["machine"]["device"] for one in loaded] == ["NVIDIA H100 80GB HBM3"], "small models are left out"
    text = tables.document(loaded)
    for line in (
        "| step, MFU | at least 0.55 | 0.566 | 1.03 |",
        "| ours / torch | at least 1.3 | 1.2 | 0.92, missed |",
        "| step | 11, 8 of 2048, `dots`, cudnn | 0.5 | 32,000 | 46 | 560 | 56.6% | 71.0% | 61.5 | 60 | 10.4000 |",
        "| torch: eager | the same | 0.7 | - | 33 | - | - | - | - | - | 10.4100 |",
        "| batch 1, prompt 640 | 180.0 | 78% | 30 | 6 |",
        "| packed | cudnn | 2.00 | 10.00 | 3.0e-04 | 2.0e-03 | 2.0e-03 | yes |",
        "| window | does not run: ValueError no such layout | | | | | | |",
        "| attention | 100.0 | 20% |",
    ):
        assert line in text.splitlines()
    assert "`fp8` absent (no FP8 here)" in text
    assert "`lora` was not run" in text
    assert "| packed training step at 7B width, MFU | 56.6% |" in tables.readme(loaded).splitlines()


def test_documents_are_as_the_results_here_say(monkeypatch):
    found = tables.load()
    assert f"<!-- gpu -->\n{tables.document(found)}\n<!-- end of gpu -->" in tables.PAGE.read_text()
    readme = (REPOSITORY / "README.md").read_text()
    assert tables.readme(found) + "\n<!-- gpu:end -->" in readme, "run python -m benchmarks.gpu_check.tables"


def test_fp8_is_compared_with_a_step_that_was_measured(tmp_path):
    with pytest.raises(AbsentError, match="'step' has no figures"):
        fp8(Record(TINY, tmp_path / "fp8.json", {}, 60))


@pytest.mark.slow
def test_the_whole_check_runs_to_its_end_on_a_cpu(tmp_path, monkeypatch):
    """Every stage in its process, from the command line; what needs torch says so where there is none."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    output = tmp_path / "results.json"
    given = ["check", "--size=tiny", f"--output={output}", f"--work={tmp_path}", "--budget=3000"]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(check, "SLOW", 20)
    code = check.main()
    found = json.loads(output.read_text())["stages"]
    assert {name: one["status"] for name, one in found.items() if one["status"] not in ("done", "absent")} == {}
    assert code == 0
    assert set(found) == set(NAMES)
    assert found["memory"]["said"][-1].endswith("CPUs do not")
    assert found["string"]["figures"]["goal: L / string, samples/s"]["target"] == 2.0
    for stage in ("torch", "generate"):
        if found[stage]["status"] == "done":
            assert found[stage]["figures"]
    if found["torch"]["status"] == "done":
        assert max(found["torch"]["figures"]["eager"]["losses differ by"]) < 2e-3
