"""Checkpoints that can be trusted: saved in the background, proved by a manifest, and read only where the proof holds.

Orbax writes and reads the arrays, each device its own shards. What a step needs before it counts, which steps stay,
and what happens when one is damaged is decided here. A step's folder appears whole, by one rename, with the manifest
(`convert.manifest`) already inside.
"""

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from convert import manifest
from convert.run import is_step
from train import integrity
from train.integrity import CheckpointError, SaveFailed

_SAVE_TIMEOUT_SECONDS = 4 * 3600
_FREE_SPACE_FACTOR = 1.2


class Checkpoints:
    """The checkpoints of one training run, which owns their directory; every process makes one and calls it alike.

    Leftovers of saves that were killed are removed at once. Use it as a context, at whose end the last save is awaited.

    Args:
        directory: the folder of the steps' folders, made if need be.
        every_steps: a save is due at its multiples; None or 0: at none.
        every_minutes: a save is due so long after the last one; None or 0: never.
        keep_last: how many of the newest steps stay; None or 0: all.
        keep_every: the steps divisible by it stay too; None or 0: none.

    Attributes:
        kept: other steps that stay.
    """

    def __init__(
        self,
        directory: str | Path,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep_last: int | None = 2,
        keep_every: int | None = None,
    ):
        self.directory = Path(directory).absolute()
        self.keep_last, self.keep_every = keep_last, keep_every
        self.kept: set[int] = set()
        self._schedule = _Schedule(every_steps, every_minutes)
        self._held: int | None = None
        self._writing: tuple[int, Any, Any] | None = None
        self._failure: CheckpointError | None = None
        self._intact: set[int] = set()
        self._checkpointer = ocp.AsyncCheckpointer(
            _handler(),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_SAVE_TIMEOUT_SECONDS, post_finalization_callback=self._prove
            ),
        )
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for pattern in ("[0-9]*.orbax-checkpoint-tmp*", "[0-9]*.removed"):  # what is not ours stays
                for leftover in self.directory.glob(pattern):
                    shutil.rmtree(leftover)
        _meet("checkpoints cleaned")

    def due(self, step: int) -> bool:
        """Whether `step` is to be saved; the same answer in every process. Ask once a step."""
        return self._schedule.due(step)

    def save(self, step: int, state: Any, data: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Start to save a step.

        Returns once the arrays may be donated; the previous save is awaited first. Nothing happens where the last step
        saved or restored was this one. A save that fails leaves the earlier steps as they are and is said on stderr;
        `wait` raises it unless a later save succeeds.

        Args:
            step: how many updates `state` has had.
            state: a tree of arrays.
            data: the data position, as JSON.
            config: the configuration, as JSON.

        Raises:
            CheckpointError: the folder of `step` is there already, or a save failed among several processes.
        """
        if step == self._held:
            return
        self._finish()
        self._failure = None
        folder = self._folder(step)
        if folder.exists():
            raise CheckpointError(f"{folder} exists: resume from it, or give another run.output_dir")
        self._schedule.saved(step)
        tree = integrity.to_nested_dict(state)
        if not self._has_room(step, tree):
            return
        self._held = step
        self._writing = (step, integrity.shapes(tree), integrity.fingerprints(tree))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(dict(config)),
        )
        self._checkpointer.save(folder, args=items)

    def wait(self) -> None:
        """Return when the last save is on disk.

        Raises:
            CheckpointError: it failed.
        """
        self._finish()
        if self._failure:
            raise self._failure

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Await the last save, as `wait` does. A process that fails among several leaves it: a peer may be dead."""
        if kind is None:
            self.wait()
        elif jax.process_count() == 1:
            self._finish()

    def latest(self) -> int | None:
        """The newest step whose files are as they were written; None where nothing was saved.

        Damage is named on stderr.

        Raises:
            CheckpointError: steps were saved and none can be trusted.
        """
        step = self._newest()
        found = step is not None
        while step is not None and not self._is_intact(step):
            step = self._newest(below=step)
        if found and step is None:
            raise CheckpointError(f"no checkpoint in {self.directory} can be trusted: move it away to start again")
        return step

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any], int]:
        """The newest good checkpoint, or one step's; later steps are removed.

        Files are checked before they are read and arrays after; damage is named on stderr and the step before it taken.

        Args:
            abstract_state: a tree of ShapeDtypeStruct with the shardings to restore to, on any mesh.
            step: the only step that will do; None for the newest good one.

        Returns:
            The state, the data position and the step.

        Raises:
            CheckpointError: no checkpoint can be trusted, or it does not have the arrays that are asked for.
        """
        tree = integrity.to_nested_dict(abstract_state)
        candidate = step if step is not None else self._newest()
        while candidate is not None:
            if self._is_intact(candidate):
                integrity.check_fit(self._folder(candidate), tree, complete=True)
                restored = _read(self._folder(candidate), tree)
                if not self._changed_arrays(candidate, restored.state):
                    self._remove_after(candidate)
                    return integrity.from_nested_dict(abstract_state, restored.state), restored.data, candidate
            candidate = self._newest(below=candidate) if step is None else None
        what = f"step {step}" if step is not None else "any checkpoint"
        raise CheckpointError(f"{what} in {self.directory} cannot be restored: it is missing or damaged")

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _newest(self, below: int | None = None) -> int | None:
        """The newest committed step, as process 0 sees the folder."""
        steps = [step for step in manifest.steps(self.directory) if below is None or step < below]
        newest = int(_agree(max(steps, default=-1)))
        return None if newest < 0 else newest

    def _prove(self) -> None:
        """Orbax calls this in process 0's thread when every process has written, just before the rename."""
        assert self._writing
        step, shapes, fingerprints = self._writing
        (folder,) = self.directory.glob(f"{step}.orbax-checkpoint-tmp*")
        values = jax.device_get(fingerprints)
        manifest.write(folder, {name: {**shape, "fingerprint": int(values[name])} for name, shape in shapes.items()})

    def _finish(self) -> None:
        """Await the save under way; note a failure, or remove the steps that need not stay."""
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:  # whatever a background thread or a file system may raise
            self._fail(error)
            return
        if self._writing and self._folder(self._writing[0]).exists():
            self._prune()

    def _fail(self, error: Exception) -> None:
        assert self._writing
        step = self._writing[0]
        reason = " ".join(str(error).split())[:300]
        self._failure = SaveFailed(f"{self._not_written(step)}: {reason}")
        if jax.process_count() > 1:
            raise self._failure from error
        for leftover in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover)
        _say(str(self._failure))

    def _has_room(self, step: int, tree: Any) -> bool:
        needed = int(_FREE_SPACE_FACTOR * sum(x.nbytes for x in jax.tree.leaves(tree)))
        free = shutil.disk_usage(self.directory).free
        if _agree(free >= needed):
            return True
        self._failure = SaveFailed(
            f"{self._not_written(step)}: it needs {needed:,} bytes and the disk has {free:,} free; free some, or lower "
            "run.keep_last"
        )
        _say(str(self._failure))
        return False

    def _not_written(self, step: int) -> str:
        return f"checkpoint {self._folder(step)} was not written, the earlier ones stay"

    def _prune(self) -> None:
        steps = manifest.steps(self.directory)
        kept = self.kept | set(steps[-self.keep_last :] if self.keep_last else steps)
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        self._remove(step for step in steps if step not in kept)

    def _remove_after(self, step: int) -> None:
        self._held, self._writing, self._intact = step, None, {step}
        self._remove(later for later in manifest.steps(self.directory) if later > step)
        _meet("later checkpoints removed")

    def _remove(self, steps: Any) -> None:
        """Delete steps in process 0: renamed first, so that a kill leaves no half of one."""
        if jax.process_index() == 0:
            for step in steps:
                shutil.rmtree(self._folder(step).rename(self.directory / f"{step}.removed"))

    def _is_intact(self, step: int) -> bool:
        """Whether the files of `step` are as written: every process hashes its share, all learn the outcome."""
        if step in self._intact:
            return True
        damage = manifest.damaged_files(self._folder(step), jax.process_index(), jax.process_count())
        for line in damage:
            _say(line)
        if not np.sum(multihost_utils.process_allgather(np.asarray(len(damage)))):
            self._intact.add(step)
            return True
        if jax.process_index() == 0:
            _say(f"checkpoint step {step} is not used: {manifest.effect(self._folder(step))}")
        return False

    def _changed_arrays(self, step: int, tree: Any) -> list[str]:
        changed = integrity.changed_arrays(self._folder(step), tree)
        if changed:
            _say(f"checkpoint step {step} is not used: arrays that changed: {', '.join(changed)}")
        return changed


