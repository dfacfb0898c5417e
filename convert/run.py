"""What a training run leaves, as a model or an adapter: its final/, or one step of its checkpoints.

A step holds the arrays of a training state. What else a model is (config.json or adapter_config.json, the tokenizer,
the chat template) does not change during a run, and lies beside the steps in the run's model/.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from convert import manifest
from convert.checkpoint import Checkpoint
from convert.damage import malformed
from convert.lazy import Index, LazyTensor
from convert.names import hf_name, parameters
from model.config import LlamaConfig
from model.errors import PunaError
from model.json_file import read_json
from model.lora import SAVED_MODULES, module_value

COMPANIONS = "model"  # the folder of a run that says what is trained
_PARAMS = "params."
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}


def place_of(folder: Path) -> Path:
    """The folder that holds the model: final/ of a run, else `folder` itself.

    Raises:
        PunaError: a run without final/, or the folder of all its checkpoints.
    """
    run_dir = folder.parent if folder.name == "checkpoints" else folder
    if not (run_dir / "config.toml").is_file() or not (run_dir / "checkpoints").is_dir():
        return folder
    if folder == run_dir and (folder / "final").is_dir():
        return folder / "final"
    saved = manifest.steps(run_dir / "checkpoints")
    if not saved:
        raise PunaError(f"{folder} is a training run that has saved nothing yet: let it go on to its first checkpoint")
    what = "is a training run without final/" if folder == run_dir else "holds the steps of a training run"
    raise PunaError(f"{folder} {what}: give one of its steps, as {run_dir / 'checkpoints' / str(saved[-1])}")


def is_step(folder: Path) -> bool:
    """Whether `folder` is a step of a training run."""
    return (folder / manifest.MANIFEST).is_file() and (folder / "state").is_dir()


def companions(folder: Path) -> Path:
    """Where the small files of the model in `folder` lie: in a run's model/ for a step, else beside the weights."""
    return folder.resolve().parents[1] / COMPANIONS if is_step(folder) else folder


def is_adapter_step(folder: Path) -> bool:
    """Whether `folder` is a step of a run that trains adapters."""
    return is_step(folder) and (companions(folder) / "adapter_config.json").is_file()


def read_step(folder: Path) -> Checkpoint:
    """The model of a step, its weights unread.

    Raises:
        PunaError: the run's model/ is not there, or files of the step are damaged.
    """
    said = companions(folder) / "config.json"
    if not said.is_file():
        raise PunaError(f"{folder} is a step of a training run, and {said} is missing: resume the run, which writes it")
    with malformed(said):
        config = LlamaConfig.from_hf(read_json(said))
    arrays = _arrays(folder)
    tensors = {param.name: _tensor(folder, arrays, param.name) for param in parameters(config)}
    for param in parameters(config):
        if tensors[param.name].shape != param.shape:
            raise PunaError(f"{folder}: {param.name} has shape {tensors[param.name].shape}, and {said} {param.shape}")
    return Checkpoint(config, tensors, said.parent, "hf")


def adapter_tensors(folder: Path, settings: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """What peft would call the tensors of a step that trains adapters, in the order in which they are exported.

    Args:
        folder: the step.
        settings: its adapter_config.json.

    Raises:
        PunaError: files of the step are damaged.
    """
    arrays = _arrays(folder)
    found: dict[str, LazyTensor] = {}
    for weight in dict.fromkeys(name.rpartition(".")[0] for name in arrays if name.endswith(".a")):
        key = weight.removeprefix("layers.")
        for number in range(arrays[f"{weight}.a"][0]):
            module = hf_name(f"layers.{number}.{key}").rpartition(".")[0]
            rank = module_value(settings.get("rank_pattern") or {}, module, settings["r"])
            for part, name in _PARTS.items():
                if f"{weight}.{part}" not in arrays:
                    continue
                tensor = _tensor(folder, arrays, f"layers.{number}.{key}.{part}")
                if part in ("a", "b"):
                    tensor = tensor.narrow(1 if part == "a" else 0, 0, rank).transposed()
                found[f"base_model.model.{module}.{name}"] = tensor
    for module in settings.get("modules_to_save") or ():
        name = SAVED_MODULES[module]
        tensor = _tensor(folder, arrays, name)
        found[f"base_model.model.{hf_name(name)}"] = tensor.transposed() if name == "lm_head" else tensor
    return found


def _arrays(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a step's parameters, by name. Raises PunaError where files are not as they were written."""
    if damage := manifest.damaged_files(folder):
        raise PunaError("; ".join(manifest.explain(folder, damage)))
    arrays = manifest.read(folder)["arrays"]
    return {n.removeprefix(_PARAMS): tuple(x["shape"]) for n, x in arrays.items() if n.startswith(_PARAMS)}


def _tensor(folder: Path, arrays: Mapping[str, tuple[int, ...]], name: str) -> LazyTensor:
    """One parameter, of one layer where its name says so."""
    first, _, rest = name.partition(".")
    layer = int(rest.split(".")[0]) if first == "layers" else None
    stored = name if layer is None else f"layers.{rest.partition('.')[2]}"
    if stored not in arrays:
        raise PunaError(f"{folder} holds no {stored}: it is a step of another model than {companions(folder)} says")
    store = {"driver": "ocdbt", "base": f"file://{(folder / 'state').absolute()}/", "path": f"{_PARAMS}{stored}/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()

    def read(index: Index) -> np.ndarray:
        return array[index if layer is None else (layer, *index)].read().result()

    shape = arrays[stored] if layer is None else arrays[stored][1:]
    return LazyTensor(shape, array.dtype.numpy_dtype, read, str(folder))
