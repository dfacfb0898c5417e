"""A run as one frozen record: TOML sections onto nested dataclasses, dotted overrides, and everything named when wrong.

An unknown key or a wrong type is an error that names the setting, and all of them are named at once. What a run that
resumes may change is here too.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.attention import ATTENTIONS
from model.errors import PunaError
from train.checks import check
from train.hints import meant
from train.schema import flat, read, settings
from train.sections import Config

LORA_LEARNING_RATE = 2e-4  # QLoRA's (arXiv:2305.14314), for models of up to 13 billion parameters
LARGEST = 16 * 2**20  # bytes of a file of settings

# What may lie elsewhere when a run resumes: that it is the same is told by fingerprints of its content.
PLACES = ("model.path", "model.tokenizer", "data.path", "data.eval_path", "distill.teacher", "run.from_checkpoint")

# What a run may change when it resumes: nothing that alters the numbers beyond rounding, and how long it goes on.
MAY_CHANGE = (
    "mesh",
    "data.cache_dir",
    "model.remat",
    "model.loss_chunk",
    "optim.offload",
    "run.gradient_accumulation_steps",
    "run.output_dir",
    "run.max_steps",
    "run.num_train_epochs",
    "run.logging_steps",
    "run.save_steps",
    "run.save_minutes",
    "run.keep_last",
    "run.keep_every",
    "run.keep_best",
    "run.eval_steps",
    "run.stats_steps",
    "run.max_skipped_steps",
    "run.step_timeout",
    "run.report_to",
    "run.deterministic",
    "run.profile_steps",
    "run.prepare",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and what is to replace settings of it.

    Args:
        path: the file.
        overrides: `section.key=value` each; the value is TOML, or plain text where it is not.

    Raises:
        PunaError: naming every unknown key (with the nearest known one) and every value of the wrong type, or the first
            value that no run could use.
    """
    if Path(path).is_file() and Path(path).stat().st_size > LARGEST:
        raise PunaError(f"{path} has {Path(path).stat().st_size:,} bytes: this is no file of settings")
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:  # RecursionError: nested too deeply
        raise PunaError(f"{path}: not TOML: {error}") from None
    for override in overrides:
        _override(table, override)
    return read_config(table)


def read_config(table: dict[str, Any]) -> Config:
    """The Config that a parsed TOML document means.

    Raises:
        PunaError: see `load_config`.
    """
    if "lora" in table and isinstance(optim := table.get("optim", {}), dict):
        table = table | {"optim": {"learning_rate": LORA_LEARNING_RATE} | optim}
    if "preference" in table and isinstance(data := table.get("data", {}), dict):
        table = table | {"data": {"format": "preference"} | data}
    config = read(Config, {"model": {}, "data": {}} | table)
    check(config)
    return config


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not sections or not name:
        found = meant(name, [setting.name for setting in settings(Config)]) if equals and name else None
        example = f"{found}={text}" if found and "." in found and " " not in found else "run.max_steps=100"
        raise PunaError(f"{override!r} is not an override; write section.key=value, as in {example}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise PunaError(f"{override!r}: {section} is a value, not a section")
    table[name] = value


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ: dotted name -> (old, new)."""
    before, after = dict(flat(old)), dict(flat(new))
    names = dict.fromkeys([*before, *after])
    return {n: (before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)}


def refuse_changes(old: Config, new: Config) -> None:
    """Check that a run of the config `old` may resume with `new`. Where PLACES lie does not matter here.

    Raises:
        PunaError: naming every setting that differs and may not.
    """
    moved = changes(_without_places(old), _without_places(new))
    refused = [
        f"{name} was {before!r} and is {after!r}"
        for name, (before, after) in changes(old, new).items()
        if not any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)
        and (name not in PLACES or name in moved)
        and not (name == "model.attention" and {before, after} <= {*ATTENTIONS})
    ]
    if refused:
        raise PunaError(
            f"{new.run.output_dir} holds a run with other settings: {'; '.join(refused)}. "
            "Take them back to resume it, or give another run.output_dir"
        )


def _without_places(config: Config) -> Config:
    """The config without where PLACES lie: whether there is a base, how many sources and how each is read."""
    data, listed = config.data, config.data.path
    paths = (
        ()
        if isinstance(listed, str)
        else tuple("" if isinstance(source, str) else replace(source, path="") for source in listed)
    )
    base = None if config.model.path is None else ""
    held_out = None if data.eval_path is None else ""
    distill = None if config.distill is None else replace(config.distill, teacher="")
    return replace(
        config,
        model=replace(config.model, path=base, tokenizer=None),
        data=replace(data, path=paths, eval_path=held_out),
        distill=distill,
        run=replace(config.run, from_checkpoint=None if config.run.from_checkpoint is None else ""),
    )
