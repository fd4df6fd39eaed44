"""The loop around a step that computes nothing: what it saves, judges and counts, and when."""

import contextlib
import dataclasses
import io
import json
import threading
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepstack_jax.config import DataSpec, MeshConfig, PackingConfig
from deepstack_jax.data.encode.batch_rows import HostBatch
from deepstack_jax.data.example import BadExample, Source, SourceError
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.data.synthetic import VOCABULARY
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.printing import Console
from deepstack_jax.train.account.journal import DataWait, Journal
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.core.program import Program
from deepstack_jax.train.core.state import new_state
from deepstack_jax.train.run import loop as loop_module
from deepstack_jax.train.run.loop import loop
from deepstack_jax.train.run.metrics import MetricsLog, Quarantine, QuarantineError
from deepstack_jax.train.run.replay import ReplayError, read_bundle, replay
from deepstack_jax.train.run.run import Run
from deepstack_jax.train.run.step_log import NotFiniteError, padding_hint
from tests.unit.tiny import tiny_config

PAGES = {
    "data.source": "pages",
    "data.template": "direct",
    "data.synthetic.length": 48,
    "data.synthetic.questions": 1,
    "data.max_images": 1,
    "data.tokenizer": "words:" + " ".join(VOCABULARY),
    "train.batch_size": 8,
}
STEPS = 6


def first_state():
    return new_state({"a": {"kernel": jnp.zeros(3)}}, {"a/kernel": "default"}, optax.sgd(1e-3))


def abstract_state():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), first_state())