def read_checkpoint(folder: Path, abstract_state: Any) -> tuple[Any, int]:
    """The state that one step of another run's checkpoints holds; nothing there is changed.

    Args:
        folder: the step's, as runs/long/checkpoints/800.
        abstract_state: as for `Checkpoints.restore`.

    Returns:
        The state, and the step.

    Raises:
        CheckpointError: there is none, it is damaged, or it does not have the arrays that are asked for.
    """
    folder = folder.absolute()
    if not is_step(folder):
        saved = manifest.steps(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
        steps = f", as {folder / 'checkpoints' / str(saved[-1])}" if saved else ""
        raise CheckpointError(f"run.from_checkpoint {folder} is no checkpoint: give one step of a run{steps}")
    tree = integrity.to_nested_dict(abstract_state)
    damage = manifest.damaged_files(folder, jax.process_index(), jax.process_count())
    for line in damage:
        _say(line)
    if not np.sum(multihost_utils.process_allgather(np.asarray(len(damage)))):
        integrity.check_fit(folder, tree, complete=True)
        restored = _read(folder, tree)
        if not integrity.changed_arrays(folder, restored.state):
            return integrity.from_nested_dict(abstract_state, restored.state), int(folder.name)
    raise CheckpointError(f"run.from_checkpoint {folder} is damaged: give another step")


class _Schedule:
    """When to save. Minutes are counted by process 0, and the others are asked to meet it ever closer to the time."""

    def __init__(self, every_steps: int | None, every_minutes: float | None):
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self._since = time.monotonic()
        self._asked: tuple[int, float] | None = None
        self._next_question = 0

    def saved(self, step: int) -> None:
        self._since = time.monotonic()
        self._asked, self._next_question = (step, self._since), step + 1

    def due(self, step: int) -> bool:
        if self.every_steps and step % self.every_steps == 0:
            return True
        return bool(self.every_minutes) and self._minutes_are_over(step, 60 * (self.every_minutes or 0))

    def _minutes_are_over(self, step: int, period: float) -> bool:
        """Asking costs a collective: having learnt the pace, the next question comes half the remaining time on."""
        if step < self._next_question:
            return False
        now = time.monotonic()
        steps, seconds = (step - self._asked[0], now - self._asked[1]) if self._asked else (0, 0.0)
        self._asked = (step, now)
        remaining, pace = _agree([period - (now - self._since), seconds / max(1, steps)])
        self._next_question = step + max(1, int(remaining / pace / 2) if pace > 0 else 1)
        return remaining <= 0


def _handler() -> ocp.CompositeCheckpointHandler:
    """Compression would buy 8 % on float32 weights and cost four fifths of the time."""
    return ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False),
        data=ocp.JsonCheckpointHandler(),
        config=ocp.JsonCheckpointHandler(),
    )


def _read(folder: Path, tree: dict[str, Any]) -> Any:
    arguments = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.Checkpointer(_handler()).restore(
        folder,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(tree, restore_args=arguments, partial_restore=True),
            data=ocp.args.JsonRestore(),
        ),
    )


def _agree(value: Any) -> Any:
    """Process 0's `value`, in every process."""
    return multihost_utils.broadcast_one_to_all(np.asarray(value))


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
