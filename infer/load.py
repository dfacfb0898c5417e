"""What every command of `infer` starts with: a model, its tokenizer, its devices, and how it wishes to be sampled."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from cli.gpu import set_defaults
from cli.said import say_once
from convert.adapter_fit import adapted_config
from convert.adapters import apply_adapters
from convert.checkpoint import Checkpoint
from convert.generation import NAME as GENERATION
from convert.generation import read_generation
from convert.load import Quantize, load_params
from convert.peft import Adapter, read_adapter
from convert.run import COMPANIONS
from convert.source import find_source
from convert.tokenizer_files import find_tokenizer, tokenizer_folder
from infer.engine import Engine
from infer.generate import cache_dtype
from infer.proposals import Draft, PromptLookup, Speculation
from infer.sample import Sampling
from model.chat import Template, get_template
from model.config import LlamaConfig
from model.errors import PunaError
from model.layout import round_activations
from model.linear import product
from model.params import Params
from model.quantize import Activations
from model.selected import side_by_side
from model.sharding import MESH_AXES, make_mesh
from model.tokenizer import Tokenizer

LONGEST = 4096  # tokens that an engine makes room for where nobody says


class Quantization(NamedTuple):
    """What is done with the layers' linear weights.

    Attributes:
        quantize: from a weight to a quantized one; None keeps weights as they are stored.
        activations: what quantized weights are multiplied with.
    """

    quantize: Quantize | None = None
    activations: Activations = "float"


AS_STORED = Quantization()


class ModelSource(NamedTuple):
    """A model found and understood, its weights unread: requests can be refused before they are.

    Attributes:
        checkpoint: the files, open.
        config: the shape of the model, as the adapters make it.
        tokenizer: the model's, or that of its adapters.
        generation: the object of generation_config.json; empty where there is none.
        adapters: those over its weights, all active, unmerged.
    """

    checkpoint: Checkpoint
    config: LlamaConfig
    tokenizer: Tokenizer
    generation: dict[str, Any]
    adapters: tuple[Adapter, ...] = ()

    @property
    def name(self) -> str:
        """What to call it: the last part of its folder's name, of a training run the run's."""
        folder = self.checkpoint.folder.resolve()
        is_run = folder.name in ("final", COMPANIONS) and (folder.parent / "config.toml").is_file()
        return folder.parent.name if is_run else folder.name

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: generation_config.json's, else config.json's, else the tokenizer's."""
        said = self.generation.get("eos_token_id")
        if said is not None:
            return tuple(said) if isinstance(said, list) else (said,)
        if self.config.eos_token_id:
            return self.config.eos_token_id
        return () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)


def find_model(model: str, tokenizer: str | Path | None = None, adapters: Sequence[str | Path] = ()) -> ModelSource:
    """The model that a folder, a GGUF file or a Hub id names.

    Args:
        model: the folder, file or id; also a training run, a step of one, or an adapter, whose base is then found.
        tokenizer: a file, a folder or a Hub id; None for the one that merging the adapters would give the model, or
            that lies with it.
        adapters: folders of adapters, all active.

    Raises:
        PunaError: no model or no tokenizer there, a model that is not a LLaMA as we know it, or an adapter that does
            not fit it.
    """
    origin = find_source(model)
    checkpoint = origin.checkpoint
    config, found = checkpoint.config, (*origin.adapters, *(read_adapter(folder) for folder in adapters))
    for adapter in found:
        config = adapted_config(adapter, config)
    place = tokenizer_folder(checkpoint.folder, [adapter.folder for adapter in found])
    try:
        own = find_tokenizer(tokenizer or place)
    except PunaError as error:
        raise PunaError(f"{error}; name another place with --tokenizer") from None
    folders = (*(adapter.folder for adapter in reversed(origin.adapters)), checkpoint.folder)
    files = (folder / GENERATION for folder in folders)
    defaults = next((file for file in files if file.exists()), None)
    source = ModelSource(checkpoint, config, own, {} if defaults is None else read_generation(defaults), found)
    _say_other_ends(source)
    return source