class Steps:
    """A step that notes the examples of its batch; those numbered `bad` give no number."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad, self.examples = bad, []

    def __call__(self, state, batch):
        number, in_a_row = int(state.step) + 1, int(state.bad_in_a_row)
        self.examples.append(np.asarray(batch.example_id)[:, 0].tolist())
        bad = number in self.bad
        state = state.replace(step=jnp.int32(number), bad_in_a_row=jnp.int32((in_a_row + 1) * bad))
        names = ("token_accuracy", "grad_norm", "lr_factor", "supervised_tokens", "padding", "segment_squares", "bad_steps")
        numbers = {name: jnp.float32(1) for name in names} | {"good": jnp.bool(not bad), "bad_in_a_row": state.bad_in_a_row}
        return state, numbers | {"loss": jnp.float32("nan" if bad else 1)}


def made_of(kind, **attributes):
    """An object of a class whose other attributes are not looked at."""
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


def make_run(workdir, step, stream=TrainingStream, **changes) -> Run:
    config = tiny_config(PAGES | {"train.steps": STEPS} | {key.replace("__", "."): value for key, value in changes.items()})
    workdir.mkdir(exist_ok=True)
    source = open_source(config.data, "train")
    return Run(
        train=config.train,
        data=config.data,
        evaluate_every=config.evaluation.every,
        profile="",
        workdir=workdir,
        steps=STEPS,
        mesh=make_mesh(MeshConfig()),
        stream=stream(source, config.data_spec),
        step=step,
        flops=lambda length, squares: 1.0,
        learning_rate=1e-3,
        metrics=MetricsLog(None, 0),
        quarantine=Quarantine(workdir, config.data.max_bad_fraction, len(source)),
        evaluate=lambda params, step: None,
        checkpoints=Checkpoints(workdir, config.train),
        journal=Journal(workdir),
        console=Console(quiet=True),
        about={},
    )


def go(run: Run, stop: Callable[[], bool] = lambda: False):
    """From the newest checkpoint, where there is one, to the end."""
    restored = run.checkpoints.restore(abstract_state())
    if restored is not None:
        run.stream.restore(restored[1])
    try:
        return loop(run, first_state() if restored is None else restored[0], stop)
    finally:
        run.stream.close()
        run.checkpoints.close()


def saved_steps(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


def test_a_bundle_names_the_newest_checkpoint_before_its_step_which_stays(tmp_path):
    """Between the bad step and its log line other checkpoints are saved."""
    run = make_run(tmp_path, Steps(bad=(3,)), train__log_every=6, train__checkpoint_every=2, train__keep=1)
    go(run)
    bundle = read_bundle(tmp_path / "replay" / "step-3.json")
    assert (bundle.step, bundle.checkpoint) == (3, 2)
    assert saved_steps(tmp_path) == [2, 6]


def test_a_bundle_that_begins_behind_its_step_is_not_replayed(tmp_path):
    run = make_run(tmp_path, Steps(bad=(3,)), train__checkpoint_every=2)
    go(run)
    file = tmp_path / "replay" / "step-3.json"
    program = made_of(Program, abstract_state=abstract_state)
    for checkpoint in (4, 6):
        file.write_text(json.dumps(read_bundle(file)._replace(checkpoint=checkpoint)._asdict()))
        there = Checkpoints(tmp_path, run.train, read_only=True)
        with pytest.raises(ReplayError, match=f"checkpoint of step {checkpoint}, which is not before step 3"):
            replay(file, program, run.stream, there, Console(quiet=True))


class Once(TrainingStream):
    """Something goes wrong at the delivery of a batch."""

    def __init__(self, number: int, what: Exception | BadExample, source: Source, spec: DataSpec) -> None:
        super().__init__(source, spec)
        self._number, self._what = number, what

    def __next__(self):
        self._number -= 1
        if self._number == 0 and isinstance(self._what, Exception):
            raise self._what
        delivered = super().__next__()
        return delivered if self._number or isinstance(self._what, Exception) else delivered._replace(bad=(self._what,))


@pytest.mark.parametrize("what", [SourceError("the disk is gone"), BadExample(7, "seven", "no image")])
def test_data_that_ends_a_run_costs_no_step_and_the_next_batch_is_the_one_that_failed(what, tmp_path):
    straight, stopped, again = Steps(), Steps(), Steps()
    go(make_run(tmp_path / "straight", straight))
    options = {"train__checkpoint_every": 3, "data__max_bad_fraction": 0.0}
    run = make_run(tmp_path / "run", stopped, partial(Once, 5, what), **options)
    with pytest.raises((SourceError, QuarantineError)):
        go(run)
    assert saved_steps(tmp_path / "run")[-1] == 4
    go(make_run(tmp_path / "run", again, **options))
    assert stopped.examples + again.examples == straight.examples


def test_too_many_bad_steps_cost_no_step(tmp_path):
    options = {"train__log_every": 1, "train__checkpoint_every": 2, "train__max_bad_steps": 2}
    with pytest.raises(NotFiniteError, match="the last 2 steps up to 3"):
        go(make_run(tmp_path, Steps(bad=(2, 3)), **options))
    assert saved_steps(tmp_path)[-1] == 3
    mended = Steps()
    assert int(go(make_run(tmp_path, mended, **options)).step) == STEPS
    assert len(mended.examples) == STEPS - 3


def test_an_error_in_the_first_step_saves_nothing(tmp_path):
    run = make_run(tmp_path, Steps(), partial(Once, 1, SourceError("the disk is gone")))
    with pytest.raises(SourceError):
        go(run)
    assert saved_steps(tmp_path) == []


class Watched(Journal):
    """Knows what it counts just now."""

    kind = "step"

    @contextlib.contextmanager
    def spend(self, kind):
        before, self.kind = self.kind, kind
        with super().spend(kind):
            yield
        self.kind = before


def test_neither_saving_nor_evaluating_is_charged_with_the_step_before_it(tmp_path, monkeypatch):
    """The devices are still at work on a step when the loop comes to evaluate or save, and both wait for it."""
    journal, waits, running, steps = Watched(tmp_path), [], set(), Steps()

    def step(state, batch):
        state, numbers = steps(state, batch)
        running.add(id(numbers["loss"]))
        return state, numbers

    def wait(tree):
        for leaf in map(id, jax.tree.leaves(tree)):
            if leaf in running:
                running.remove(leaf)
                waits.append(journal.kind)
        return tree

    def wait_for_all():
        waits.extend(journal.kind for _ in running)
        running.clear()

    class AfterTheStep(Checkpoints):
        def save(self, *args):
            wait_for_all()
            super().save(*args)

    get = jax.device_get
    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(jax, "device_get", lambda tree: get(wait(tree)))
    run = make_run(tmp_path, step, train__log_every=STEPS, train__checkpoint_every=2, evaluation__every=3)
    checkpoints = AfterTheStep(tmp_path, run.train)
    go(dataclasses.replace(run, journal=journal, checkpoints=checkpoints, evaluate=lambda params, step: wait_for_all()))
    assert waits == ["step"] * STEPS


def test_the_next_batch_is_on_its_way_while_a_step_runs_and_no_number_is_fetched_before_a_log_line(tmp_path, monkeypatch):
    """Transfer and step of number n are given to the devices before the loop waits for step n - 1."""
    events, steps, made = [], Steps(), []

    def step(state, batch):
        state, numbers = steps(state, batch)
        made.append(numbers)
        events.append(("step", len(made)))
        return state, numbers

    def put(mesh, batch):
        assert batch.pixels.dtype == np.uint8
        events.append(("put", len(made) + 1))
        return put_batch(mesh, batch)

    def wait(tree):
        if isinstance(tree, dict) and threading.current_thread() is threading.main_thread():
            events.append(("wait", 1 + next(at for at, numbers in enumerate(made) if numbers is tree)))
        return tree

    def fetch(tree):
        events.append(("fetch", len(tree) if isinstance(tree, list) else 0))
        return get(tree)

    get, put_batch = jax.device_get, loop_module.put_batch
    monkeypatch.setattr(loop_module, "put_batch", put)
    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(jax, "device_get", fetch)
    go(make_run(tmp_path, step, train__log_every=3, train__checkpoint_every=STEPS))
    first = [("put", 1), ("step", 1), ("put", 2), ("step", 2), ("wait", 1), ("put", 3), ("step", 3), ("wait", 2), ("fetch", 3)]
    assert events[: len(first)] == first


def waited(tmp_path, numbers, clock: Callable[[], float], before: Callable[[DataWait], None]) -> float:
    """Seconds that count as a wait for data where `before` happens before the batch comes."""
    journal = Journal(tmp_path, clock)
    journal.begin_loop(0)
    with DataWait(journal) as wait:

        def batches():
            before(wait)
            yield HostBatch(None, (), 0)  # pyright: ignore[reportArgumentType]

        wait.next(batches(), numbers)
    return journal.flush(1).get("data", 0.0)


class Running:
    """Numbers of a step that goes on until `done` is set."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def block_until_ready(self):
        self.done.wait()
        return self


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def notice_the_end(wait: DataWait) -> None:
    """Until the thread that waits for the devices is through with it."""
    wait._watch.submit(lambda: None).result()


