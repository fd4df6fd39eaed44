"""The stream of batches: the same for any number of workers and hosts, from any batch on; bad examples counted, none lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode.batch_rows import HostBatch, collate
from deepstack_jax.data.encode.encoder import Encoder, OverlongError, try_record
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.errors import ConfigError
from tests.unit.made_examples import MadeExamples
from tests.unit.tiny import tiny_config

BASE = {
    "data.template": "direct",
    "data.tokenizer": "bytes",
    "data.max_length": 96,
    "data.max_images": 2,
    "data.max_bad_fraction": 0.5,
    "train.batch_size": 8,
}
PACKED = {"data.packing.enabled": True, "data.packing.window": 16, "data.packing.max_images": 4}
KINDS = {"padded": {}, "packed": PACKED, "buckets": {"data.buckets": (32, 64)}}
SOURCE = MadeExamples(30, broken=(7,), refused=(12,))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSTACK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_config(kind: str, **overrides: Any) -> Config:
    return tiny_config(BASE | KINDS[kind] | {key.replace("__", "."): value for key, value in overrides.items()})


def take(stream: TrainingStream, count: int) -> list[HostBatch]:
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


@lru_cache
def uninterrupted(kind: str) -> list[HostBatch]:
    """Two epochs and more of batches, from one host and no workers."""
    return take(TrainingStream(SOURCE, make_config(kind).data_spec), 10)


def assert_same(ours: Sequence[HostBatch], theirs: Sequence[HostBatch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.bad == other.bad
        assert one.examples == other.examples
        for name, left, right in zip(Batch._fields, one.batch, other.batch, strict=True):
            assert (left.shape, left.dtype) == (right.shape, right.dtype), name
            assert left.tobytes() == right.tobytes(), name


def seen(delivered: Sequence[HostBatch]) -> list[int]:
    return [int(index) for one in delivered for index in one.batch.example_id.ravel() if index >= 0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_comes_once_per_epoch_and_the_bad_ones_are_named(kind):
    delivered = uninterrupted(kind)
    assert seen(delivered[:1]) == TrainingStream(SOURCE, make_config(kind).data_spec).examples(0)
    examples = seen(delivered)
    assert len(examples) == sum(one.examples for one in delivered)
    for epoch in range(len(examples) // 30):
        assert sorted(examples[epoch * 30 : (epoch + 1) * 30]) == list(range(30))
    bad = Counter(example.name for one in delivered for example in one.bad)
    assert set(bad) == {"made7", "made12"}
    assert sum(bad.values()) == Counter(examples)[7] + Counter(examples)[12]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(stop=st.integers(0, 8), ahead=st.integers(1, 5))
def test_stopped_anywhere_it_goes_on_with_the_next_batch(kind, stop, ahead):
    stream = TrainingStream(SOURCE, make_config(kind, data__prefetch=ahead).data_spec)
    before = take(stream, stop)
    state = stream.state()
    again = TrainingStream(SOURCE, make_config(kind).data_spec)
    again.restore(state)
    assert again.state() == state
    assert_same(before + take(again, 2), uninterrupted(kind)[: stop + 2])


@pytest.mark.parametrize(("kind", "workers", "then"), [("padded", 1, 0), ("packed", 1, 2)])
def test_worker_processes_make_the_same_batches_and_the_state_is_of_those_consumed(kind, workers, then):
    stream = TrainingStream(SOURCE, make_config(kind, data__workers=workers).data_spec)
    first = take(stream, 3)
    state = stream.state()
    assert_same(first, uninterrupted(kind)[:3])
    other = TrainingStream(SOURCE, make_config(kind, data__workers=then).data_spec)
    other.restore(state)
    assert_same(take(other, 3), uninterrupted(kind)[3:6])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_order_does_not_depend_on_the_number_of_hosts(kind, hosts):
    config = make_config(kind)
    streams = [TrainingStream(SOURCE, config.data_spec, process=host, processes=hosts, devices=4) for host in range(hosts)]
    parts = [take(stream, 3) for stream in streams]
    whole = take(TrainingStream(SOURCE, config.data_spec, devices=4), 3)
    for number, one in enumerate(whole):
        joined = Batch(*map(np.concatenate, zip(*(part[number].batch for part in parts), strict=True)))
        bad = tuple(example for part in parts for example in part[number].bad)
        assert_same([HostBatch(joined, bad, sum(part[number].examples for part in parts))], [one])
    assert len({str(stream.state()) for stream in streams}) == 1
    assert all(stream.rows % 4 == 0 for stream in streams)


def test_a_checkpoint_of_eight_devices_goes_on_with_four():
    config = make_config("packed", train__batch_size=16)
    eight = TrainingStream(SOURCE, config.data_spec, devices=8)
    first = take(eight, 2)
    four = TrainingStream(SOURCE, config.data_spec, devices=3)
    four.restore(eight.state())
    assert four.rows != eight.rows
    both = seen(first + take(four, 3))
    assert sorted(both[:30]) == list(range(30))
    assert sorted(both[30:60]) == list(range(30))


def test_hosts_agree_on_the_bucket_of_a_batch():
    config = make_config("buckets")
    streams = [TrainingStream(SOURCE, config.data_spec, process=host, processes=4) for host in range(4)]
    lengths = np.array([[one.batch.tokens.shape[1] for one in take(stream, 4)] for stream in streams])
    assert (lengths == lengths[0]).all()
    assert set(lengths.ravel()) <= {32, 64, 96}


def test_packed_and_padded_streams_take_the_same_steps():
    packed, padded = (
        TrainingStream(MadeExamples(400), make_config(kind, train__batch_size=32).data_spec) for kind in ("packed", "padded")
    )
    assert packed.steps(4) == pytest.approx(padded.steps(4), rel=0.02)
    assert packed.rows < padded.rows
    assert packed.describe() is not None
    assert padded.describe() is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data__seed": 1}, "'seed': (0, 1)"),
        ({"data__shuffle": False}, "'shuffle': (True, False)"),
        ({"data__packing__window": 8}, "'window': 8"),
        ({"data__max_length": 64}, "'limits': [64,"),
        ({"data__packing__enabled": False}, "'packing'"),
        ({"data__train": "other.json"}, "'source'"),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(change, said):
    state = TrainingStream(SOURCE, make_config("packed").data_spec).state()
    stream = TrainingStream(SOURCE, make_config("packed", **change).data_spec)
    with pytest.raises(
        ConfigError, match=r"the checkpoint's data order differs in .*saved, now.*; start a new --workdir"
    ) as caught:
        stream.restore(state)
    assert said in str(caught.value)


SETS = {"a": {"file": "a.json", "rows": 30}, "b": {"file": "b.json", "licence": "none"}}


@pytest.mark.parametrize(
    ("entry", "refused"),
    [({"rows": 31, "exact": False, "paper": 5, "licence": "MIT", "file_from": "x"}, False)]
    + [(change, True) for change in ({"repeat": 2.0}, {"file": "c.json"}, {"drop_images": ("x/",)}, {"keep_sources": ("v",)})],
)
def test_only_what_chooses_rows_ties_a_checkpoint_to_its_sets(entry, refused):
    """A warning of a wrong count asks to correct `rows`: the run must still go on."""
    state = TrainingStream(SOURCE, make_config("packed", data__sets=SETS).data_spec).state()
    stream = TrainingStream(SOURCE, make_config("packed", data__sets=SETS | {"a": SETS["a"] | entry}).data_spec)
    with pytest.raises(ConfigError, match="'source'") if refused else nullcontext():
        stream.restore(state)


def test_other_data_under_the_same_name_is_refused():
    state = TrainingStream(SOURCE, make_config("packed").data_spec).state()
    with pytest.raises(ConfigError, match="'sizes'"):
        TrainingStream(MadeExamples(30, broken=(7,)), make_config("packed").data_spec).restore(state)


def test_a_batch_that_does_not_split_over_the_hosts_is_refused():
    with pytest.raises(ConfigError, match="batch_size 8 does not split over 3 hosts; nearest valid: 9"):
        TrainingStream(SOURCE, make_config("padded").data_spec, process=0, processes=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_must_stop_the_run_comes_out_of_the_workers(workers):
    config = make_config("padded", data__overlong="error", data__max_length=16, data__max_images=1, data__workers=workers)
    stream = TrainingStream(MadeExamples(30), config.data_spec)
    with pytest.raises(
        OverlongError, match=r"made\d+: \d+ tokens with its images, a row holds 16; raise config.data.max_length"
    ):
        take(stream, 5)
    with pytest.raises(SourceError):  # the same again, not the end of the data
        take(stream, 5)


def test_an_example_alone_in_a_row_is_padded_to_its_bucket():
    config = make_config("buckets")
    examples = [try_record(SOURCE, index, Encoder(config.data_spec).encode) for index in (0, 7, 1)]
    assert collate(examples, config.data_spec).batch.tokens.shape == (3, 32)
    assert collate(examples, config.data_spec, longest=33).batch.tokens.shape == (3, 64)
    assert collate(examples, config.data_spec, longest=90).batch.tokens.shape == (3, 96)
    assert [example.index for example in collate(examples, config.data_spec).bad] == [7]
