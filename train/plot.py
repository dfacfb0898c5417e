"""The picture of a run: its training loss, what was held out, and the learning rate."""

import os
from collections.abc import Sequence
from pathlib import Path

from cli.files import atomic_path
from model.errors import PunaError
from train.metrics import read_metrics


def plot(runs: Sequence[str | Path], destination: str | Path) -> None:
    """Draws the training loss (and evaluation loss, as dots) of runs over their steps.

    Args:
        runs: folders of runs.
        destination: the picture to write, or to replace; its suffix says its kind (png without one).

    Raises:
        PunaError: a run has no metrics, or the suffix is of no kind of picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    kind, kinds = (
        os.path.splitext(destination)[1][1:].lower() or "png",
        FigureCanvasAgg(figure).get_supported_filetypes(),
    )
    if kind not in kinds:
        raise PunaError(f"{destination}: .{kind} is no kind of picture; choose {', '.join(kinds)}")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for run in runs:
        lines = read_metrics(run)
        trained = [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
        held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
        (curve,) = axes.plot(*_columns(trained), linewidth=1, label=Path(run).name)
        if held_out:
            axes.plot(
                *_columns(held_out), "o", markersize=4, color=curve.get_color(), label=f"{Path(run).name}, held out"
            )
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(destination, overwrite=True) as temporary:
        figure.savefig(temporary, format=kind, dpi=120)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
