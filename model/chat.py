"""Conversation templates: messages become *pieces*, and each piece is encoded apart.

A piece is either text or the name of one special token, and says whether a model is trained to produce it. Special
tokens enter by id, and text never becomes one, so what a user writes cannot forge a turn. One `Template` value
serves training (the mask) and inference (the generation prompt and what stops a reply), so that the two cannot differ.
"""

import bisect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from model.chat_jinja import jinja_render, referenced_names
from model.chat_sources import ALPACA, ALPACA_INPUT, ONE_SHOT, VICUNA, named_in
from model.errors import PunaError
from model.tokenizer import Tokenizer
from model.vocabulary import BLANK

# Role and content; a user message may carry an `input` beside its content. A checkpoint's own template may read more.
Message = Mapping[str, Any]

MESSAGE_KEYS = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking")

BOS, EOS = "bos_token", "eos_token"  # special pieces that stand for the tokenizer's own


class Piece(NamedTuple):
    """Text, or one token by name (`BOS`, `EOS`, or its text); `trained` where a loss is taken on it; `literal` are
    added tokens that are not special and yet not looked for in the text."""

    text: str
    trained: bool = False
    special: bool = False
    literal: frozenset[str] = frozenset()


# --- from pieces to token ids


def encode_counted(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of `pieces`, neighbouring texts tokenized as one (Stanford Alpaca's and FastChat's rule).

    A masked text that begins such a run masks as many tokens as it has by itself, even where its last token merges with
    the next text's first.

    Returns:
        The ids, and for each whether it is trained.

    Raises:
        PunaError: a piece names a special token that the tokenizer lacks.
    """
    return _encode_runs(_neighbours(pieces), tokenizer, _count)


def encode_aligned(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """As `encode_counted`, but a token is trained where its last byte is: transformers' rule for `{% generation %}`."""
    return _encode_runs(_neighbours(pieces), tokenizer, _align)


def encode_separately(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """As `encode_counted`, but every piece is tokenized by itself (QLoRA's and Chinese-LLaMA-Alpaca's rule)."""
    return _encode_runs(([piece] for piece in pieces), tokenizer, _count)


def _neighbours(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Special tokens one by one, neighbouring texts together."""
    for special, group in groupby(pieces, key=lambda piece: piece.special):
        run = list(group)
        yield from ([piece] for piece in run) if special else (run,)


def _encode_runs(
    runs: Iterable[list[Piece]], tokenizer: Tokenizer, boundary: Callable[..., int]
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    trained: list[bool] = []
    runs = _stripped(list(runs), tokenizer)
    # What the template writes as a token, text of this conversation cannot spell, special or not.
    written = {run[0].text for run in runs if run[0].special}
    for run in runs:
        text = "".join(piece.text for piece in run)
        encode = partial(tokenizer.encode, follows=bool(ids), literal=written.union(*(piece.literal for piece in run)))
        new = special_ids(text, tokenizer) if run[0].special else encode(text)
        start, prefix = len(ids), ""
        for piece, following in zip(run, run[1:], strict=False):
            prefix += piece.text
            if piece.trained != following.trained:
                end = start + min(boundary(new, text, prefix, tokenizer, encode), len(new))
                trained.extend([piece.trained] * (end - len(trained)))
        ids.extend(new)
        trained.extend([run[-1].trained] * (len(ids) - len(trained)))
    return ids, trained


def _stripped(runs: list[list[Piece]], tokenizer: Tokenizer) -> list[list[Piece]]:
    """`runs` without the blanks that special tokens beside them take (lstrip and rstrip, as Phi-3's roles have)."""
    for before, run in pairwise(runs):
        if before[0].special and not run[0].special and tokenizer.strips(before[0].text)[1]:
            _strip(run, range(len(run)), _FIRST_BLANKS)
    for run, after in pairwise(runs):
        if after[0].special and not run[0].special and tokenizer.strips(after[0].text)[0]:
            _strip(run, reversed(range(len(run))), _LAST_BLANKS)
    return runs


_FIRST_BLANKS, _LAST_BLANKS = re.compile(rf"\A{BLANK}+"), re.compile(rf"{BLANK}+\Z")


def _strip(run: list[Piece], order: Iterable[int], blanks: re.Pattern[str]) -> None:
    for number in order:
        run[number] = run[number]._replace(text=blanks.sub("", run[number].text))
        if run[number].text:
            return


def _count(ids: list[int], text: str, prefix: str, tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> int:
    """How many tokens `prefix` has by itself."""
    return len(encode(prefix))


def _align(ids: list[int], text: str, prefix: str, tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> int:
    """How many of `ids`, the tokens of `text`, end within `prefix`; counted where they do not spell the text."""
    ends = list(accumulate(len(tokenizer.token_bytes(id)) for id in ids))
    added = (ends[-1] if ends else 0) - len(text.encode())
    if added not in (0, 1):  # 1 is SentencePiece's dummy space
        return _count(ids, text, prefix, tokenizer, encode)
    return bisect.bisect_right(ends, len(prefix.encode()) + added)


def special_ids(name: str, tokenizer: Tokenizer) -> list[int]:
    """The id of the special token `name` (`BOS`, `EOS`, or its text), as a list: empty where a tokenizer has no BOS.

    Raises:
        PunaError: the tokenizer lacks the token, and it is not BOS.
    """
    if name == BOS:
        return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found = tokenizer.eos_id if name == EOS else tokenizer.added_id(name)
    if found is None:
        wanted = "an EOS token" if name == EOS else f"the special token {name!r}"
        raise PunaError(f"the template writes {wanted}, which the tokenizer lacks: choose another template")
    return [found]


@dataclass(frozen=True)
class Template:
    """How a conversation is written.

    Attributes:
        render: gives the pieces of (messages, add_generation_prompt).
        encode: gives the token ids of pieces and which are trained, as `encode_counted`.
        stop: texts that end a reply.
        stop_tokens: special tokens that end it, named as in `Piece`.
        reads: names that it mentions: keys of a message beyond role, content and input may be among them.
        with_tools: the same template beside functions that the model may call (JSON schemas, as OpenAI's `tools`); None
            where it has no place for them.
    """

    name: str
    render: Callable[[Sequence[Message], bool], list[Piece]]
    encode: Callable[[Sequence[Piece], Tokenizer], tuple[list[int], list[bool]]]
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = (EOS,)
    reads: frozenset[str] = frozenset()
    with_tools: "Callable[[Sequence[Mapping[str, Any]]], Template] | None" = None


def encode_prompt(messages: Sequence[Message], template: Template, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation ready for the assistant's next reply.

    Raises:
        PunaError: the template does not take these messages, or writes a special token that the tokenizer lacks.
    """
    return template.encode(template.render(messages, True), tokenizer)[0]


def stop_ids(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a reply under `template`: those of its stop tokens that the tokenizer has, and of EOS."""
    own = [tokenizer.added_id(name) for name in template.stop_tokens if name != EOS]
    return tuple(dict.fromkeys(found for found in (*own, tokenizer.eos_id) if found is not None))


# --- named templates


def _exchanges(messages: Sequence[Message], name: str) -> tuple[str | None, list[tuple[Message, str | None]]]:
    """A system message, if any, and (user message, answer) pairs; the last answer is None where none is given yet."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    turns = messages[system is not None :]
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise PunaError(
                f"template {name!r} needs user and assistant in turn, beginning with user: "
                f"turn {number + 1} is {message['role']!r}, not {expected!r}"
            )
    if not turns:
        raise PunaError(f"template {name!r} needs at least one user message")
    answers = [message["content"] for message in turns[1::2]] + [None]
    return system, list(zip(turns[::2], answers, strict=False))


def _asked(message: Message) -> str:
    """A user message with its input, if any, on the line below."""
    return f"{message['content']}\n{message['input']}" if message.get("input") else message["content"]


def _no_system(system: str | None, name: str) -> None:
    if system is not None:
        raise PunaError(f"template {name!r} has no place for a system message: remove it or choose another template")


def _answered(answer: str | None) -> list[Piece]:
    return [] if answer is None else [Piece(answer, True), Piece(EOS, True, special=True)]


def _alpaca(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    system, exchanges = _exchanges(messages, "alpaca")
    pieces = [Piece(BOS, special=True)]
    for number, (user, answer) in enumerate(exchanges):
        given = user.get("input")
        header = "" if number else (system or ALPACA.format(ALPACA_INPUT if given else "")) + "\n\n"
        middle = f"\n\n### Input:\n{given}" if given else ""
        pieces.append(Piece(f"{header}### Instruction:\n{user['content']}{middle}\n\n### Response:"))
        pieces.extend(_answered(answer))
    return pieces


def _chinese_alpaca(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    system, exchanges = _exchanges(messages, "chinese-alpaca")
    pieces = [Piece(BOS, special=True)]
    for number, (user, answer) in enumerate(exchanges):
        header = "" if number else (system or ALPACA.format("")) + "\n\n"
        pieces.append(Piece(f"{header}### Instruction:\n{_asked(user)}\n\n### Response: "))
        pieces.extend(_answered(answer))
    return pieces


def _chinese_alpaca_inference(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    system, exchanges = _exchanges(messages, "chinese-alpaca-inference")
    _no_system(system, "chinese-alpaca-inference")
    pieces = [Piece(BOS, special=True)]
    for user, answer in exchanges:
        pieces.append(Piece(f"### Instruction:\n\n{_asked(user)}\n\n### Response:\n\n"))
        pieces.extend(_answered(answer))
    return pieces


def _wizardlm(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    """Llama-X: BOS is `</s>` too (its tokenizer set all special tokens to it), inputs are ignored, and a newline
    follows the prompt at inference only."""
    system, exchanges = _exchanges(messages, "wizardlm")
    _no_system(system, "wizardlm")
    pieces = [Piece(EOS, special=True)]
    for user, answer in exchanges:
        newline = "\n" if add_generation_prompt and answer is None else ""
        pieces.append(Piece(f"{user['content']}\n\n### Response:{newline}"))
        pieces.extend(_answered(answer))
    return pieces


def _prompt_completion(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    system, exchanges = _exchanges(messages, "plain")
    _no_system(system, "plain")
    if len(exchanges) > 1:
        raise PunaError(f"templates 'plain' and 'qlora' hold one exchange, not {len(exchanges)}: name a chat template")
    (user, answer), *_ = exchanges
    return [Piece(BOS, special=True), Piece(_asked(user)), *_answered(answer)]


def _vicuna(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    """FastChat v0.2 and later, `vicuna_v1.1`."""
    system, exchanges = _exchanges(messages, "vicuna_v1.1")
    pieces = [Piece(BOS, special=True), Piece((system or VICUNA.format("user")) + " ")]
    for user, answer in exchanges:
        last = answer is None and not add_generation_prompt
        pieces.append(Piece(f"USER: {_asked(user)} " + ("" if last else "ASSISTANT:")))
        pieces.extend(_answered(None if answer is None else f" {answer}"))
    return pieces


def _vicuna_v0(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    """FastChat v0.1.10, whose training text differs from its prompt. Its loss covers the header, not human turns."""
    system, exchanges = _exchanges(messages, "vicuna_v0")
    header = system or VICUNA.format("human")
    pieces = [Piece(BOS, special=True)]
    if add_generation_prompt:
        pieces.append(Piece(f"{header}###{ONE_SHOT}"))
        for user, answer in exchanges:
            pieces.append(Piece(f"Human: {_asked(user)}###Assistant:"))
            pieces.extend([] if answer is None else [Piece(f" {answer}###", True)])
        return pieces
    pieces.append(Piece(f"{header}\n\n", True))
    for user, answer in exchanges:
        pieces.append(Piece(f"### Human: {_asked(user)}\n"))
        pieces.extend([] if answer is None else [Piece(f"### Assistant: {answer}\n", True)])
    return pieces


def _llama2(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    system, exchanges = _exchanges(messages, "llama2")
    pieces = []
    for number, (user, answer) in enumerate(exchanges):
        header = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None and not number else ""
        pieces.extend([Piece(BOS, special=True), Piece(f"[INST] {(header + _asked(user)).strip()} [/INST]")])
        pieces.extend(_answered(None if answer is None else f" {answer.strip()} "))
    return pieces


def _llama3(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    pieces = [Piece("<|begin_of_text|>", special=True)]
    for message in messages:
        trained = message["role"] == "assistant"
        pieces.extend(_llama3_header(message["role"]))
        pieces.append(Piece(_asked(message).strip(), trained))
        pieces.append(Piece("<|eot_id|>", trained, special=True))
    return pieces + (_llama3_header("assistant") if add_generation_prompt else [])


def _llama3_header(role: str) -> list[Piece]:
    start, end = Piece("<|start_header_id|>", special=True), Piece("<|end_header_id|>", special=True)
    return [start, Piece(role), end, Piece("\n\n")]


def _chatml(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    pieces = []
    for message in messages:
        trained = message["role"] == "assistant"
        pieces.extend([Piece("<|im_start|>", special=True), Piece(f"{message['role']}\n")])
        pieces.extend([Piece(_asked(message), trained), Piece("<|im_end|>", trained, special=True), Piece("\n")])
    if add_generation_prompt:
        pieces.extend([Piece("<|im_start|>", special=True), Piece("assistant\n")])
    return pieces


_ALPACA_STOP = ("### Instruction:",)

TEMPLATES = {
    template.name: template
    for template in (
        Template("alpaca", _alpaca, encode_counted, _ALPACA_STOP),
        Template("vicuna_v1.1", _vicuna, encode_counted),
        Template("vicuna_v0", _vicuna_v0, encode_counted, ("###",)),
        Template("wizardlm", _wizardlm, encode_counted),
        Template("llama2", _llama2, encode_aligned),
        Template("llama3", _llama3, encode_aligned, stop_tokens=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
        Template("chatml", _chatml, encode_aligned, stop_tokens=("<|im_end|>",)),
        Template("chinese-alpaca", _chinese_alpaca, encode_separately, _ALPACA_STOP),
        Template("chinese-alpaca-inference", _chinese_alpaca_inference, encode_separately, _ALPACA_STOP),
        Template("plain", _prompt_completion, encode_aligned),
        Template("qlora", _prompt_completion, encode_separately),
    )
}


def get_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template `name`: a key of TEMPLATES, "chat_template" (the checkpoint's own), or a path to a .jinja file.

    Raises:
        PunaError: no such template, the tokenizer brings none, or it cannot be used (see `jinja_template`).
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name == "chat_template":
        if tokenizer.chat_template is None:
            raise PunaError(f"this tokenizer has no chat_template: name one of {', '.join(TEMPLATES)}")
        if (own := named_in(tokenizer.chat_template)) is not None:
            return TEMPLATES[own]
        return jinja_template(tokenizer.chat_template, tokenizer)
    if name.endswith(".jinja") and Path(name).is_file():
        return jinja_template(Path(name).read_text(encoding="utf-8"), tokenizer)
    raise PunaError(
        f"template {name!r} is unknown: use one of {', '.join(TEMPLATES)}, chat_template, or a path to a .jinja file"
    )


def jinja_template(source: str, tokenizer: Tokenizer) -> Template:
    """The jinja chat template `source` as a Template; special tokens that it writes itself become special pieces.

    The tokens that a model is trained on are those inside `{% generation %}` where the template has it, and otherwise
    what each assistant message adds to the conversation rendered with a generation prompt.

    Raises:
        PunaError: the template does not compile, or refuses one exchange of user and assistant.
    """
    render = jinja_render(source, tokenizer)
    own = frozenset(text for text in tokenizer.ordinary_tokens if text in source)
    reads = frozenset(re.findall(r"\w+", source))

    def template(
        stop_tokens: tuple[str, ...], tools: Sequence[Mapping[str, Any]] | None, with_tools: Callable | None
    ) -> Template:
        def pieces(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
            asked = [
                {**message, "content": _asked(message)} if isinstance(message.get("content"), str) else message
                for message in messages
            ]
            rendered = render(asked, add_generation_prompt, not add_generation_prompt, tools)
            return [Piece(*piece, literal=frozenset() if piece[2] else own) for piece in rendered]

        return Template(
            "chat_template", pieces, encode_aligned, stop_tokens=stop_tokens, reads=reads, with_tools=with_tools
        )

    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written = [text for text, _, special in render(conversation, False, False) if special]
    stop_tokens = (*written[-1:], EOS)
    takes_tools = "tools" in referenced_names(source)
    with_tools = (lambda tools: template(stop_tokens, tools, None)) if takes_tools else None
    return template(stop_tokens, None, with_tools)
