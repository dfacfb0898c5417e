"""What a run shows of itself: metrics.jsonl and MFU with its formula."""

import json
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from cli.files import atomic_path
from cli.lines import read_raw_lines
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import param_count
from train.outputs import Outputs
from train.reporters import Reporter

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


class MetricsFile:
    """metrics.jsonl: one object a logged step, each step once whatever happened in between.

    A line that cannot be written, as on a full disk, is left out, and the next one is tried again.

    Args:
        run_dir: the folder that holds the file.
        step: the last step that counts. Lines past it, which a run that was killed wrote after its last checkpoint, are
            removed first.
        reporters: get each line too, by name.
        outputs: hears of what fails.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        reporters: Mapping[str, Reporter] | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        self.path, self._reporters, self._outputs = (
            run_dir / "metrics.jsonl",
            dict(reporters or {}),
            outputs or Outputs(),
        )
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step] if self.path.exists() else []
        with self._outputs.spared(self.path), atomic_path(self.path, overwrite=True) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends `line`; it survives the death of the process. Numbers that are not finite are written as null."""
        finite = {
            k: None if isinstance(v, float) and not -float("inf") < v < float("inf") else v for k, v in line.items()
        }
        data = (json.dumps(finite) + "\n").encode()
        with self._outputs.spared(self.path, len(data)):
            self._append(data)
        for name, reporter in self._reporters.items():
            with self._outputs.spared(name, kinds=(Exception,)):
                reporter.log(finite)

    def close(self) -> None:
        """Closes the file and the reporters."""
        os.close(self._file)
        for name, reporter in self._reporters.items():
            with self._outputs.spared(name, kinds=(Exception,)):
                reporter.close()

    def _append(self, data: bytes) -> None:
        """Writes all of `data`, or nothing of it."""
        end = os.fstat(self._file).st_size
        try:
            if (written := os.write(self._file, data)) < len(data):  # the disk was full after so many
                os.write(self._file, data[written:])
        except OSError:
            os.ftruncate(self._file, end)
            raise


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a death is left out.

    Raises:
        PunaError: there is no such file, or a line of it is none of a run's.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise PunaError(f"{run_dir} has no metrics.jsonl: is it the output_dir of a run?")
    return [_metrics(path, number, line) for number, line in read_raw_lines(path) if line.endswith(b"\n")]


def _metrics(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PunaError(f"{path}:{number}: is not valid JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        raise PunaError(f"{path}:{number}: is no object with a step")
    return value