def _say_other_ends(source: ModelSource) -> None:
    """Says which file names an end that generation does not stop at; of three, transformers' choice is taken."""
    taken, folder = source.eos_ids, source.checkpoint.folder
    own = source.tokenizer.eos_id
    others = {"config.json": source.config.eos_token_id, "the tokenizer": () if own is None else (own,)}
    left = [f"{name} {', '.join(map(str, ids))}" for name, ids in others.items() if not {*ids} <= {*taken}]
    if left:
        ends = ", ".join(map(str, taken))
        say_once(f"{folder}: texts end at token {ends}, as transformers ends them; another end: {'; '.join(left)}")


def load(
    source: ModelSource,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    form: Quantization = AS_STORED,
) -> tuple[LlamaConfig, Params]:
    """The weights as decoding wants them, and the config as adapters leave it.

    Args:
        source: the model, with its adapters.
        mesh: the devices to load onto; None is the first device.
        dtype: of all floats; None keeps what is stored.
        form: what is done with the layers' linear weights.

    Raises:
        PunaError: naming what is wrong with the files, or an adapter or a form that does not fit.
    """
    config, params = _load(source, mesh, dtype, form.quantize)
    return config, _multiplied(params, form, mesh)


def _load(
    source: ModelSource, mesh: Mesh | None, dtype: str | None, quantize: Quantize | None
) -> tuple[LlamaConfig, Params]:
    with Console(stderr=True).status(f"Loading {source.checkpoint.folder}"):
        params = load_params(source.checkpoint, dtype, mesh, quantize, layout="per_layer")
        config, params = apply_adapters(params, source.checkpoint.config, source.adapters, mesh)
    if found := _not_finite(params):
        more = f" and {len(found) - 1} more weights hold" if len(found) > 1 else " holds"
        print(
            f"{source.checkpoint.folder}: {found[0]}{more} NaN or infinite numbers: what is made with them is no text",
            file=sys.stderr,
        )
    return config, params


def _not_finite(params: Params) -> list[str]:
    """The weights with a number that is NaN or infinite."""
    is_finite = jax.jit(lambda x: jnp.isfinite(x).all())
    floats = [each for each in jax.tree.leaves_with_path(params) if jnp.issubdtype(each[1].dtype, jnp.floating)]
    finite = jax.device_get([is_finite(x) for _, x in floats])
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in floats]
    return [name for name, one in zip(names, finite, strict=True) if not one]


def _multiplied(params: Params, form: Quantization, mesh: Mesh | None) -> Params:
    """The weights as the form's activations are multiplied with them: the last step, after all adapters."""
    return params if form.activations == "float" else round_activations(params, mesh)


def load_engine(
    source: ModelSource,
    adapters: Mapping[str, Adapter],
    mesh: Mesh | None = None,
    dtype: str | None = None,
    form: Quantization = AS_STORED,
    *,
    rows: int = 8,
    length: int | None = None,
    queue: int = 1024,
    speculate: Speculation | None = None,
) -> Engine:
    """An engine over a model, with `adapters` side by side: a request names one by its index.

    Args:
        source: the model.
        adapters: by name, in the order of `Request.adapter`.
        mesh: as in `load`.
        dtype: as in `load`.
        form: as in `load`.
        rows: as in `Engine`.
        length: tokens of the longest request; None is the model's context, LONGEST at most.
        queue: as in `Engine`.
        speculate: as in `Engine`.

    Raises:
        PunaError: an adapter does not fit the model, or does more than adapt its linear weights; or as `load`.
    """
    config, params = _load(source, mesh, dtype, form.quantize)
    trees = [apply_adapters(params, config, [adapter], mesh)[1] for adapter in adapters.values()]
    if trees:
        params = side_by_side([params, *trees][1:], product)
        del trees
    return Engine(
        _multiplied(params, form, mesh),
        config,
        source.tokenizer,
        rows=rows,
        length=length or min(LONGEST, config.max_position_embeddings),
        queue=queue,
        mesh=mesh,
        cache_dtype=cache_dtype(params),
        speculate=speculate,
    )


