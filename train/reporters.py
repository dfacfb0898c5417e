"""Other tools that get the lines of metrics.jsonl: TensorBoard and Weights & Biases."""

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from model.errors import PunaError


class Reporter(Protocol):
    """Somewhere else that logged lines go.

    `log` gets a line: numbers by name, `step` among them, None for one that is not finite. `close` ends it.
    """

    def log(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `run_dir`/tensorboard.

    Args:
        run_dir: the run's folder.
        config: the settings, by dotted name.
        step: the last step that counts: what an earlier start wrote past it is purged when TensorBoard reads the files.

    Raises:
        PunaError: tensorboardX is not installed.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        writers = _optional("tensorboardX", "tensorboard")
        suffix = f".{step}"  # starts of one second would else write one file
        self._writer = writers.SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1, filename_suffix=suffix)

    def log(self, line: Mapping[str, Any]) -> None:
        """Adds the numbers of `line`, but for null ones, at its step.

        Raises:
            OSError: the thread that writes the file is gone, as after a full disk: its queue would never be emptied.
        """
        for name, value in line.items():
            if name != "step" and value is not None:
                self._check_alive()
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Writes what is still held. Raises OSError: see `log`."""
        self._check_alive()
        self._writer.close()

    def _check_alive(self) -> None:
        worker = getattr(self._writer.file_writer.event_writer, "_worker", None)
        if worker is not None and not worker.is_alive():
            raise OSError(f"{self._writer.logdir}: the event file could not be written")


class WandB:
    """A Weights & Biases run, resumed under the id that lies in its directory; WANDB_* variables steer it.

    Args:
        run_dir: the run's folder.
        config: the settings, by dotted name.
        step: the last step that counts. Steps past it that W&B has already are not sent again: they are the same.

    Raises:
        PunaError: wandb is not installed, or does not start, as without a key.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        wandb, file = _optional("wandb", "wandb"), run_dir / "wandb.id"
        if not step or not file.is_file():
            file.write_text(f"{run_dir.name}-{secrets.token_hex(4)}\n", encoding="utf-8")
        own = file.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(dir=run_dir, name=run_dir.name, id=own, config=dict(config), resume="allow")
        except Exception as error:  # the library's own, or of whatever it stands on
            raise PunaError(
                f"run.report_to names wandb, which did not start: {' '.join(str(error).split())[:200]}: run `wandb "
                "login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
            ) from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Sends the numbers of `line` at its step, unless W&B has it."""
        if line["step"] >= self._run.step:
            self._run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        """Ends the run; it can be resumed."""
        self._run.finish()


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise PunaError(f'run.report_to names {extra}, which is not installed: pip install "puna[{extra}]"') from None


REPORTERS = {"tensorboard": TensorBoard, "wandb": WandB}
