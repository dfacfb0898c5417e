"""From a record to token ids and labels: the one function behind training, `preview` and the goldens."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.chat import BOS, EOS, Piece, Template, encode_counted, get_template
from model.errors import PunaError
from model.tokenizer import Tokenizer
from train.data.formats import KEYS, detect_format, messages_of, rename, text_at

IGNORE_INDEX = -100  # the label of a token on which no loss is taken, as in transformers

AUTO_TEMPLATE = {
    "instruction": "alpaca",
    "conversations": "vicuna_v1.1",
    "messages": "chat_template",
    "prompt_completion": "plain",
}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_PARAGRAPH = re.compile(r"\n\n\{(\w+)\}(?=\n\n|$)")


def encode(
    record: Mapping[str, Any],
    tokenizer: Tokenizer,
    template: str = "alpaca",
    max_length: int | None = 512,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    response_template: str = "",
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one record.

    Text records have no template: they are BOS, the text, EOS, all trained on. What is masked in the others is their
    template's: see model.chat.

    Args:
        record: as it was read.
        tokenizer: whose tokens to make.
        template: this and those below are as in [data] (train.data.config.DataConfig).
        max_length: ids and labels are cut to it on the right; None cuts nothing.

    Returns:
        The ids, and as many labels: the same ids, with -100 where no loss is taken. Labels are not shifted: `labels[t]`
        is `ids[t]` itself.

    Raises:
        PunaError: the record is not of its format, or the tokenizer lacks a token that the template writes.
    """
    ids, trained = encoder(record, tokenizer, template, format, columns, response_template)(record)
    labels = [id if loss else IGNORE_INDEX for id, loss in zip(ids, trained, strict=True)]
    return ids[:max_length], labels[:max_length]


@dataclass(frozen=True)
class Encoder:
    """Records of one format to token ids, under one template.

    Attributes:
        format: a key of `formats.KEYS`, or "columns" where the template has placeholders.
        columns: our key -> the record's.
        pieces: a record to the texts and special tokens that it is written as.
        encode: these to ids, and which of them are trained.
        tokenizer: whose ids.
    """

    format: str
    columns: Mapping[str, str]
    pieces: Callable[[Mapping[str, Any]], list[Piece]]
    encode: Callable[[Sequence[Piece], Tokenizer], tuple[list[int], list[bool]]]
    tokenizer: Tokenizer

    @property
    def splits(self) -> bool:
        """Whether a long record is split, not cut."""
        return self.format == "text"

    def __call__(self, record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        """Token ids of the whole record, and which of them are trained."""
        return self.encode(self.pieces(rename(record, self.columns)), self.tokenizer)


def encoder(
    first: Mapping[str, Any],
    tokenizer: Tokenizer,
    template: str = "auto",
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    response_template: str = "",
) -> Encoder:
    """The encoder of records like the first one.

    Args:
        first: a record, whose keys tell the format where `format` does not.
        tokenizer: whose tokens to make.
        template: this and those below are as in [data] (train.data.config.DataConfig).

    Raises:
        PunaError: the format cannot be told, or the template is unknown or does not fit the format.
    """
    columns = columns or {}
    if _PLACEHOLDER.search(template):
        pieces = _column_pieces(template, response_template)
        return Encoder("columns", columns, pieces, encode_counted, tokenizer)
    if response_template:
        raise PunaError("data.response_template goes with a data.template that has {column} placeholders")
    if format not in (*KEYS, "auto"):
        raise PunaError(f"data.format {format!r} is unknown: use one of {', '.join(KEYS)} or auto")
    form = detect_format(rename(first, columns)) if format == "auto" else format
    if form == "text":
        bos_trained = template != "qlora"  # QLoRA's source is "<s>" alone, and a source is not trained on

        def text_pieces(record: Mapping[str, Any]) -> list[Piece]:
            return _text_pieces(text_at(record, "text"), bos_trained)

        return Encoder(form, columns, text_pieces, encode_counted, tokenizer)
    chosen = get_template(AUTO_TEMPLATE[form] if template == "auto" else template, tokenizer)
    return Encoder(form, columns, lambda record: _chat_pieces(record, form, chosen), chosen.encode, tokenizer)


def _text_pieces(text: str, bos_trained: bool) -> list[Piece]:
    # BOS counts as trained, as in transformers' causal language modelling: documents joined end to end predict it.
    return [Piece(BOS, bos_trained, special=True), Piece(text, True), Piece(EOS, True, special=True)]


def _chat_pieces(record: Mapping[str, Any], form: str, template: Template) -> list[Piece]:
    messages = messages_of(record, form)
    if form == "conversations" and messages[0]["role"] == "assistant":
        messages = messages[1:]  # FastChat's rule: ShareGPT conversations may begin with a stray answer
    return template.render(messages, False)


def _column_pieces(template: str, response_template: str) -> Callable[[Mapping[str, Any]], list[Piece]]:
    """Fill `template`'s placeholders. A paragraph that is one empty column goes, with the blank line before it
    (DialogSum's rule)."""
    if response_template and template.count(response_template) != 1:
        raise PunaError(f"data.response_template {response_template!r} must stand once in data.template")
    cut = template.index(response_template) + len(response_template) if response_template else 0

    def filled(part: str, record: Mapping[str, Any]) -> str:
        kept = _PARAGRAPH.sub(lambda found: found[0] if text_at(record, found[1]) else "", part)
        return _PLACEHOLDER.sub(lambda found: text_at(record, found[1]), kept)

    def pieces(record: Mapping[str, Any]) -> list[Piece]:
        texts = [Piece(filled(template[:cut], record)), Piece(filled(template[cut:], record), True)]
        return [Piece(BOS, not cut, special=True), *texts[not cut :], Piece(EOS, True, special=True)]

    return pieces
