"""The table of formats. A format is one file with `SIGNS`, `read` and `write`, and one row here.

Opening, detection and its messages, writing, merging and the commands' help all come from this table.
"""

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from cli.files import at_home
from convert import gguf, hf, meta, orbax
from convert.checkpoint import Checkpoint, WriteOptions
from convert.hub import download, is_hub_id
from convert.run import is_step, place_of, read_step
from model.errors import PunaError

DTYPES = ("float32", "bfloat16", "float16")


def _nbytes(checkpoint: Checkpoint, options: WriteOptions) -> int:
    return checkpoint.as_floats(options.dtype).nbytes


@dataclass(frozen=True)
class FileFormat:
    """One row.

    words: what the format is, for --help. signs: patterns of files, any of which shows the format; one that ends in /
    is a folder. config: the file that says the model's shape, where the weights do not. read: from a folder (or the
    file) to the model, unread. write: into a new folder that has the companion files (or to a new file).
    options: the names of the `WriteOptions` that `write` reads. quantizations: values of `quantize` among them.
    nbytes: what `write` will need on disk. is_file: a model is one file; a folder of it is looked for last.
    hub: patterns of the weights in a Hub repository, the favourite first. keeps_quantized: weights of any quantization
    are written as they are. in_order: `write` reads each tensor once, in the order of convert/names.py, as several
    processes need to gather them. unsaid: fields of the config that the format does not say, for which `read` takes
    the family's or the tokenizer's.
    """

    words: str
    signs: tuple[str, ...]
    config: str | None
    read: Callable[[Path], Checkpoint]
    write: Callable[[Path, Checkpoint, WriteOptions], None]
    options: frozenset[str] = frozenset()
    quantizations: tuple[str, ...] = ()
    nbytes: Callable[[Checkpoint, WriteOptions], int] = _nbytes
    is_file: bool = False
    hub: tuple[str, ...] = ()
    keeps_quantized: bool = False
    in_order: bool = False
    unsaid: frozenset[str] = frozenset()

    def found(self, folder: Path) -> list[Path]:
        """The paths in `folder` that show this format."""
        return [path for sign in self.signs for path in folder.glob(sign)]


_TOKEN_IDS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})

FORMATS: dict[str, FileFormat] = {
    "hf": FileFormat(
        words="a Hugging Face folder",
        signs=hf.SIGNS,
        config="config.json",
        read=hf.read,
        write=hf.write,
        options=frozenset({"dtype", "quantize", "block", "double_quant", "max_shard_size"}),
        quantizations=("int8", "int4", "nf4"),
        nbytes=hf.nbytes,
        hub=("*.safetensors", "pytorch_model*.bin"),
        keeps_quantized=True,
        in_order=True,
    ),
    "orbax": FileFormat(
        words="an Orbax tree a layer",
        signs=orbax.SIGNS,
        config="config.json",
        read=orbax.read,
        write=orbax.write,
        options=frozenset({"dtype"}),
    ),
    "meta": FileFormat(
        words="Meta's consolidated.*.pth",
        signs=meta.SIGNS,
        config="params.json",
        read=meta.read,
        write=meta.write,
        options=frozenset({"dtype", "shards"}),
        hub=meta.SIGNS,
        unsaid=_TOKEN_IDS,
    ),
    "gguf": FileFormat(
        words="a file for llama.cpp",
        signs=gguf.SIGNS,
        config=None,
        read=gguf.read,
        write=gguf.write,
        options=frozenset({"dtype", "quantize"}),
        quantizations=tuple(gguf.QUANTIZATIONS),
        nbytes=gguf.nbytes,
        is_file=True,
        unsaid=_TOKEN_IDS,
    ),
}


# ---------------------------------------------------------------------------------------------------------------- read


def open_model(path: str | Path) -> Checkpoint:
    """The model at a local folder of any format we read, in a file of one, of a training run or a step of one, or of a
    Hub id, its weights unread.

    Raises:
        PunaError: naming what is missing, left over, truncated or of the wrong shape.
    """
    place = locate(path)
    if is_step(place):
        return read_step(place)
    return FORMATS[detect(place)].read(place)


