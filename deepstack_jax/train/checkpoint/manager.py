"""Saving and resuming with Orbax, asynchronous and atomic: parameters, optimizer, step, place in the data, configuration.

Every checkpoint holds a checksum of each of its arrays, made on the device from the state itself. It is read back and compared
after it was written, before an older one may go, and again when a run resumes from it.
"""

import json
import logging
import os
import shutil
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from deepstack_jax.config import TrainConfig
from deepstack_jax.parallel.distributed import allgather_str, barrier, broadcast_str, is_first_host
from deepstack_jax.train.checkpoint.checksums import algorithm_of, checksums, checksums_on_disk, damage, mismatches
from deepstack_jax.train.checkpoint.reading import CheckpointError, UnreadableError, cause_line, check_links, read_or_damage
from deepstack_jax.train.core.state import without
from deepstack_jax.types import PyTree, TrainState

log = logging.getLogger(__name__)

_UNREAD = "unread: "


class Info(NamedTuple):
    """A checkpoint as Orbax's preservation policies see it; `metrics` is the held-out loss."""

    step: int
    time: datetime
    metrics: float | None


class Pending(NamedTuple):
    """A checkpoint on its way; both futures give what is wrong with it, "" if nothing. Those of other hosts know nothing.

    What `read_back` gives begins with _UNREAD where the files could not be read then, which is not damage.
    """

    step: int
    written: Future[str]
    read_back: Future[str]


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/<step>/`.

    Args:
      workdir: an existing folder.
      train: says which ones stay: the newest `keep`, those at every `keep_every` steps, the `keep_best` of the lowest held-out
        loss, or of the highest score where `best` names one. An old one goes when a newer one was read back whole, not before.
      best: name of the score that tells the best; "" = the held-out loss does.
      base: paths of parameters that are left out, as `Program.base`; `save` is given them and `restore` does not give them.
      read_only: restores and nothing else. Otherwise what a kill left half written is removed, and so would be what another
        run is writing.

    Raises:
      CheckpointError: what lies there cannot be read.
    """

    def __init__(
        self, workdir: Path, train: TrainConfig, *, best: str = "", base: Collection[str] = (), read_only: bool = False
    ) -> None:
        self.workdir = workdir
        self._directory = workdir.absolute() / "checkpoints"
        self._train, self._best, self._base, self._read_only = train, best, base, read_only
        manager, problem = read_or_damage(str(self._directory), self._open)
        if manager is None:
            raise CheckpointError(f"{self._directory} holds no checkpoints ({problem}); choose another --workdir")
        self._manager = manager
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-back")
        self._pending: Pending | None = None
        self._numbers = {step: self._number_of(step) for step in self._manager.all_steps()}
        self._good = set(self._numbers)  # taken as good until they are read: nothing is deleted before a newer one was

    def _open(self) -> ocp.CheckpointManager:
        # The manager saves when told to: an interval of its own would drop the save at the end and the one at Ctrl-C. It keeps
        # what it has until `settle` applies the policies: by itself it would delete with the next save, before that one is
        # verified, and a file that cannot be deleted would fail it.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.LatestN(None),
            save_interval_steps=1,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
            create=not self._read_only,
        )
        handlers: dict[str, Any] = {name: ocp.JsonCheckpointHandler() for name in ("sums", "data", "about", "scores")}
        handlers["state"] = ocp.StandardCheckpointHandler()
        return ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int:
        """Newest step that was saved whole and is not known to be damaged; 0 = none, the run's beginning."""
        return max(self._good, default=0)

    def newest_before(self, step: int) -> int:
        """The same of those before a step."""
        return max((good for good in self._good if good < step), default=0)

    def save(self, state: TrainState, data: dict[str, Any], about: dict[str, Any], number: float | None = None) -> None:
        """Write a checkpoint at `state.step`; returns once the state is copied, the files follow in the background.

        A save that fails is a warning and training goes on: the next one tries again. On several hosts it stops the run.
        Where the one before is written and still read back, and the disk has room, this one does not wait for that: the
        process may have been given little time to save.

        Args:
          data: place in the data. about: configuration and versions of the run.
          number: what tells the best, where it is known.
        """
        step, state = int(jax.device_get(state.step)), without(state, self._base)
        earlier = self._pending
        reads = is_first_host() and earlier and not earlier.written.result() and not earlier.read_back.done()
        reads = reads and shutil.disk_usage(self.workdir).free > bytes_of(state)
        earlier = earlier if broadcast_str("reads" if reads else "") else None
        if earlier is None or earlier.step == step:
            earlier = None
            self.settle()
        if step in self._good:
            return
        items = {
            "state": ocp.args.StandardSave(state),
            "sums": ocp.args.JsonSave(checksums(state)),
            "data": ocp.args.JsonSave(data),
            "about": ocp.args.JsonSave(about),
            "scores": ocp.args.JsonSave({self._best or "validation_loss": number}),
        }
        self._numbers[step] = number
        self._pending = None
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # a full disk comes as OSError, ValueError or XlaRuntimeError, by the place it strikes
            self._judge(earlier)
            self._failed(step, cause_line(error))
            return
        written = self._reader.submit(self._wait_for_files, self._manager)
        self._pending = Pending(step, written, self._reader.submit(self._read_back, written, step))
        self._judge(earlier)

    def settle(self) -> None:
        """Wait until what was saved is written and read back; then let old ones go."""
        pending, self._pending = self._pending, None
        if pending is None or not self._judge(pending):
            return
        try:
            gone = self._good - self._kept()
        except UnreadableError as error:
            gone = set()
            log.warning("no checkpoint is deleted now: %s", error)
        # Deleting waits for all hosts, which may see files of each other late: the first one's list holds for all.
        for old in broadcast_str(" ".join(map(str, sorted(gone)))).split():
            try:
                self._manager.delete(int(old))
            except OSError as error:  # it is in the way of nothing but room
                log.warning("checkpoint %s cannot be deleted now: %s", old, cause_line(error))
            self._good.remove(int(old))

    def _judge(self, saved: Pending | None) -> bool:
        """Wait until a checkpoint was read back; whether it is good."""
        if saved is None:
            return False
        problem = broadcast_str(saved.read_back.result())
        if not problem or problem.startswith(_UNREAD):
            self._good.add(saved.step)  # like one that an earlier attempt left: taken as good, while no older one goes for it
            if problem:
                log.warning("checkpoint %s stays, and all before it: %s", saved.step, problem.removeprefix(_UNREAD))
            return not problem
        if self._pending is not None:
            self._pending.written.result()  # by the manager that is closed now
        self._failed(saved.step, problem)
        return False

    def finish(self, step: int) -> None:
        """Wait for the last save.

        Raises:
          CheckpointError: step `step` is not saved; the message says where the run would go on from.
        """
        self.settle()
        if step not in self._good:
            raise CheckpointError(
                f"the state of step {step} could not be saved in {self._directory} ({self._free()}); the newest good "
                f"checkpoint is step {self.latest}: make room and run the same command again, it goes on from there"
            )

    def close(self) -> None:
        """Let the folder go; a save that fails now is a warning, since what ends the run may be another error."""
        self._reader.shutdown()
        try:
            self._manager.close()
        except Exception as error:  # whatever a full or broken disk raises
            log.warning("a checkpoint could not be written (%s; %s)", cause_line(error), self._free())

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """Newest usable checkpoint as (state, data state), or None if there is none at all.

        A damaged checkpoint is passed over, loudly, for the one before, and put aside in `workdir/damaged/`. One that storage
        or memory does not let through now is none: see `read_or_damage`.

        Args:
          abstract: shapes, dtypes and shardings to restore to; they may differ from those that saved.
          step: this one, and no other.

        Raises:
          CheckpointError: there are checkpoints and none can be read, since starting over would throw the run away; or the
            weights in one are not those of this model, each of them named; or (UnreadableError) storage fails now; or a
            link leads out of one.
        """
        abstract = without(abstract, self._base)
        steps = sorted(self._good if step is None else self._good & {step}, reverse=True)
        problems: dict[int, str] = {}
        for candidate in steps:
            check_links(self._directory / str(candidate))
            self._check_tree(candidate, abstract)
            restored, problem = self._read(candidate, abstract)
            if restored is not None:
                if not self._read_only:
                    self._put_aside(problems)
                return restored
            problems[candidate] = problem
            log.warning("checkpoint %s is damaged, trying the one before: %s", candidate, problem)
        if problems or step is not None:
            listed = (
                "; ".join(f"step {number}: {problem}" for number, problem in problems.items()) or f"step {step} is not there"
            )
            advice = "move the folder away" if step is None else "what begins at that step cannot be done again"
            raise CheckpointError(f"no checkpoint in {self._directory} can be read ({listed}); {advice}")
        return None

    def _read(self, step: int, abstract: TrainState) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """(state, data state) of a checkpoint, or None and its damage. A host may be the only one that reads a damaged part."""
        items = {"state": ocp.args.StandardRestore(abstract), "data": ocp.args.JsonRestore(), "sums": ocp.args.JsonRestore()}
        what = f"checkpoint {step} in {self._directory}"
        restore = partial(self._manager.restore, step, args=ocp.args.Composite(**items))
        restored, problem = read_or_damage(what, restore, allgather_str)
        if restored is None:
            return None, problem
        state, sums, data = restored["state"], restored["sums"], restored["data"]
        found, problem = read_or_damage(what, lambda: damage(sums, checksums(state, algorithm_of(sums))), allgather_str)
        return (None, found or problem) if found or problem else ((state, data), "")

    def _check_tree(self, step: int, abstract: TrainState) -> None:
        try:
            stored = self._manager.item_metadata(step)["state"].tree
        except Exception:  # damaged: reading the arrays says how
            return
        wrong = mismatches(stored, abstract)
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} arrays of checkpoint {step} in {self._directory} are not those of this model: "
                f"{'; '.join(wrong)}; was it written by another configuration or version? choose a new --workdir"
            )

    def _wait_for_files(self, manager: ocp.CheckpointManager) -> str:
        """Until a checkpoint is written; in a thread of the first host."""
        if not is_first_host():
            return ""
        try:
            manager.wait_until_finished()
        except Exception as error:  # whatever a full or broken disk raises
            return cause_line(error)
        return ""

    def _read_back(self, written: Future[str], step: int) -> str:
        """Compare a checkpoint on disk with what was saved; in the same thread, after the writing."""
        problem = written.result()
        if problem or not is_first_host():
            return problem
        folder = self._directory / str(step)

        def compare() -> str:
            return damage(json.loads((folder / "sums" / "metadata").read_text()), checksums_on_disk(folder / "state"))

        try:
            found, problem = read_or_damage(f"checkpoint {step} in {self._directory}", compare)
        except Exception as error:  # no damage; the files are written, and the run can go on
            return _UNREAD + cause_line(error)
        return found or problem

    def _failed(self, step: int, reason: str) -> None:
        """Say that a save failed, clear what is left of it, and open the folder again: the manager does not survive that."""
        if jax.process_count() > 1:
            raise CheckpointError(f"checkpoint {step} could not be written ({reason}); newest good one: step {self.latest}")
        log.warning(
            "checkpoint %s could not be written (%s; %s); the newest good one is step %s; training goes on, and the next save "
            "tries again",
            *(step, reason, self._free(), self.latest),
        )
        self._numbers.pop(step, None)
        try:
            self._manager.close()
        except Exception as error:  # the same failure once more
            log.info("closing after a failed save: %s", cause_line(error))
        for left in (self._directory / str(step), *self._directory.glob(f"{step}.orbax-checkpoint-tmp*")):
            shutil.rmtree(left, ignore_errors=True)
        self._manager = self._open()

    def _kept(self) -> set[int]:
        """Of the good checkpoints those that stay."""
        train = self._train
        wanted = [policies.LatestN(train.keep), policies.CustomSteps(self._pinned())]
        if train.keep_every:
            wanted.append(policies.EveryNSteps(train.keep_every))
        if train.keep_best:
            best = {"n": train.keep_best, "keep_checkpoints_without_metrics": False}
            wanted.append(policies.BestN(get_metric_fn=float, reverse=not self._best, **best))
        infos: Any = [Info(step, datetime.now(UTC), self._numbers.get(step)) for step in sorted(self._good)]
        stay = policies.AnyPreservationPolicy(wanted).should_preserve(infos, context=policies.PreservationContext())
        return {info.step for info, stays in zip(infos, stay, strict=True) if stays}

    def _pinned(self) -> list[int]:
        """Checkpoints that a replay starts from; a damaged bundle cannot be replayed from anywhere."""
        folder = self.workdir / "replay"
        names, _ = read_or_damage(str(folder), partial(os.listdir, folder))
        found = [_stored(folder / name, "checkpoint") for name in names or () if name.endswith(".json")]
        return [step for step in found if isinstance(step, int)]

    def _number_of(self, step: int) -> float | None:
        """None of a damaged one, too: it is not the best, and restoring says what is wrong."""
        number = _stored(self._directory / str(step) / "scores" / "metadata", self._best or "validation_loss")
        return float(number) if isinstance(number, int | float) else None

    def _put_aside(self, problems: dict[int, str]) -> None:
        """Out of the way, so that the run can save at the same steps again; not deleted, since somebody may want to look."""
        for step in problems:
            target = self._directory.parent / "damaged" / f"{step}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
            if is_first_host():
                try:
                    target.parent.mkdir(exist_ok=True)
                    (self._directory / str(step)).rename(target)
                except OSError as error:
                    raise CheckpointError(
                        f"damaged checkpoint {step} cannot be moved to {target}: {error.strerror}; move it away yourself"
                    ) from error
            log.warning("damaged checkpoint %s was moved to %s", step, target)
            self._good.discard(step)
        if problems:
            barrier("damaged checkpoints moved")
            self._manager.reload()

    def _free(self) -> str:
        return f"{shutil.disk_usage(self.workdir).free / 1e6:,.0f} MB free"


def bytes_of(state: PyTree) -> int:
    """What a checkpoint of a state takes; abstract or real."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _stored(file: Path, key: str) -> Any:
    """What a JSON file has under a key; None where it is damaged. UnreadableError where that cannot be told now."""
    return read_or_damage(str(file), lambda: json.loads(file.read_text())[key])[0]
