"""The settings in words, for the terminal and for docs/settings.md."""

import textwrap
from collections.abc import Sequence

from model.errors import PunaError
from train.schema import Setting, not_a_setting, settings
from train.sections import Config

WIDTH = 100


def describe(name: str | None) -> str:
    """What can be set, as text.

    Args:
        name: a section, a setting with or without its section; None for all.

    Raises:
        PunaError: there is none of that name; it says which may be meant.
    """
    every = list(settings(Config))
    chosen = every if name is None else _named(name, every)
    return "\n".join(map(_as_text, chosen))


def _named(name: str, every: Sequence[Setting]) -> list[Setting]:
    asked = name.strip("[]")
    inside = [each for each in every if each.name == asked or each.name.startswith((f"{asked}.", f"{asked}["))]
    found = inside or [each for each in every if each.name.rpartition(".")[2] == asked]
    if not found:
        raise PunaError(not_a_setting(name, [each.name for each in every]))
    return found


def _as_text(setting: Setting) -> str:
    if not setting.source:
        return f"\n[{setting.name}] {setting.meaning}"
    default = {None: "must be given", "": "no default"}.get(setting.default, f"default {setting.default}")
    said = f"{setting.meaning} Source: {setting.source}."
    lines = textwrap.wrap(said, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([f"{setting.name}: {setting.type}; {default}", *lines])


def as_markdown() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "What a TOML file of `python -m train run` may say. `python -m train settings [NAME]` prints the same, and",
        "`make settings` writes this page, from the docstrings of its sections (`train/sections.py`).",
    ]
    for setting in settings(Config):
        if not setting.source:
            lines += ["", f"## [{setting.name}]", "", setting.meaning, ""]
            lines += ["| setting | type | default | meaning | source |", "|---|---|---|---|---|"]
            continue
        default = {None: "must be given", "": ""}.get(setting.default, f"`{setting.default}`")
        row = (f"`{setting.name}`", setting.type, default, setting.meaning, setting.source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"
