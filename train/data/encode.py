"""From a record to token ids and labels: the one function behind training, `preview` and the goldens."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from model.chat import BOS, EOS, MESSAGE_KEYS, Message, Piece, Template, encode_counted, get_template
from model.errors import PunaError
from model.tokenizer import Tokenizer
from train.data.formats import KEYS, detect_format, rename, text_at
from train.data.messages import Conversation, answered, check_trained, conversation_of
from train.data.preference import as_pair

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
    made = encoder(record, tokenizer, template, format, columns, response_template)
    if made.pair is not None:
        raise PunaError("a preference is two texts: encode a prompt with each of its answers as the completion")
    ((ids, trained),) = made(record)
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
        template: the name of the conversation template, as in [data]; None for texts and templates with placeholders.
        pair: a preference to the records of its two answers; None for other formats.
    """

    format: str
    columns: Mapping[str, str]
    pieces: Callable[[Mapping[str, Any]], list[Piece]]
    encode: Callable[[Sequence[Piece], Tokenizer], tuple[list[int], list[bool]]]
    tokenizer: Tokenizer
    template: str | None = None
    pair: Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, Any]]] | None = None

    @property
    def splits(self) -> bool:
        """Whether a long record is split, not cut."""
        return self.format == "text"

    def __call__(self, record: Mapping[str, Any]) -> list[tuple[list[int], list[bool]]]:
        """Token ids of the whole record, and which of them are trained; of a preference twice, the chosen first."""
        renamed = rename(record, self.columns)
        parts = (renamed,) if self.pair is None else self.pair(renamed)
        return [self.encode(self.pieces(part), self.tokenizer) for part in parts]


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
    if form == "preference" and format == "auto":
        raise PunaError(
            "keys 'chosen' and 'rejected' are those of preferences: add a [preference] section to train on them, or "
            "name another data.format"
        )
    if form == "text":
        if template != "auto":
            get_template(template, tokenizer)
        bos_trained = template != "qlora"  # QLoRA's source is "<s>" alone, and a source is not trained on

        def text_pieces(record: Mapping[str, Any]) -> list[Piece]:
            check_trained(record)
            return _text_pieces(text_at(record, "text"), bos_trained)

        return Encoder(form, columns, text_pieces, encode_counted, tokenizer)
    pair = None
    if form == "preference":
        form, pair = "prompt_completion", partial(as_pair, as_text=template in ("plain", "qlora"))
        first = pair(rename(first, columns))[0]
    auto = "chat_template" if isinstance(first.get("prompt"), list) else AUTO_TEMPLATE[form]
    name = auto if template == "auto" else template
    chosen = get_template(name, tokenizer)
    return Encoder(
        form, columns, lambda record: _chat_pieces(record, form, chosen), chosen.encode, tokenizer, name, pair
    )


def _text_pieces(text: str, bos_trained: bool) -> list[Piece]:
    # BOS counts as trained, as in transformers' causal language modelling: documents joined end to end predict it.
    return [Piece(BOS, bos_trained, special=True), Piece(text, True), Piece(EOS, True, special=True)]


def _chat_pieces(record: Mapping[str, Any], form: str, template: Template) -> list[Piece]:
    conversation = conversation_of(record, form)
    if form == "conversations" and conversation.messages[0]["role"] == "assistant":
        # FastChat's rule: ShareGPT conversations may begin with a stray answer
        conversation = conversation._replace(messages=conversation.messages[1:], trained=conversation.trained[1:])
    for key in MESSAGE_KEYS:
        if any(key in message for message in conversation.messages) and key not in template.reads:
            raise PunaError(
                f"a message has {key!r}, which template {template.name!r} does not write: use a template that does, "
                "or take it out of the data"
            )
    if conversation.tools is not None:
        if template.with_tools is None:
            raise PunaError(
                f"key 'tools': template {template.name!r} has no place for tools: use a template that has, or take "
                "them out of the data"
            )
        template = template.with_tools(conversation.tools)
    pieces = _weighed(template.render(_read(conversation.messages, template), False), conversation, template)
    if template.name == "chat_template":
        _check_whole(pieces, conversation)
    return pieces


