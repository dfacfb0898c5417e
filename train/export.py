"""What others read of a run: final/, any step on request, and model/, which is all of a model but its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from cli.files import atomic_path, copy_files, write_json
from convert import manifest
from convert.checkpoint import WriteOptions
from convert.generation import NAME as GENERATION
from convert.peft import adapter_settings, save_adapter, write_adapter
from convert.run import COMPANIONS, adapter_tensors, companions, is_adapter_step, read_step
from convert.save import save_model, write_model
from convert.source import Source, local_base
from model.chat import get_template, stop_ids
from model.chat_sources import SOURCES
from model.config import LlamaConfig
from model.errors import PunaError
from model.json_file import read_json
from model.tokenizer import TOKENIZER_FILES, Tokenizer
from train.data import Datasets
from train.sections import Config
from train.state import TrainState, join


@dataclass(frozen=True)
class Companions:
    """The small files beside what was trained: the tokenizer's, and how to prompt.

    Attributes:
        tokenizer: whose files are copied.
        template: the chat template that was trained, in jinja; None leaves the tokenizer's own.
        generation: the object of generation_config.json; empty for none.
    """

    tokenizer: Tokenizer
    template: str | None
    generation: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Writes them to `folder`."""
        self.tokenizer.save(folder)
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
            if (file := folder / "tokenizer_config.json").is_file():
                said = read_json(file)
                if said.pop("chat_template", None) is not None:  # two templates that differ would be one too many
                    write_json(file, said)
        if self.generation:
            write_json(folder / GENERATION, dict(self.generation))


class Exporter:
    """Writes what a run trains; every process makes one and calls it alike.

    Args:
        config: the run's.
        model: what is trained.
        base: what it started from, if anything.
        tokenizer: the run's.
        datasets: its data, which tells the template.
        say: shows a line.
    """

    def __init__(
        self,
        config: Config,
        model: LlamaConfig,
        base: Source | None,
        tokenizer: Tokenizer,
        datasets: Datasets,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._model, self._companions = config, model, _companions(model, base, tokenizer, datasets, say)
        named = base.base if base is not None and base.base is not None else config.model.path
        self._base = None if named is None else local_base(named)

    def describe(self, run_dir: Path, state: TrainState) -> None:
        """Writes `run_dir`/model: with it a step of the run can be read as a model, or as an adapter."""
        lora = self._config.lora
        if lora is None:
            name, said = "config.json", self._model.to_hf(self._config.model.param_dtype)
        else:
            params = join(state.params, state.frozen)
            name = "adapter_config.json"
            said = adapter_settings(params, lora.modules_to_save, lora.rslora, self._base, self._model.pieces)
        if jax.process_index() == 0:
            with atomic_path(run_dir / COMPANIONS, overwrite=True) as folder:
                folder.mkdir()
                self._companions.save(folder)
                write_json(folder / name, said)

    def export_average(self, state: TrainState, folder: Path) -> None:
        """Writes the moving average of the weights as `export` writes the weights, in their dtypes."""
        own = jax.tree.map(lambda mean, x: mean.astype(x.dtype), state.ema, state.params)
        self.export(replace(state, params=own), folder)

    def export(self, state: TrainState, folder: Path) -> None:
        """Writes a Hugging Face folder, or a PEFT adapter's where adapters were trained."""
        lora = self._config.lora
        if lora is None:
            save_model(folder, self._model, state.params, tokenizer=self._companions, overwrite=True)
            return
        params = join(state.params, state.frozen)
        saved, pieces = lora.modules_to_save, self._model.pieces
        save_adapter(folder, params, saved, lora.rslora, self._base, self._companions, overwrite=True, pieces=pieces)


def _companions(
    model: LlamaConfig, base: Source | None, tokenizer: Tokenizer, datasets: Datasets, say: Callable[[str], None]
) -> Companions:
    folders = [] if base is None else [*(a.folder for a in reversed(base.adapters)), base.checkpoint.folder]
    file = next((folder / GENERATION for folder in folders if (folder / GENERATION).is_file()), None)
    generation = {} if file is None else read_json(file)
    names = {dataset.template for dataset in datasets.train}
    if len(names) > 1:
        say("the sources of data.path are written with several templates: final/ keeps the template of its tokenizer")
    name = names.pop() if len(names) == 1 else None
    if name is None:
        return Companions(tokenizer, None, generation)
    said = generation.get("eos_token_id", list(model.eos_token_id))
    own = [said] if isinstance(said, int) else list(said or ())
    stops = list(dict.fromkeys((*own, *stop_ids(get_template(name, tokenizer), tokenizer))))
    if not generation:
        ids = {"bos_token_id": model.bos_token_id, "pad_token_id": model.pad_token_id}
        generation = {key: id for key, id in ids.items() if id is not None}
    generation = generation | {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    own_source = Path(name).read_text(encoding="utf-8") if name.endswith(".jinja") else tokenizer.chat_template
    return Companions(tokenizer, SOURCES.get(name, own_source), generation)


class _Files:
    """The companions that a run keeps in its model/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, folder: Path) -> None:
        copy_files((*TOKENIZER_FILES, GENERATION), self.folder, folder)


def export_step(run_dir: Path, destination: Path, step: int | None = None, overwrite: bool = False) -> int:
    """Writes one step of a run as its final/ would be: a Hugging Face folder, or a PEFT adapter's.

    Args:
        run_dir: the run's output_dir.
        destination: the folder to write.
        step: which; None for the newest.
        overwrite: replace what stands at `destination`.

    Returns:
        The step.

    Raises:
        PunaError: the run has no such step, or it is damaged.
    """
    saved = manifest.steps(run_dir / "checkpoints")
    if not saved:
        raise PunaError(f"{run_dir} holds no checkpoints: give the output_dir of a training run")
    chosen = saved[-1] if step is None else step
    if chosen not in saved:
        raise PunaError(f"--step {chosen}: {run_dir} has saved {', '.join(map(str, saved))}: give one of them")
    folder = run_dir / "checkpoints" / str(chosen)
    if is_adapter_step(folder):
        settings = read_json(companions(folder) / "adapter_config.json")
        tensors = adapter_tensors(folder, settings)
        write_adapter(destination, settings, tensors, _Files(companions(folder)), overwrite)
    else:
        write_model(destination, read_step(folder), WriteOptions(), overwrite)
    return chosen
