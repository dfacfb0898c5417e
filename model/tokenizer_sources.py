"""Which of several files in a folder is the tokenizer, and which its chat template: transformers' choice. What the
others say otherwise is said once."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from model.errors import PunaError
from model.json_file import read_json
from model.vocabulary import is_ranks, parse_sentencepiece, readable

_LOG = logging.getLogger(__name__)


@cache
def _say(text: str) -> None:
    _LOG.warning("%s", text)


def main_file(files: Mapping[str, Path]) -> Path | None:
    """The file that says the trained vocabulary; None where there is none.

    Of a SentencePiece model and the tokenizer.json converted from it the model is taken: the weights were trained with
    it. Where their tokens differ, tokenizer.json is no conversion of it, and is taken as transformers does.

    Args:
        files: the folder's files by name.
    """
    model, converted = files.get("tokenizer.model"), files.get("tokenizer.json")
    if model is None or converted is None:
        return converted or model
    data = model.read_bytes()
    if is_ranks(data):
        return converted  # which merges alike, and also says what the special tokens of its release are named
    spec = read_json(converted)
    said = spec.get("model")
    if not isinstance(said, dict) or said.get("type") != "BPE" or not isinstance(said.get("vocab"), dict):
        return model
    pieces = {piece.piece: id for id, piece in enumerate(parse_sentencepiece(data, model).pieces)}
    ids: dict[str, Any] = said["vocab"] | {
        token.get("content"): token.get("id") for token in spec.get("added_tokens") or () if isinstance(token, dict)
    }
    changed = [text for text, id in said["vocab"].items() if pieces.get(text) != id]
    changed += [text for text in pieces if text not in ids]
    if not changed:
        return model
    _say(
        f"{converted} is read, as transformers does; tokenizer.model beside it is not: {len(changed)} of their tokens "
        f"differ, as {changed[0]!r}"
    )
    return converted


def chat_template(files: Mapping[str, Path], config: Mapping[str, Any], folder: Path) -> str | None:
    """The checkpoint's own jinja template; None where it has none.

    Args:
        files: the folder's files by name.
        config: the object of tokenizer_config.json.
        folder: where they lie.

    Raises:
        PunaError: it is no text.
    """
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise PunaError(f"{files['tokenizer_config.json']}: chat_template is no text, and no list of named ones")
    if (jinja := files.get("chat_template.jinja")) is not None:
        with readable(jinja):
            own = jinja.read_text(encoding="utf-8")
        if template not in (None, own):
            _say(f"{jinja} is read, as transformers does; tokenizer_config.json beside it has another chat_template")
        template = own
    unread = [name for name in ("chat_template.json", "additional_chat_templates") if (folder / name).exists()]
    if unread:
        _say(f"{folder}: {', '.join(unread)} not read: its chat template is {'another' if template else 'none'}")
    return template
