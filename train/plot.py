"""The picture of a run: its training loss, what was held out, and the learning rate."""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

from cli.files import atomic_path
from model.errors import PunaError
from train.metrics import read_metrics
from train.outputs import Outputs
from train.plot_stats import plot_stats

SECONDS_BETWEEN_PICTURES = 10.0


def plot(runs: Sequence[str | Path], destination: str | Path) -> None:
    """Draws the training loss of runs over their steps, with what was held out as dots, and the learning rate below.

    Long runs show a moving average, with the losses themselves faint behind it.

    Args:
        runs: folders of runs.
        destination: the picture to write, or to replace; its suffix says its kind (png without one).

    Raises:
        PunaError: a run has no metrics, or the suffix is of no kind of picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    kind, kinds = (
        os.path.splitext(destination)[1][1:].lower() or "png",
        FigureCanvasAgg(figure).get_supported_filetypes(),
    )
    if kind not in kinds:
        raise PunaError(f"{destination}: .{kind} is no kind of picture; choose {', '.join(kinds)}")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    axes.set_ylabel("loss")
    below.set(xlabel="step", ylabel="learning rate")
    for run, name in zip(runs, names_of(runs), strict=True):
        lines = read_metrics(run)
        steps, losses = _column(lines, "loss")
        shown = smooth(losses)
        (curve,) = axes.plot(steps, shown, linewidth=1, label=name)
        colour = curve.get_color()
        if shown != losses:
            axes.plot(steps, losses, linewidth=0.5, alpha=0.25, color=colour)
        held_out = _column(lines, "eval_loss")
        if held_out[0]:
            axes.plot(*held_out, "o", markersize=4, color=colour, label=f"{name}, held out")
        below.plot(*_column(lines, "learning_rate"), linewidth=1, color=colour)
    for each in (axes, below):
        each.grid(alpha=0.3)
    axes.legend()
    with atomic_path(destination, overwrite=True) as temporary:
        figure.savefig(temporary, format=kind, dpi=120)


def names_of(runs: Sequence[str | Path]) -> list[str]:
    """What to call each run: the last parts of its path, as many as tell it from the others."""
    parts = [Path(run).resolve().parts for run in runs]

    def name(own: tuple[str, ...]) -> str:
        others = [other for other in parts if other != own]
        length = next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
        return "/".join(own[-length:])

    return list(map(name, parts))


def smooth(losses: Sequence[float]) -> list[float]:
    """A moving average over a fiftieth of the losses on either side; short runs as they are.

    At the ends the window is as wide as fits evenly around the step.
    """
    width = len(losses) // 50
    if width < 2:
        return list(losses)
    sums = [0.0, *accumulate(losses)]
    reach = [min(width, i, len(losses) - 1 - i) for i in range(len(losses))]
    return [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The steps at which the lines have a number of that name, and these numbers."""
    try:
        points = [(float(line["step"]), float(line[name])) for line in lines if line.get(name) is not None]
    except (TypeError, ValueError, OverflowError) as error:
        raise PunaError(
            f"metrics.jsonl: a {name} or its step is no number to draw ({error}): take the line out"
        ) from None
    return [x for x, _ in points], [y for _, y in points]


class Painter:
    """Draws a run's training_loss.png in a thread, now and then and at the end, and layer_stats.png where it logs them.

    Args:
        run_dir: the run's folder.
        outputs: hears of what fails.
    """

    def __init__(self, run_dir: Path, outputs: Outputs) -> None:
        self._run_dir, self._outputs = run_dir, outputs
        self._thread = ThreadPoolExecutor(1)
        self._painted = -SECONDS_BETWEEN_PICTURES

    def paint(self, last: bool) -> None:
        """Draws what there is, unless it was drawn a moment ago and this is not the last time."""
        if last or time.monotonic() - self._painted > SECONDS_BETWEEN_PICTURES:
            self._painted = time.monotonic()
            self._thread.submit(self._paint)

    def close(self) -> None:
        """Waits for the picture that is under way."""
        self._thread.shutdown()

    def _paint(self) -> None:
        file, layers = self._run_dir / "training_loss.png", self._run_dir / "layer_stats.png"
        with self._outputs.spared(file):
            plot([self._run_dir], file)
        with self._outputs.spared(layers):
            plot_stats(self._run_dir, layers)