def locate(path: str | Path) -> Path:
    """The local folder or file that `path` names, downloaded where it is a Hub id; of a training run, its final/.
    Raises PunaError."""
    local = at_home(path)
    if local.is_dir():
        return place_of(local)
    if is_model_file(local):
        return local
    if local.exists():
        raise PunaError(f"{path} is a file: give the folder that holds the model")
    if not is_hub_id(str(path)):
        raise PunaError(f"{path}: no such folder, and no Hub id of the form org/name[@revision]")
    return download(str(path), [pattern for row in FORMATS.values() for pattern in row.hub])


def is_model_file(path: Path) -> bool:
    """Whether `path` is a file that holds a whole model, by its name."""
    return path.is_file() and bool(_of_name(path))


def _of_name(path: Path) -> list[str]:
    """The formats whose files are named like this one."""
    rows = ((name, row.signs) for name, row in FORMATS.items() if row.is_file)
    return [name for name, signs in rows if any(fnmatch.fnmatch(path.name, sign) for sign in signs)]


def detect(place: Path) -> str:
    """The name of the format at `place`. Raises PunaError for a folder that holds none, or more than one."""
    if place.is_file():
        return _of_name(place)[0]
    shown = {name: paths for name, row in FORMATS.items() if (paths := row.found(place))}
    found = {name: paths for name, paths in shown.items() if not FORMATS[name].is_file} or shown
    if len(found) > 1:
        examples = ", ".join(f"{paths[0].name} ({name})" for name, paths in found.items())
        raise PunaError(f"{place} holds models of several formats: {examples}; keep one, or give the folder of one")
    if found:
        return next(iter(found))
    if (place / "adapter_config.json").exists():
        raise PunaError(f"{place} is an adapter, not a model: merge it into its base, or give it as an adapter")
    for config in dict.fromkeys(row.config for row in FORMATS.values()):
        if config is not None and (place / config).exists():
            signs = _listed(sign for row in FORMATS.values() if row.config == config for sign in row.signs)
            raise PunaError(f"{place} has {config} and no {signs}: the weights are missing")
    raise PunaError(f"{place} holds no {_listed(sign for row in FORMATS.values() for sign in row.signs)}: no model")


# --------------------------------------------------------------------------------------------------------------- write


def format_named(name: str) -> FileFormat:
    """The row of that name. Raises PunaError for a name that the table lacks."""
    if name not in FORMATS:
        raise PunaError(f"format={name!r} is not known; choose {_listed(FORMATS)}")
    return FORMATS[name]


def check_options(name: str, options: WriteOptions) -> None:
    """Raises PunaError for an option, or a value of one, that the format `name` does not have."""
    row = format_named(name)
    for option in fields(options):
        value = getattr(options, option.name)
        of_all = ("allow_overflow", "tokenizer", "bar")
        if option.name in (*of_all, *row.options) or value == option.default or value is False:
            continue
        others = _listed(f"format={other!r}" for other, its in FORMATS.items() if option.name in its.options)
        raise PunaError(f"{option.name}={value!r} is no option of format={name!r}: leave it out, or choose {others}")
    if options.dtype not in (None, *DTYPES):
        raise PunaError(f"dtype={options.dtype!r} is not known; choose {', '.join(DTYPES)}")
    if options.quantize not in (None, *row.quantizations):
        raise PunaError(f"format={name!r} has no quantize={options.quantize!r}; choose {_listed(row.quantizations)}")


# ---------------------------------------------------------------------------------------------------------------- help


def formats_help() -> str:
    """The formats and what each is, for --to."""
    return "; ".join(f"{name}, {row.words}{' (DST is a file)' * row.is_file}" for name, row in FORMATS.items()) + "."


def option_help(option: str, words: str) -> str:
    """`words` after the formats that read `option`, as in "hf: bytes of one file"."""
    return f"{_listed((name for name, row in FORMATS.items() if option in row.options), 'and')}: {words}"


def quantize_help() -> str:
    """What each format can be quantized to, for --quantize."""
    rows = [f"{name}: {_listed(row.quantizations)}" for name, row in FORMATS.items() if row.quantizations]
    return f"{'; '.join(rows)}. The linear weights of the layers."


def _listed(names: Iterable[str], joint: str = "or") -> str:
    *most, last = list(dict.fromkeys(names)) or [""]
    return f"{', '.join(most)} {joint} {last}" if most else last
