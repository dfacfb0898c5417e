"""The picture of a run's layers: activations, gradients and updates over its steps, a row for each layer."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cli.files import atomic_path
from model.errors import PunaError
from train.metrics import read_metrics
from train.stats import KINDS

_LAYER = re.compile(r"(\w+)/layers\.(\d+)")


def plot_stats(run_dir: str | Path, destination: str | Path) -> bool:
    """Draws the norms that `run.stats_steps` logs, on a logarithmic scale of colours.

    Args:
        run_dir: the run's folder.
        destination: the png to write, or to replace.

    Returns:
        Whether there were any to draw.

    Raises:
        PunaError: the run has no metrics, or a norm is no number.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    lines = read_metrics(run_dir)
    grids = {kind: found for kind in KINDS if (found := _grid(lines, kind)) is not None}
    if not grids:
        return False
    figure = Figure(figsize=(8, 2.5 * len(grids)), layout="constrained")
    FigureCanvasAgg(figure)
    rows_of_axes = np.ravel(figure.subplots(len(grids), sharex=True))
    for axes, (kind, (steps, values)) in zip(rows_of_axes, grids.items(), strict=True):
        shown = np.ma.masked_less_equal(np.ma.masked_invalid(values), 0)
        rows = np.arange(len(values) + 1) - 0.5
        edges = np.concatenate([[steps[0] - 0.5], (steps[1:] + steps[:-1]) / 2, [steps[-1] + 0.5]])
        mesh = axes.pcolormesh(edges, rows, shown, norm=LogNorm() if shown.count() else None, cmap="viridis")
        figure.colorbar(mesh, ax=axes, label=kind.replace("_", " "))
        axes.set(title=KINDS[kind], ylabel="layer")
    rows_of_axes[-1].set_xlabel("step")
    with atomic_path(destination, overwrite=True) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True


def _grid(lines: Sequence[dict[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The steps that have norms of a kind, [S], and these [layers, S]; a null is not a number."""
    columns: list[tuple[int, dict[int, float]]] = []
    for line in lines:
        named = {name: _LAYER.fullmatch(name) for name in line}
        layers = {int(found[2]): line[name] for name, found in named.items() if found and found[1] == kind}
        if layers:
            columns.append((line["step"], layers))
    if not columns:
        return None
    depth = 1 + max(max(layers) for _, layers in columns)
    try:
        values = [
            [np.nan if layers.get(i) is None else float(layers[i]) for _, layers in columns] for i in range(depth)
        ]
        return np.array([float(step) for step, _ in columns]), np.array(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise PunaError(f"metrics.jsonl: a {kind} is no number to draw ({error}): take the line out") from None
