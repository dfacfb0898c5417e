"""Which of several files in a folder is the tokenizer, and which its chat template: transformers' choice. What the
others say otherwise is said once."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from model.errors import PunaError
from model.json_file import read_json
from model.vocabulary import AddedToken, Prefix, is_ranks, parse_sentencepiece, readable

LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
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


def older_tokens(path: Path, said: Mapping[str, Any], config: Mapping[str, Any]) -> list[AddedToken]:
    """The tokens of added_tokens.json, which transformers reads only where tokenizer_config.json has no table of them.

    Args:
        path: the file.
        said: its object.
        config: the object of tokenizer_config.json.

    Raises:
        PunaError: an entry is no token and its id.
    """
    tokens = [AddedToken(content, id) for content, id in said.items()]
    table = config.get("added_tokens_decoder")
    if not isinstance(table, dict):
        return tokens
    ids = {token.get("content"): id for id, token in table.items() if isinstance(token, dict)}
    unread = [token.content for token in tokens if ids.get(token.content) != str(token.id)]
    if unread:
        _say(
            f"{path} is not read, as transformers does; the table in tokenizer_config.json is, and has no "
            f"{', '.join(map(repr, unread[:3]))} of that id"
        )
    return []


def prefix_of(main: Path, config: Mapping[str, Any]) -> Prefix | None:
    """Which texts get a space in front, where tokenizer_config.json says it; None where the tokenizer's own file does.

    It says so of transformers' LlamaTokenizer, by `add_prefix_space` and `legacy`. Without `legacy` a SentencePiece
    model is read as when such folders were written, with the space before each text; a tokenizer.json as transformers 5
    reads it, with the space before the first alone.

    Args:
        main: the tokenizer's file.
        config: the object of tokenizer_config.json.

    Raises:
        PunaError: a value is not true, false or null.
    """
    for key in ("legacy", "add_prefix_space"):
        if not isinstance(config.get(key), bool | None):
            raise PunaError(f"{key} is {config[key]!r:.80}: expected true or false")
    is_model = main.suffix != ".json"
    if not config or config.get("tokenizer_class") not in (LLAMA_CLASSES if not is_model else (None, *LLAMA_CLASSES)):
        return None
    space, legacy = config.get("add_prefix_space"), config.get("legacy")
    if space is False:
        return Prefix("never")
    return Prefix("always" if legacy or (legacy is None and is_model) else "first", forced=space is True)


def begins_with_bos(spec: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> bool:
    """Whether the post-processor of a tokenizer.json puts a token before a text, which transformers goes by alone.

    Args:
        spec: the object of the file.
        config: the object of tokenizer_config.json.
        path: the file.
    """
    processor = spec.get("post_processor") or {}
    steps = processor.get("processors") or [processor]
    templates = [step["single"] for step in steps if step.get("type") == "TemplateProcessing"]
    begins = any("SpecialToken" in template[0] for template in templates)
    if config.get("add_bos_token") not in (None, begins):
        does = "puts a token before texts" if begins else "puts no token before texts"
        _say(f"{path} {does}, as transformers does; add_bos_token in tokenizer_config.json says otherwise")
    return begins


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
