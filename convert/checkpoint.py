"""A model on disk, whatever its format: its config, and every parameter as an unread tensor in our layout.

The format of a folder is detected from its content. A Hub id (`org/name[@revision]`) is downloaded first.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cli.files import write_json
from convert.lazy import LazyTensor
from model.config import LlamaConfig
from model.errors import PunaError
from model.quantize import QuantizedArray
from model.tokenizer import Tokenizer, load_tokenizer

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WANTED = ["*.json", "*.model", "*.jinja"]


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
    the model itself unless that is one `file`.

    Of the weights in `quantized`, which loads them as they are, `tensors` reads the dequantized numbers.
    """

    config: LlamaConfig
    tensors: dict[str, LazyTensor]
    folder: Path
    format: str
    quantized: Mapping[str, LazyQuantized] = field(default_factory=dict)
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, quantized ones as they are."""
        floats = sum(tensor.nbytes for name, tensor in self.tensors.items() if name not in self.quantized)
        return floats + sum(weight.like.nbytes for weight in self.quantized.values())


def open_model(path: str | Path) -> Checkpoint:
    """The model at a local folder of any format we read, in a GGUF file, or of a Hub id.

    Raises PunaError naming what is missing, left over, truncated or of the wrong shape.
    """
    folder = locate(path)
    match detect(folder):
        case "hf":
            from convert.hf import read_hf as read
        case "meta":
            from convert.meta import read_meta as read
        case "gguf":
            from convert.gguf import read_gguf as read
        case _:
            from convert.orbax import read_orbax as read
    with malformed(folder):
        return read(folder)


@contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Reading what lies at `path`: what breaks on the way is taken for a fault of the content."""
    try:
        yield
    except PunaError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, re.error) as error:
        raise PunaError(
            f"{path} is damaged, or says something no such model says ({type(error).__name__}: {error}): fetch it "
            "again; if it is whole, the fault is Puna's, and --debug shows where"
        ) from error


def locate(path: str | Path) -> Path:
    """The local folder (or GGUF file) that `path` names, downloaded where it is a Hub id. Raises PunaError."""
    folder = Path(path)
    if folder.is_dir() or (folder.is_file() and folder.suffix == ".gguf"):
        return folder
    if folder.exists():
        raise PunaError(f"{path} is a file: give the folder that holds the model")
    if not _HUB_ID.fullmatch(str(path)):
        raise PunaError(f"{path}: no such folder, and no Hub id of the form org/name[@revision]")
    return _download(str(path))


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in the folder."""
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def find_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file, a local folder, or a Hub id, of which only the small files are downloaded; that of a
    GGUF file lies beside it. Raises PunaError where there is none."""
    local = Path(path)
    if not local.exists() and _HUB_ID.fullmatch(str(path)):
        local = _download(str(path), weights=False)
    return load_tokenizer(local.parent if local.suffix == ".gguf" else local)


def _download(hub_id: str, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    wanted = [*_WANTED, *(_hub_weights(name, revision or None) if weights else ())]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the Hub's own, or whichever HTTP library's
        reason = " ".join(str(error).split())
        raise PunaError(f"{name} is no local folder, and the Hub did not give it: {reason}") from None


def _hub_weights(name: str, revision: str | None) -> list[str]:
    """The pattern of the weights to download: of several formats in a repository, one. All where the Hub does not
    answer, since the cache may still hold what it gave before."""
    from huggingface_hub import HfApi

    patterns = ["*.safetensors", "pytorch_model*.bin", "consolidated.*.pth"]
    try:
        files = [file.rfilename for file in HfApi().model_info(name, revision=revision, timeout=10).siblings or ()]
    except Exception:  # of whichever HTTP library; snapshot_download meets the same, and says it
        return patterns
    return [pattern for pattern in patterns if fnmatch.filter(files, pattern)][:1]


def detect(folder: Path) -> str:
    """hf, meta, orbax or gguf. Raises PunaError for a folder that holds none of them, or more than one."""
    signs = {
        "hf": [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin"), *folder.glob("*.index.json")],
        "meta": list(folder.glob("consolidated.*.pth")),
        "orbax": [path for path in [folder / "params"] if path.is_dir()],
    }
    found = {kind: paths for kind, paths in signs.items() if paths}
    if len(found) > 1:
        examples = ", ".join(f"{paths[0].name} ({kind})" for kind, paths in found.items())
        raise PunaError(f"{folder} holds models of several formats: {examples}; keep one, or give the folder of one")
    if found:
        return next(iter(found))
    if folder.is_file() or any(folder.glob("*.gguf")):
        return "gguf"
    if (folder / "params.json").exists() and not (folder / "config.json").exists():
        raise PunaError(f"{folder} has params.json and no consolidated.*.pth: Meta's weights are missing")
    if (folder / "adapter_config.json").exists():
        raise PunaError(f"{folder} is an adapter, not a model: merge it into its base, or give it as an adapter")
    raise PunaError(
        f"{folder} holds no model*.safetensors, pytorch_model*.bin, consolidated.*.pth, *.gguf or params/: no model"
    )


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
