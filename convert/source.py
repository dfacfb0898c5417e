"""What MODEL names: a folder of any format, a Hub id, a training run or a step of one, or an adapter with its base."""

from functools import reduce
from pathlib import Path
from typing import NamedTuple

from cli.files import at_home
from convert.adapter_fit import adapted_config
from convert.checkpoint import Checkpoint
from convert.formats import locate, open_model
from convert.hub import is_hub_id
from convert.peft import Adapter, read_adapter
from convert.run import companions, is_adapter_step
from model.config import LlamaConfig
from model.errors import PunaError


class Source(NamedTuple):
    """A model, its weights unread.

    Attributes:
        checkpoint: the files, open.
        adapters: those over it, in order, all active.
        base: what names the checkpoint, where adapters do.
    """

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...] = ()
    base: str | None = None

    @property
    def config(self) -> LlamaConfig:
        """The model's config, as its adapters leave it."""
        return reduce(lambda config, adapter: adapted_config(adapter, config), self.adapters, self.checkpoint.config)


def find_source(path: str | Path) -> Source:
    """The model that `path` names, with the adapters that it brings.

    Raises:
        PunaError: there is none, or an adapter does not say on what base it stands, or that is not found.
    """
    return _find(path, ())


def is_adapter(place: Path) -> bool:
    """Whether the folder holds an adapter and no model."""
    if is_adapter_step(place):
        return True
    return (place / "adapter_config.json").is_file() and not (place / "config.json").is_file()


def local_base(path: str | Path) -> str:
    """What peft would load as the base that `path` names: a run's folder of weights, a Hub id as it is."""
    return str(locate(path)) if at_home(path).is_dir() else str(path)


def tokenizer_place(path: str | Path) -> str | Path:
    """Where the tokenizer of the model that `path` names lies: a file, a folder or a Hub id."""
    if not at_home(path).is_dir():
        return path
    place = locate(path)
    folder = companions(place)
    if is_adapter(place) and not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return tokenizer_place(_base_of(read_adapter(place), path, (place,)))
    return folder


def _find(path: str | Path, above: tuple[Path, ...]) -> Source:
    place = locate(path)
    if not is_adapter(place):
        return Source(open_model(path))
    adapter = read_adapter(path if is_hub_id(str(path)) and not at_home(path).exists() else place)
    base = _base_of(adapter, path, (*above, place))
    try:
        below = _find(base, (*above, place))
    except PunaError as error:
        raise PunaError(f"{adapter.where}: base_model_name_or_path: {error}") from None
    return Source(below.checkpoint, (*below.adapters, adapter), below.base or base)


def _base_of(adapter: Adapter, path: str | Path, above: tuple[Path, ...]) -> str:
    """The name of an adapter's base."""
    base = adapter.settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise PunaError(f"{adapter.where}: base_model_name_or_path is missing: name the base there")
    if at_home(base).is_dir() and locate(base).resolve() in [place.resolve() for place in above]:
        raise PunaError(f"{adapter.where}: base_model_name_or_path {base!r} is the adapter itself: name its base there")
    if not at_home(base).exists() and not is_hub_id(base):
        raise PunaError(
            f"{adapter.where}: base_model_name_or_path {base!r} is not here: correct it there, or give the base as the "
            f"model and {path} as an adapter"
        )
    return base