def speculation(
    lookup: str | None, draft: str | None, mesh: Mesh | None = None, dtype: str | None = None
) -> Speculation | None:
    """Where the options `--speculate lookup` and `--draft MODEL` have proposals for the next tokens from.

    Args:
        lookup: "lookup" or None.
        draft: a model, as in `find_model`, or None.
        mesh: the devices of the draft, as in `load`.
        dtype: of the draft, as in `load`.

    Raises:
        PunaError: both are given, or as `find_model` and `load`.
    """
    if lookup and draft:
        raise PunaError("--speculate lookup and --draft each say where proposals come from: give one of them")
    if draft:
        source = find_model(draft)
        config, params = load(source, mesh, dtype)
        return Draft(params, config, tokenizer=source.tokenizer)
    return PromptLookup() if lookup else None


def named_adapters(given: Sequence[str]) -> dict[str, Adapter]:
    """The adapters that options such as `--adapter poet=adapters/poet` name.

    Raises:
        PunaError: not NAME=PATH, a name twice, or no adapter there.
    """
    found: dict[str, Adapter] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path or name in found:
            raise PunaError(f"--adapter {text}: give NAME=PATH, each name once")
        found[name] = read_adapter(path)
    return found


def chat_template(name: str | None, tokenizer: Tokenizer) -> Template | None:
    """The template `name`, or the checkpoint's own; None where it has none.

    Raises:
        PunaError: no template of that name.
    """
    if name is None:
        return get_template("chat_template", tokenizer) if tokenizer.chat_template is not None else None
    return get_template(name, tokenizer)


def sampling(generation: dict[str, Any], **given: Any) -> Sampling:
    """How to sample: what is `given` and not None, else what generation_config.json says, else greedily.

    A generation_config.json without `do_sample` is greedy. A filter (top_k, top_p, min_p) given without a temperature
    asks for sampling: at the file's temperature, or 1.

    Args:
        generation: the object of generation_config.json.
        given: fields of `Sampling`.

    Raises:
        PunaError: a value is out of its range.
    """
    given = {name: value for name, value in given.items() if value is not None}
    names = {"repetition_penalty"}
    if generation.get("do_sample"):
        names |= {"temperature", "top_k", "top_p", "min_p"}
    said = {name: generation[name] for name in names if generation.get(name) is not None}
    if generation.get("do_sample") or given.keys() & {"top_k", "top_p", "min_p"}:
        said = {"temperature": generation.get("temperature") or 1.0} | said
    return replace(Sampling(), **(said | given))


def start_mesh(text: str | None) -> Mesh | None:
    """The mesh that an option asks for, on the first devices; None without the option.

    On a CPU as many virtual devices are made, and on GPUs the process gets the settings that are best for them, so
    this comes before any other use of JAX.

    Args:
        text: sizes of MESH_AXES, as `tensor=2` or `fsdp=2,tensor=2`; None where the option is not given.

    Raises:
        PunaError: an unknown axis, a size that is no number above 0, or more devices than there are.
    """
    set_defaults()
    if text is None:
        return None
    sizes = dict(_axis(part, text) for part in text.split(","))
    count = 1
    for size in sizes.values():
        count *= size
    _make_cpu_devices(count)
    devices = jax.devices()
    if count > len(devices):
        raise PunaError(f"--mesh {text} needs {count} devices and there are {len(devices)}: give smaller sizes")
    return make_mesh(**sizes, devices=devices[:count])


def _axis(part: str, text: str) -> tuple[str, int]:
    name, _, size = part.partition("=")
    if name not in MESH_AXES or not size.isdecimal() or int(size) < 1:
        raise PunaError(f"--mesh {text}: {part!r} is not an axis ({', '.join(MESH_AXES)}) with its size, as tensor=2")
    return name, int(size)


def _make_cpu_devices(count: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started, as in a test: what there is will do, or be refused by number
        pass
