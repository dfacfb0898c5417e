"""What a run shows of itself: metrics.jsonl, the loss picture, MFU with its formula, and reports to other tools."""

import importlib
import json
import os
import resource
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from cli.files import atomic_path
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import param_count

# Dense bfloat16 peaks in FLOP/s by the start of the device kind, longest first.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}

MFU_FORMULA = (
    "MFU = tokens/s/device x FLOP/token / dense bf16 peak, "
    "FLOP/token = 6 N + 6 L H D S (causal; N without the input embedding, 4 instead of 6 for frozen weights)"
)


def flops_per_token(model: LlamaConfig, length: int, trained: int | None = None) -> float:
    """FLOP of one trained token: 6 N + 6 L H D S (PaLM, arXiv:2204.02311, appendix B, with half the attention matrix).

    Of the 6, two are the forward pass, two the gradient of the input and two that of the weight; a frozen weight has no
    gradient of its own: 4. N counts the weights of matrix products: the head even where tied, no input embedding.

    Args:
        model: the model's shape.
        length: tokens in a row, S.
        trained: how many weights have gradients beside a frozen model; None where the model itself is trained.
    """
    n = param_count(model) - (0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size)
    attention = 6 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * length
    frozen = 0 if trained is None else n
    return 6 * (n if trained is None else trained) + 4 * frozen + attention


def peak_flops() -> float | None:
    """The dense bfloat16 peak of a device here in FLOP/s; None where it is not known (CPUs)."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)), None)


def peak_memory_gib() -> float:
    """The most memory in use so far, GiB: of the fullest device here, or of this process where devices do not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    used = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return (max(used) if used else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30


class Reporter(Protocol):
    """Somewhere else that logged lines go.

    `log` gets a line: numbers by name, `step` among them, None for one that is not finite. `close` ends it.
    """

    def log(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `run_dir`/tensorboard.

    Raises:
        PunaError: tensorboardX is not installed.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._writer = _optional("tensorboardX", "tensorboard").SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, line: Mapping[str, Any]) -> None:
        """Adds the numbers of `line`, but for null ones, at its step."""
        for name, value in line.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Writes what is still held."""
        self._writer.close()


class WandB:
    """A Weights & Biases run, resumed under the id that its directory has; WANDB_* variables steer it.

    Args:
        run_dir: the run's folder, from whose path its id is made.
        config: the settings, by dotted name.

    Raises:
        PunaError: wandb is not installed.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        own = f"{run_dir.name}-{zlib.crc32(str(run_dir.resolve()).encode()):08x}"
        wandb = _optional("wandb", "wandb")
        self._run = wandb.init(dir=run_dir, name=run_dir.name, id=own, config=dict(config), resume="allow")

    def log(self, line: Mapping[str, Any]) -> None:
        """Sends the numbers of `line` at its step."""
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


class MetricsFile:
    """metrics.jsonl: one object a logged step, each step once whatever happened in between.

    Args:
        run_dir: the folder that holds the file.
        step: the last step that counts. Lines past it, which a run that was killed wrote after its last checkpoint, are
            removed first.
        reporters: get each line too.
    """

    def __init__(self, run_dir: Path, step: int, reporters: Iterable[Reporter] = ()) -> None:
        self.path, self._reporters = run_dir / "metrics.jsonl", list(reporters)
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step] if self.path.exists() else []
        with atomic_path(self.path, overwrite=True) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends `line`; it survives the death of the process. Numbers that are not finite are written as null."""
        finite = {
            k: None if isinstance(v, float) and not -float("inf") < v < float("inf") else v for k, v in line.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for reporter in self._reporters:
            reporter.log(finite)

    def close(self) -> None:
        """Closes the file and the reporters."""
        self._file.close()
        for reporter in self._reporters:
            reporter.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a death is left out.

    Raises:
        PunaError: there is no such file.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise PunaError(f"{run_dir} has no metrics.jsonl: is it the output_dir of a run?")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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
