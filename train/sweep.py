"""A grid of runs: each combination of values in its own folder, one process after the other, compared in the end."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cli.files import atomic_path, write_json
from model.errors import PunaError
from model.json_file import read_json
from train.config import Config, load_config
from train.distributed import EXIT_PREEMPTED, Preempted
from train.launch import start_process
from train.metrics import read_metrics
from train.plot import plot
from train.schema import flat

PICTURE = "sweep.png"
_FINISHED = "sweep.json"
# A value ends at a comma that stands outside of quotes, lists and tables.
_VALUE = re.compile(r"""(?:"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|[^,])+""")


def sweep(path: str | Path, overrides: Sequence[str], axes: Sequence[str]) -> tuple[Table, bool]:
    """Runs every combination of the values, each in its own folder under run.output_dir.

    Runs that have finished with these settings are not run again; one that has not is resumed. A run that fails does
    not keep the others from running. `sweep.png` in run.output_dir shows the losses of all.

    Args:
        path: the TOML file.
        overrides: `section.key=value` each, for all runs.
        axes: `section.key=value,value,...` each.

    Returns:
        The table of all runs, and whether every one of them finished.

    Raises:
        PunaError: an axis or a combination is wrong; nothing has been run then.
        Preempted: a signal came; the step of the run under way is saved.
    """
    folder = Path(load_config(path, overrides).run.output_dir)
    grid = [list(choice) for choice in product(*map(values_of, axes))]
    names = [_folder_name(choice) for choice in grid]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PunaError(f"--sweep: {twice} comes twice: give each setting once, and each of its values once")
    arguments = [
        [*overrides, *choice, f"run.output_dir={json.dumps(str(folder / name), ensure_ascii=False)}"]
        for choice, name in zip(grid, names, strict=True)
    ]
    configs = [load_config(path, each) for each in arguments]

    outcomes, children = {}, Children()
    with children:
        for number, (name, each, config) in enumerate(zip(names, arguments, configs, strict=True), 1):
            which = f"run {number} of {len(names)}, {name}"
            if _is_finished(folder, name, config):
                _say(f"{which}: done before")
                outcomes[name] = "done"
                continue
            _say(which)
            _record(folder, name, None)
            code = children.run([sys.executable, "-m", "train", "run", str(path), *each])
            if code == EXIT_PREEMPTED or children.signals:
                raise Preempted
            if code == 0:
                _record(folder, name, config)
            else:
                _say(f"{which}: failed with exit code {code}")
            outcomes[name] = "failed" if code else "done"

    measured = [folder / name for name in names if (folder / name / "metrics.jsonl").exists()]
    if measured:
        plot(measured, folder / PICTURE)
    return comparison(folder, dict(zip(names, grid, strict=True)), outcomes), set(outcomes.values()) == {"done"}


def values_of(axis: str) -> list[str]:
    """The overrides of one axis.

    Args:
        axis: `section.key=value,value,...`; commas within quotes or brackets belong to a value.

    Raises:
        PunaError: there is no value, an empty one, or the axis is of run.output_dir.
    """
    name, equals, text = axis.partition("=")
    values = [value.strip() for value in _VALUE.findall(text)]
    if not equals or not values or not all(values) or re.search(r",\s*(,|$)|^\s*,", text):
        raise PunaError(
            f"--sweep {axis!r} names no values; write section.key=value,value, as in optim.learning_rate=1e-4,3e-4"
        )
    if name.strip() == "run.output_dir":
        raise PunaError("--sweep run.output_dir: each run has a folder of its own under it; sweep another setting")
    return [f"{name.strip()}={value}" for value in values]


def comparison(folder: Path, grid: Mapping[str, Sequence[str]], outcomes: Mapping[str, str]) -> Table:
    """One row for each run: its values, how far it came, its last losses, and how it ended.

    Args:
        folder: holds the folders of the runs.
        grid: of each run, its name and its overrides.
        outcomes: of each run, in a word.
    """
    shown = Table(title=str(folder), box=box.SIMPLE)
    for override in next(iter(grid.values())):
        shown.add_column(override.partition("=")[0])
    for column in ("step", "loss", "held out"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    for name, overrides in grid.items():
        lines = read_metrics(folder / name) if (folder / name / "metrics.jsonl").exists() else []
        last = {key: value for line in lines for key, value in line.items() if value is not None}
        numbers = (f"{last[key]:.4f}" if key in last else "" for key in ("loss", "eval_loss"))
        values = (override.partition("=")[2] for override in overrides)
        shown.add_row(*values, str(last.get("step", "")), *numbers, outcomes[name])
    return shown


class Children:
    """Runs commands one after the other. Within its block, the first SIGINT or SIGTERM lets the one under way save
    its step and stop, and the second kills it."""

    def __init__(self) -> None:
        self.signals = 0
        self._signal: Callable[[int], None] = lambda number: None

    def __enter__(self) -> "Children":
        self._before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """The exit code of the command, below 0 where a signal ended it; it is not started after a signal."""
        if self.signals:
            return EXIT_PREEMPTED
        child = start_process(command, os.environ)
        self._signal = child.send_signal
        if self.signals:  # it came while the command started
            child.send_signal(signal.SIGTERM)
        return child.wait()

    def _forward(self, number: int, frame: object) -> None:
        self.signals += 1
        if self.signals == 1:
            _say(f"{signal.Signals(number).name}: the run saves its step and stops")
        self._signal(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)


def _folder_name(overrides: Sequence[str]) -> str:
    return re.sub(r"[^\w.,=+-]", "_", ",".join(overrides))


def _finished(folder: Path) -> dict[str, Any]:
    file = folder / _FINISHED
    return read_json(file) if file.exists() else {}


def _is_finished(folder: Path, name: str, config: Config) -> bool:
    return _finished(folder).get(name) == _settings(config) and (folder / name / "final").exists()


def _record(folder: Path, name: str, config: Config | None) -> None:
    """Notes that a run has finished with `config`, or, with None, that it has not."""
    finished = _finished(folder)
    if config is None and finished.pop(name, None) is None:
        return
    if config is not None:
        finished[name] = _settings(config)
    with atomic_path(folder / _FINISHED, overwrite=True) as path:
        write_json(path, finished)


def _settings(config: Config) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(dict(flat(config)), default=str))


def _say(line: str) -> None:
    print(f"sweep: {line}", file=sys.stderr, flush=True)
