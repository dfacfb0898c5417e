"""A trace of some steps, which xprof and Perfetto open."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax


class Profile:
    """A trace of some steps. Each process writes its own.

    Use it as a context: a trace that is under way when a run ends is closed.

    Args:
        steps: the first and the last step of the trace, counted from 1; empty for none.
        folder: where it is written.
    """

    def __init__(self, steps: Sequence[int], folder: Path):
        self.steps, self.folder, self.is_open = tuple(steps), folder, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_open:
            self._close()

    def step(self, number: int) -> AbstractContextManager[Any]:
        """The context in which step `number` is started."""
        if self.steps and not self.is_open and self.steps[0] <= number <= self.steps[1]:
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.is_open = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self.is_open else nullcontext()

    def after(self, number: int, state: Any) -> None:
        """Closes the trace after its last step.

        Args:
            number: the step that was started last.
            state: what it makes, which is awaited.
        """
        if self.is_open and number >= self.steps[1]:
            jax.block_until_ready(state)
            self._close()

    def _close(self) -> None:
        jax.profiler.stop_trace()
        self.is_open = False