def test_only_the_wait_in_which_the_devices_have_nothing_to_do_is_one_for_data(tmp_path):
    running, clock = Running(), Clock()

    def late(wait):
        clock.now += 50

    def late_for_idle_devices(wait):
        notice_the_end(wait)
        clock.now += 50

    assert waited(tmp_path, running, clock, late) == 0, "the devices were busy all the time"
    running.done.set()
    assert waited(tmp_path, running, clock, late_for_idle_devices) == 50
    assert waited(tmp_path, None, clock, late_for_idle_devices) == 50, "before the first step"


def test_of_a_wait_only_what_comes_after_the_end_of_the_step_counts(tmp_path):
    ending, clock = Running(), Clock()

    def end_and_wait(wait):
        clock.now += 200
        ending.done.set()
        notice_the_end(wait)
        clock.now += 50

    assert waited(tmp_path, ending, clock, end_and_wait) == 50


def test_much_padding_is_said_with_what_helps():
    data = tiny_config().data
    assert padding_hint(0.7, 2048.0, data) == ""
    hint = padding_hint(0.85, 2048.0, data)
    for part in (
        "85% of the positions are padding",
        "an example has 307 of the 2,048",
        "pack about 7 into each with --config.data.packing.enabled=True, or",
        '--config.data.buckets="(512, 1024)"',
    ):
        assert part in hint
    assert "True --config.data.buckets=" in padding_hint(0.85, 2048.0, dataclasses.replace(data, buckets=(1024,)))
    assert "shorter" not in padding_hint(0.75, 32.0, data), "there is no shorter length that holds an example"
    assert padding_hint(0.99, 2048.0, dataclasses.replace(data, packing=PackingConfig(enabled=True))) == ""
    assert padding_hint(1.0, 2048.0, data)


def test_the_hint_comes_once_and_only_where_a_run_begins(tmp_path):
    printed = io.StringIO()
    for stops in (iter([False, False, False, True]), iter([False] * STEPS)):
        run = make_run(tmp_path, Steps(), train__log_every=1)
        go(dataclasses.replace(run, console=Console(file=printed, width=400)), lambda stops=stops: next(stops))
    assert printed.getvalue().count("\nstep ") + printed.getvalue().startswith("step ") == STEPS
    assert printed.getvalue().count("100% of the positions are padding") == 1
