"""A grid of runs: each combination of values in its own folder and its own process, compared in the end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cli.files import atomic_path, write_json
from cli.gpu import gpu_count
from model.errors import PunaError
from model.json_file import read_json
from train.config import load_config
from train.distributed import EXIT_PREEMPTED, Preempted
from train.launch import start_process
from train.metrics import read_metrics
from train.plot import plot
from train.schema import flat
from train.sections import Config

PICTURE = "sweep.png"
_FINISHED = "sweep.json"
_POLL_SECONDS = 0.05
# A value ends at a comma that stands outside of quotes, lists and tables.
_VALUE = re.compile(r"""(?:"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|[^,])+""")


def sweep(path: str | Path, overrides: Sequence[str], axes: Sequence[str], at_once: int = 1) -> tuple[Table, bool]:
    """Runs every combination of the values, each in its own folder under run.output_dir.

    Runs that have finished with these settings are not run again; one that has not is resumed. A run that fails does
    not keep the others from running. `sweep.png` in run.output_dir shows the losses of all.

    Args:
        path: the TOML file.
        overrides: `section.key=value` each, for all runs.
        axes: `section.key=value,value,...` each.
        at_once: how many runs go at the same time, each on its part of the GPUs. What several print is in NAME.log
            beside the folder of each.

    Returns:
        The table of all runs, and whether every one of them finished.

    Raises:
        PunaError: an axis or a combination is wrong, or the GPUs cannot be shared out; nothing has been run then.
        Preempted: a signal came; the steps of the runs under way are saved.
    """
    shares = device_shares(at_once)
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

    outcomes, waiting = {}, []
    for number, (name, each, config) in enumerate(zip(names, arguments, configs, strict=True), 1):
        which = f"run {number} of {len(names)}, {name}"
        if _is_finished(folder, name, config):
            _say(f"{which}: done before")
            outcomes[name] = "done"
        else:
            waiting.append((name, which, [sys.executable, "-m", "train", "run", str(path), *each]))
    with Children(shares, None if at_once == 1 else folder) as children:
        while waiting or children.running:
            while waiting and children.has_room:
                name, which, command = waiting.pop(0)
                _say(which)
                _record(folder, name, None)
                children.start(name, command)
            name, code = children.wait()
            if code == EXIT_PREEMPTED or children.signals:
                children.stop()
                raise Preempted
            if code == 0:
                _record(folder, name, configs[names.index(name)])
            else:
                _say(f"{name}: failed with exit code {code}")
            outcomes[name] = "failed" if code else "done"
    outcomes = {name: outcomes[name] for name in names}

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


def device_shares(at_once: int) -> list[dict[str, str]]:
    """The environment of each of so many runs at once: an equal part of this host's GPUs, where there are any.

    Raises:
        PunaError: the GPUs cannot be shared out so.
    """
    if at_once < 1:
        raise PunaError(f"--at-once {at_once}: give 1 or more")
    gpus = gpu_count(os.environ)
    if at_once == 1 or not gpus:
        return [{}] * at_once
    if gpus % at_once:
        raise PunaError(f"--at-once {at_once} does not divide the {gpus} GPUs of this host")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    each = gpus // at_once
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[i * each : (i + 1) * each])} for i in range(at_once)]


class Children:
    """Commands that run side by side. Within its block, the first SIGINT or SIGTERM lets those under way save their
    step and stop, and the second kills them. Leaving the block waits for all.

    Args:
        shares: what is added to the environment of each; as many run at once.
        logs: the folder for what each prints, as NAME.log; None leaves it the terminal.

    Attributes:
        running: the processes by name.
        signals: how many came.
    """

    def __init__(self, shares: Sequence[Mapping[str, str]], logs: Path | None = None) -> None:
        self.signals = 0
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._free, self._shares = list(shares), dict[str, Mapping[str, str]]()
        self._logs = logs

    def __enter__(self) -> "Children":
        self._before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for child in self.running.values():
            child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def has_room(self) -> bool:
        """Whether another may be started: no signal came, and one of the shares is free."""
        return bool(self._free) and not self.signals

    def start(self, name: str, command: Sequence[str]) -> None:
        """Starts a command."""
        share = self._shares[name] = self._free.pop(0)
        if self._logs is None:
            child = start_process(command, {**os.environ, **share})
        else:
            self._logs.mkdir(parents=True, exist_ok=True)
            with (self._logs / f"{name}.log").open("ab") as log:
                child = start_process(command, {**os.environ, **share}, log)
        self.running[name] = child
        if self.signals:  # it came while the command started
            child.send_signal(signal.SIGTERM)

    def wait(self) -> tuple[str, int]:
        """The name of a command that has ended, the first that does, and its exit code, below 0 where a signal ended
        it; EXIT_PREEMPTED where none was started after a signal."""
        while self.running:
            for name, child in self.running.items():
                if (code := child.poll()) is not None:
                    del self.running[name]
                    self._free.append(self._shares.pop(name))
                    return name, code
            time.sleep(_POLL_SECONDS)
        return "", EXIT_PREEMPTED

    def stop(self) -> None:
        """Lets those that run save their step and stop, where no signal has told them yet."""
        if not self.signals:
            for child in self.running.values():
                child.send_signal(signal.SIGTERM)

    def _forward(self, number: int, frame: object) -> None:
        self.signals += 1
        if self.signals == 1:
            _say(f"{signal.Signals(number).name}: each run saves its step and stops")
        for child in self.running.values():
            child.send_signal(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)


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