def _read(messages: Sequence[Message], template: Template) -> list[Message]:
    """The messages with those keys that the template reads."""
    known = template.reads | {"role", "content", "input"}
    kept: list[Message] = [{key: value for key, value in each.items() if key in known} for each in messages]
    for message in kept:
        try:
            json.dumps(message)
        except (TypeError, ValueError) as error:  # tables hold more than JSON can
            raise PunaError(f"a message of role {message['role']!r}: {error}") from None
    return kept


def _weighed(pieces: list[Piece], conversation: Conversation, template: Template) -> list[Piece]:
    """The pieces, those of answers that are not to be trained on masked."""
    is_answer = [message["role"] == "assistant" for message in conversation.messages]
    answers = [trained for trained, answer in zip(conversation.trained, is_answer, strict=True) if answer]
    if all(answers):
        return pieces
    runs = [(trained, list(run)) for trained, run in groupby(pieces, key=lambda piece: piece.trained)]
    if sum(trained for trained, _ in runs) != len(answers):
        raise PunaError(
            f"some answers are not to be trained on (key 'weight', or those in a prompt), and template "
            f"{template.name!r} does not keep its answers apart: use another template"
        )
    left = iter(answers)
    return [
        piece._replace(trained=piece.trained and keep)
        for trained, run in runs
        for keep in [next(left) if trained else False]
        for piece in run
    ]


def _check_whole(pieces: Sequence[Piece], conversation: Conversation) -> None:
    """Refuses a conversation of whose trained answers the template leaves out a part (they are written in order), or
    all of a system's or user's message."""
    everything = "".join(piece.text for piece in pieces)
    for message in conversation.messages:  # templates may wrap, move or shorten what asks, but not lose it
        lines = [line.strip() for line in (message.get("content") or "").splitlines() if line.strip()]
        if message["role"] in ("system", "user") and lines and not any(line in everything for line in lines):
            raise PunaError(
                f"the chat template leaves out the {message['role']} message that begins {lines[0][:40]!r}: use a "
                "template that writes it, or take it out of the data"
            )
    written, place = "".join(piece.text for piece in pieces if piece.trained), 0
    for message, trained in zip(conversation.messages, conversation.trained, strict=True):
        if message["role"] != "assistant" or not trained:
            continue
        end = place
        for text in answered(message):
            if (found := written.find(text, place)) < 0:
                raise PunaError(
                    f"the chat template leaves out a part of the answer that begins {text[:40]!r}: use a template that "
                    "writes all of it, or take that part out of the data"
                )
            end = max(end, found + len(text))
        place = end


def _column_pieces(template: str, response_template: str) -> Callable[[Mapping[str, Any]], list[Piece]]:
    """Fill `template`'s placeholders. A paragraph that is one column, empty or null, goes, with the blank line before
    it (DialogSum's rule)."""
    if response_template and template.count(response_template) != 1:
        raise PunaError(f"data.response_template {response_template!r} must stand once in data.template")
    cut = template.index(response_template) + len(response_template) if response_template else 0

    def filled(part: str, record: Mapping[str, Any]) -> str:
        kept = _PARAGRAPH.sub(lambda found: found[0] if record.get(found[1], "?") not in (None, "") else "", part)
        return _PLACEHOLDER.sub(lambda found: text_at(record, found[1]), kept)

    def pieces(record: Mapping[str, Any]) -> list[Piece]:
        texts = [Piece(filled(template[:cut], record)), Piece(filled(template[cut:], record), True)]
        return [Piece(BOS, not cut, special=True), *texts[not cut :], Piece(EOS, True, special=True)]

    return pieces
