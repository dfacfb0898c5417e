"""Turns what steps return into lines, one step late, so that the host waits for a step only while the next one runs."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.errors import JobFailed
from train.metrics import peak_memory_gib

SECONDS_BETWEEN_PLAIN_LINES = 10.0


class NonFinite(JobFailed):
    """Too many updates in a row were not finite."""


@dataclass
class _Pending:
    """A step whose line is not written yet: its metrics, on the host where it is `done`, and what was added to them."""

    step: int
    metrics: Mapping[str, Any]
    is_due: bool
    more: dict[str, float] = field(default_factory=dict)
    done: bool = False


class MetricsLogger:
    """Collects a step's numbers, watches for non-finite updates, and passes finished lines on.

    Args:
        write: takes each finished line.
        display: shows it.
        every: a line for every so many steps, and for steps that were skipped or evaluated.
        max_skipped: non-finite updates in a row that end the run.
        flops: FLOP per token.
        peak: FLOP/s of a device; None where unknown.
        epoch: `epoch(step)`, the epochs gone through.
        name_rows: `name_rows(steps)` says in words which examples these steps (their indices, from 0) saw.
    """

    def __init__(
        self,
        write: Callable[[Mapping[str, Any]], None],
        display: "ProgressDisplay",
        every: int,
        max_skipped: int,
        flops: float,
        peak: float | None,
        epoch: Callable[[int], float],
        name_rows: Callable[[range], str],
    ) -> None:
        self._write, self._display, self._every, self._max_skipped = write, display, every, max_skipped
        self._flops, self._peak, self._epoch, self._name_rows = flops, peak, epoch, name_rows
        self._pending: _Pending | None = None
        self._tokens, self._seconds, self._since = 0, 0.0, time.monotonic()

    def begin(self, **values: float) -> None:
        """Writes what is known before the first step, as the line of step 0."""
        self._write({"step": 0, **values})
        self._display.say("step 0  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self._since = time.monotonic()

    def push(self, step: int, metrics: Mapping[str, Any], due: bool = False) -> None:
        """Takes the metrics of a step and finishes the step before.

        Args:
            step: counted from 1.
            metrics: scalars by name, as `make_step` documents them; they may still be on their way.
            due: its line is written even if it was not to be logged.

        Raises:
            NonFinite: see `flush`.
        """
        self.flush()
        self._pending = _Pending(step, metrics, due or step % self._every == 0)

    def add(self, **values: float) -> None:
        """Adds values to the line of the step pushed last, which will be written even if it was not to be logged."""
        assert self._pending is not None
        self._pending.more.update(values)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For work between two steps: its time is not in the tokens a second."""
        self._wait()
        try:
            yield
        finally:
            self._since = time.monotonic()

    def flush(self) -> None:
        """Waits for the step pushed last and writes its line.

        Raises:
            NonFinite: `max_skipped` updates in a row were not finite.
        """
        if self._pending is None:
            return
        self._wait()
        step, numbers, more = self._pending.step, dict(self._pending.metrics), self._pending.more
        is_due, self._pending = self._pending.is_due, None
        skipped = numbers.pop("skipped")
        if is_due or more or skipped:
            self._line(step, numbers, more | ({"skipped": skipped} if skipped else {}))
        if skipped >= self._max_skipped:
            raise NonFinite(self._remedy(step, skipped))

    def _wait(self) -> None:
        """Until the step pushed last is done; counts its tokens and its time."""
        if self._pending is None or self._pending.done:
            return
        self._pending.metrics = {k: v.item() for k, v in jax.device_get(dict(self._pending.metrics)).items()}
        self._pending.done = True
        now = time.monotonic()
        self._tokens += self._pending.metrics["num_tokens"]
        self._seconds, self._since = self._seconds + now - self._since, now

    def check(self, step: int, skipped: int) -> None:
        """Raises NonFinite where the last of a run's updates, `skipped` of them up to `step`, were not finite."""
        self.flush()
        if skipped:
            raise NonFinite(self._remedy(step, skipped))

    def _remedy(self, step: int, skipped: int) -> str:
        return (
            f"{skipped} updates in a row were not finite, up to step {step}, and were skipped: the loss, its gradient "
            f"or the new weights. Their rows came from {self._name_rows(range(step - skipped, step))}. Look at those "
            "rows, lower optim.learning_rate, or compute in float32: in another run.output_dir, since a run keeps its "
            "settings. The weights before them are saved as this step: `python -m train export` writes them out"
        )

    def _line(self, step: int, numbers: dict[str, Any], more: dict[str, Any]) -> None:
        rate = self._tokens / max(self._seconds, 1e-9) / jax.device_count()
        self._tokens, self._seconds = 0, 0.0
        line = {
            "step": step,
            **numbers,
            "tokens_per_second_per_device": rate,
            "mfu": None if self._peak is None else rate * self._flops / self._peak,
            "peak_memory_gib": peak_memory_gib(),
            "epoch": self._epoch(step),
            **more,
        }
        self._write(line)
        self._display.show(line)


class ProgressDisplay:
    """The progress bar on stderr; plain lines, some seconds apart, where stderr is not a terminal.

    Args:
        total: the run's steps.
        shown: False for no output at all, as in all processes but the first.
    """

    def __init__(self, total: int, shown: bool) -> None:
        self._console = Console(stderr=True, quiet=not shown)
        columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not (shown and self._console.is_terminal))
        self._task = self._bar.add_task("", total=total)
        self._total, self._said = total, -SECONDS_BETWEEN_PLAIN_LINES

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, done: int) -> None:
        """Tells how many steps a resumed run has behind it."""
        self._bar.update(self._task, completed=done)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows a finished line of metrics."""
        mfu = "" if line["mfu"] is None else f"  MFU {line['mfu']:.1%}"
        held_out = f"  held out {line['eval_loss']:.4f}" if "eval_loss" in line else ""
        right = f"  preferred {line['reward_accuracy']:.0%}" if "reward_accuracy" in line else ""
        words = (
            f"loss {line['loss']:.4f}{held_out}{right}  {line['tokens_per_second_per_device']:,.0f} tok/s/device{mfu}"
            f"  {line['peak_memory_gib']:.1f} GiB"
        )
        self._bar.update(self._task, completed=line["step"], description=words)
        last = line["step"] == self._total
        if self._bar.disable and (last or held_out or time.monotonic() - self._said > SECONDS_BETWEEN_PLAIN_LINES):
            self._said = time.monotonic()
            self.say(f"step {line['step']}/{self._total}  {words}")
