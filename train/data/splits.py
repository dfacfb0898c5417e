"""Which files of a folder are read: those of one split, train unless another is named, as the datasets library does it.

A folder is what `save_to_disk` wrote, or the clone of a Hub data set (whose README.md may say where each split lies),
or any folder, in which splits are told by names: `data/train-00000-of-00002.parquet`, else folders (`test/...`), else
files (`my-train.jsonl`). Where no name tells a split, all files are the training data. Files that the library left
while it worked, and hidden ones, are never data.
"""

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import PunaError

# The datasets library's words for each split, what may stand around them, and the names of its shards.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_AROUND = "[-._ 0-9]"
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}.*\..*")
_NO_DATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "README.md")


class Split(NamedTuple):
    """Some files of a folder.

    Attributes:
        files: those of the split, sorted.
        of_none: files of data that belong to no split.
    """

    files: list[Path]
    of_none: list[Path]


def files_of_split(folder: Path, name: str | None, suffixes: Collection[str]) -> Split:
    """The files of one split.

    Args:
        folder: what holds them.
        name: of the split, or several joined by "+"; None for train.
        suffixes: of files that are data, in lower case.

    Raises:
        PunaError: there is no such split, or no file of data at all.
    """
    splits, of_none = _splits(folder, suffixes)
    if not any(splits.values()):
        raise PunaError(f"{folder} holds no data files: looked for {', '.join(suffixes)}")
    wanted = (name or "train").split("+")
    for each in wanted:
        if each not in splits:
            has, first = ", ".join(splits), next(iter(splits))
            raise PunaError(f"{folder} has no split {each!r}, it has {has}: name one, as {folder}:{first}")
    return Split(sorted({file for each in wanted for file in splits[each]}), of_none)


def _splits(folder: Path, suffixes: Collection[str]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of every split, and data files of none."""
    if (folder / "dataset_dict.json").is_file():
        return {str(name): _saved(folder / str(name)) for name in _json(folder / "dataset_dict.json", "splits")}, []
    if _is_saved(folder):
        return {_json(folder / "state.json").get("_split") or "train": _saved(folder)}, []
    config = _config(folder)
    if isinstance(config.get("data_dir"), str):
        folder = folder / config["data_dir"]
    files = _data_files(folder, suffixes)
    splits = _declared(folder, config["data_files"], files) if config.get("data_files") else _named(folder, files)
    of_splits = {file for part in splits.values() for file in part}
    return splits, [file for file in files if file not in of_splits]


def _data_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """All files of a folder that hold records."""
    saved: dict[Path, list[Path]] = {}
    found = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.suffix.lower() not in suffixes or not file.is_file() or file.name in _NO_DATA:
            continue
        if any(part.startswith(".") for part in inside.parts) or any(part[:2] == "__" for part in inside.parts[:-1]):
            continue
        if _is_saved(file.parent):
            if file in saved.setdefault(file.parent, _saved(file.parent)):
                found.append(file)
        elif not file.match("cache-*.arrow"):  # of Dataset.map
            found.append(file)
    return found


def _named(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Splits as the names of files tell them."""
    shards: dict[str, list[Path]] = {}
    for file in files:
        if file.parent == folder / "data" and (shard := _SHARD.fullmatch(file.name)):
            shards.setdefault(shard[1], []).append(file)
    if shards:
        return {name: shards[name] for name in sorted(shards, key=lambda name: (name not in WORDS, name))}

    def in_folder(word: str) -> Callable[[Path], bool]:
        named = re.compile(rf"(?:.*{_AROUND})?{word}(?:{_AROUND}.*)?")
        return lambda file: any(map(named.fullmatch, file.relative_to(folder).parts[:-1]))

    def in_name(word: str) -> Callable[[Path], bool]:
        named = re.compile(rf"(?:.*{_AROUND})?{word}{_AROUND}.*")
        return lambda file: named.fullmatch(file.name) is not None

    for place in (in_folder, in_name):
        chosen = {name: [place(word) for word in words] for name, words in WORDS.items()}
        found = {name: [file for file in files if any(is_in(file) for is_in in of)] for name, of in chosen.items()}
        if any(found.values()):
            return {name: part for name, part in found.items() if part}
    return {"train": files}


def _declared(folder: Path, patterns: Any, files: list[Path]) -> dict[str, list[Path]]:
    """Splits as README.md declares them: patterns of paths, for each split or all for train."""
    if isinstance(patterns, list) and all(isinstance(each, dict) for each in patterns):
        listed = {str(each.get("split")): each.get("path") for each in patterns}
    else:
        listed = patterns if isinstance(patterns, dict) else {"train": patterns}
    splits = {}
    for name, of_split in listed.items():
        each_pattern = of_split if isinstance(of_split, list) else [of_split]
        try:
            matched = {place for one in each_pattern for place in folder.glob(re.sub(r"\*\*$", "**/*", one))}
        except (TypeError, ValueError, NotImplementedError) as error:
            raise PunaError(f"{folder}/README.md: data_files of split {name!r} cannot be found: {error}") from None
        splits[name] = [file for file in files if file in matched]
    return splits


def _config(folder: Path) -> dict[str, Any]:
    """The configuration of README.md that is read where none is named: the default one, or the only one.

    Raises:
        PunaError: there are several, or the file cannot be read.
    """
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        declared = (metadata_load(card) or {}).get("configs") or []
        configs = {str(each["config_name"]): each for each in declared}
    except Exception as error:  # what YAML's parser and foreign text raise
        raise PunaError(f"{card}: its configurations cannot be read: {error}") from None
    defaults = [name for name, each in configs.items() if each.get("default")]
    for name in (*defaults, *(configs if len(configs) == 1 else ()), "default"):
        if name in configs:
            return configs[name]
    if configs:
        raise PunaError(
            f"{folder} holds several data sets ({', '.join(configs)}): name the folder or the files of one, as "
            "README.md lists them"
        )
    return {}


def _is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _saved(folder: Path) -> list[Path]:
    """The files of records that `Dataset.save_to_disk` wrote."""
    files = [folder / str(each.get("filename")) for each in _json(folder / "state.json", "_data_files")]
    for file in files:
        if not file.is_file():
            raise PunaError(f"{folder}/state.json names {file.name}, which is not there: copy the folder anew")
    return files


def _json(file: Path, key: str | None = None) -> Any:
    """The object in a file of the datasets library, or the list under a key of it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PunaError(f"{file}: cannot be read: {error}") from None
    found = value.get(key) if key and isinstance(value, dict) else value
    if not isinstance(found, list if key else dict) or (key == "_data_files" and not all(map(_is_object, found))):
        raise PunaError(f"{file}: is not as the datasets library writes it")
    return found


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)
