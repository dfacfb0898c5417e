"""A model whatever its format: its config, every parameter as an unread tensor in our layout, how to write it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from jax.numpy import dtype as as_dtype

from cli.files import write_json
from cli.progress import ProgressBar, no_progress
from convert.lazy import LazyTensor
from model.config import LlamaConfig
from model.quantize import QuantizedArray


@dataclass(frozen=True)
class LazyQuantized:
    """A quantized weight in a file: `like` has its shapes and settings, and calling it loads its numbers."""

    like: QuantizedArray
    load: Callable[[], QuantizedArray]

    def __call__(self) -> QuantizedArray:
        return self.load()


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` are named as in convert/names.py: `embed`, `layers.0.wq`, ...; `folder` holds the companion files, and
    the model itself unless that is one `file`, of which `parts` are all parts where it is split.

    Of the weights in `quantized`, which loads them as they are, `tensors` reads the dequantized numbers.
    """

    config: LlamaConfig
    tensors: dict[str, LazyTensor]
    folder: Path
    format: str
    quantized: Mapping[str, LazyQuantized] = field(default_factory=dict)
    file: Path | None = None
    parts: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, quantized ones as they are."""
        floats = sum(tensor.nbytes for name, tensor in self.tensors.items() if name not in self.quantized)
        return floats + sum(weight.like.nbytes for weight in self.quantized.values())

    def as_floats(self, dtype: str | None = None, allow_overflow: bool = False) -> "Checkpoint":
        """Without quantized weights, whose dequantized numbers take their place; all in `dtype` where given. Reading
        them then raises PunaError where numbers overflow, unless that is allowed."""
        if dtype is None:
            return replace(self, quantized={})
        kind = np.dtype(as_dtype(dtype))
        tensors = {name: tensor.cast(kind, name, allow_overflow) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, quantized={})


class SavesItself(Protocol):
    """What a tokenizer is here."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class WriteOptions:
    """How a model is written. A format reads those that its row in convert/formats.py names, and the last two.

    dtype: float32, bfloat16 or float16, of all weights; None keeps what they have. allow_overflow: numbers beyond the
    dtype's become infinite, where else they are an error. quantize: int8, int4 or nf4, for
    the layers' linear weights; block: int4's weights to a scale; double_quant: quantize nf4's scales too (None: yes).
    max_shard_size: bytes of one safetensors file; None is transformers' 5 GB. shards: Meta's model-parallel files.
    tokenizer: writes its files in place of those beside the model. bar: shows how many bytes are written.
    """

    dtype: str | None = None
    allow_overflow: bool = False
    quantize: str | None = None
    block: int | None = None
    double_quant: bool | None = None
    max_shard_size: int | None = None
    shards: int = 1
    tokenizer: SavesItself | None = None
    bar: ProgressBar = no_progress


def write_generation_config(folder: Path, config: LlamaConfig) -> None:
    """`generation_config.json`, from the config's token ids, where the source had none."""
    path = folder / "generation_config.json"
    if not path.exists():
        said = config.to_hf()
        ids = {key: said[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if said[key] is not None}
        write_json(path, {"_from_model_config": True, **ids})


def main_dtype(tensors: Mapping[str, LazyTensor]) -> str:
    """The name of the dtype that most of the bytes have: what a config.json calls the model's."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    return max(sizes, key=sizes.__getitem__)
