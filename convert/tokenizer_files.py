"""Where the tokenizer of a model lies: beside it, in its Hub repository, or with an adapter that grew it."""

from collections.abc import Iterable
from pathlib import Path

from cli.files import at_home
from convert.formats import is_model_file
from convert.hub import download, is_hub_id
from model.tokenizer import Tokenizer, load_tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in the folder."""
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def find_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file, a local folder, or a Hub id, of which only the small files are downloaded; that of a
    model in one file lies beside it. Raises PunaError where there is none."""
    local = at_home(path)
    if not local.exists() and is_hub_id(str(path)):
        local = download(str(path))
    return load_tokenizer(local.parent if is_model_file(local) else local)


def tokenizer_folder(base: Path, adapters: Iterable[Path]) -> Path:
    """Where the tokenizer of a base with adapters lies: with the last of them that has at least as many tokens as
    those before it, for peft leaves the base's own beside an adapter that did not grow it."""
    place, size = base, None
    for folder in adapters:
        if not has_tokenizer(folder):
            continue
        if size is None:
            size = load_tokenizer(base).vocab_size if has_tokenizer(base) else 0
        if (own := load_tokenizer(folder).vocab_size) >= size:
            place, size = folder, own
    return place
