"""The kinds of lines that `batch` answers: one row each in `KINDS`, with how a line is asked and its answer written.

Nothing here knows of files or of the engine. An answer depends on its line, its line number and the settings alone: no
time stamps, and ids are made from content, so that a job that was interrupted ends with the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from infer.batch_openai import ACTING, CHAT, COMPLETIONS, BadBody, read_body, shown
from infer.engine import Progress, Request
from infer.load import sampling
from model.chat import Message, Template, encode_prompt, get_template, stop_ids
from model.errors import PunaError
from model.tokenizer import Tokenizer

Record = dict[str, Any]


class NoTemplate(PunaError):
    """The job lacks a template: no fault of a line, so the job stops."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every line of a job.

    Args:
        model: the name that answers give the model.
        generation: the model's generation_config.json.
        given: sampling settings of the command line, by the names of `Sampling`; those not given are absent.
        max_new_tokens: as the command line gives it; then a line for which there is no room is refused.
        length: tokens of the longest request, prompt and answer.
    """

    model: str
    tokenizer: Tokenizer
    template: Template | None
    eos_ids: tuple[int, ...]
    length: int
    generation: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0


class Ask(NamedTuple):
    """What a line asks for. `own` are sampling settings of the line, and `max_new_tokens` its own; `most` is the
    number where neither the line nor the command line says one, cut to the room there is (None: all of it)."""

    prompt: list[int]
    most: int | None
    own: Mapping[str, Any] = {}
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of lines.

    Args:
        keys: what a line must hold, each with the types it may have.
        id: the key that no two lines may share, if any.
        ask: of a line and the texts of its answers so far, what to ask next.
        write: of a line and its answers, the line of the output.
        check: raises PunaError for what `keys` cannot say.
        turns: how many answers a line takes, one after the other.
        adds: the keys of an answer that keeps all the keys of its line.
        templates: the conversation templates where --template is not given, the first that there is;
            "chat_template" is the model's own.
        sampling: the settings where the command line gives none.
        on_error: makes an answer of what would otherwise be a reject.
    """

    name: str
    keys: Mapping[str, tuple[type, ...]]
    id: str | None
    ask: Callable[[Record, Sequence[str], Settings], Ask]
    write: Callable[[Record, Sequence[Progress], Settings], Record]
    check: Callable[[Record], None] = lambda record: None
    turns: Callable[[Record], int] = lambda record: 1
    adds: Set[str] = frozenset()
    templates: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    on_error: Callable[[Record, PunaError], Record] | None = None


# --- what all kinds share


def check_record(record: Record, kind: Kind) -> None:
    """Raises PunaError unless `record` is a line of this kind, with no key that would act in a line of another."""
    _check_keys(record, kind)
    if kind.name != "openai" and (acting := sorted(ACTING & record.keys())):
        raise PunaError(
            f"{acting[0]!r} is a setting, which lines of kind {kind.name} do not have: give it for all lines on the "
            "command line, write lines of kind openai, or rename the key"
        )
    if lost := sorted(kind.adds & record.keys()):
        raise PunaError(f"{lost[0]!r} is a key that the answer is written under: rename it, so that it is not lost")


def _check_keys(record: Record, kind: Kind) -> None:
    for key, types in kind.keys.items():
        if key not in record:
            raise PunaError(f"key {key!r} is missing: a line of kind {kind.name} has {', '.join(kind.keys)}")
        value = record[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise PunaError(f"{key!r} is {shown(value)}: give {' or '.join(_TYPES[t] for t in types)}")
    kind.check(record)


_TYPES = {str: "text", int: "a whole number", list: "a list", object: "a value"}


def choose_template(name: str | None, kind: Kind, tokenizer: Tokenizer) -> Template | None:
    """The template `name`, or the kind's first that there is; tried on a message, so that no line finds it unfit.

    Raises:
        PunaError: no such template, or this tokenizer cannot write it.
    """
    usable = [one for one in kind.templates if one != "chat_template" or tokenizer.chat_template is not None]
    name = name or next(iter(usable), None)
    if name is None:
        return None
    template = get_template(name, tokenizer)
    encode_prompt([_user("?")], template, tokenizer)
    return template


def check_settings(kind: Kind, settings: Settings) -> None:
    """Refuses what no line could be answered with, so that not every line is rejected for it. Raises PunaError."""
    sampling(dict(settings.generation), **(dict(kind.sampling) | dict(settings.given)))
    if settings.max_new_tokens is not None and not 0 < settings.max_new_tokens < settings.length:
        raise PunaError(
            f"max_new_tokens is {settings.max_new_tokens}: give a number from 1 to {settings.length - 1}, since prompt "
            f"and answer have {settings.length} tokens together (see --context)"
        )
    if "" in settings.stop:
        raise PunaError("stop is an empty string, which would end every text before it begins: give some text")


def line_seed(seed: int, number: int) -> int:
    """The seed of line `number` in a job of seed `seed`: the same in any order, shard or batch."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()) >> 1


def make_request(kind: Kind, record: Record, texts: Sequence[str], number: int, settings: Settings) -> Request:
    """The next request of line `number`, whose answers so far are `texts`.

    Raises:
        PunaError: it can never be met.
    """
    ask = kind.ask(record, texts, settings)
    own = {"seed": line_seed(settings.seed, number)} | dict(ask.own)
    chosen = sampling(dict(settings.generation), **(dict(kind.sampling) | dict(settings.given) | own))
    room = settings.length - len(ask.prompt)
    wanted = settings.max_new_tokens if ask.max_new_tokens is None else ask.max_new_tokens
    new = max(1, room if ask.most is None else min(room, ask.most)) if wanted is None else wanted
    if new > room:
        raise PunaError(
            f"the prompt has {len(ask.prompt)} tokens and the answer up to {new}, together more than the context of "
            f"{settings.length}: shorten the prompt, or give a smaller --max-new-tokens or a larger --context"
        )
    stops = tuple(dict.fromkeys((*ask.stop, *settings.stop)))
    ends = tuple(dict.fromkeys((*ask.stop_ids, *settings.eos_ids)))
    return Request(ask.prompt, new, chosen, ends, stops)


def _chat(messages: Sequence[Message], settings: Settings, most: int | None) -> Ask:
    if settings.template is None:
        raise NoTemplate("lines hold messages and the model brings no conversation template: name one by --template")
    prompt = encode_prompt(messages, settings.template, settings.tokenizer)
    return Ask(prompt, most, {}, None, settings.template.stop, stop_ids(settings.template, settings.tokenizer))


def _plain(text: str, settings: Settings, most: int | None) -> Ask:
    tokenizer = settings.tokenizer
    return Ask(tokenizer.encode(text, add_bos=tokenizer.adds_bos), most)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _made_id(*parts: Any) -> str:
    """An id that the same content always gets."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


# --- WizardLM's test set

_WIZARDLM_PROMPT = 1024  # tokens of a prompt, which loses its end


def _ask_wizardlm(record: Record, texts: Sequence[str], settings: Settings) -> Ask:
    """The original script ends the text where the model begins another `### Response:`."""
    ask = _chat([_user(record["Instruction"])], settings, 2048)
    return ask._replace(prompt=ask.prompt[:_WIZARDLM_PROMPT], stop=(*ask.stop, "### Response:"))


def _write_wizardlm(record: Record, answers: Sequence[Progress], settings: Settings) -> Record:
    return {"id": record["idx"], "instruction": record["Instruction"], "wizardlm": answers[0].text.strip()}


# --- FastChat's questions: the 80 of Vicuna, and MT-bench


def _ask_vicuna(record: Record, texts: Sequence[str], settings: Settings) -> Ask:
    return _chat([_user(record["text"])], settings, 1024)


def _write_vicuna(record: Record, answers: Sequence[Progress], settings: Settings) -> Record:
    text = answers[0].text.strip()
    return {
        "question_id": record["question_id"],
        "text": text,
        "answer_id": _made_id(settings.model, record["question_id"], text),
        "model_id": settings.model,
        "metadata": {},
    }


_TEMPERATURES = {  # by MT-bench's category, as FastChat's llm_judge has them
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip


def _check_mt_bench(record: Record) -> None:
    if not record["turns"] or not all(isinstance(turn, str) for turn in record["turns"]):
        raise PunaError(f"'turns' is {shown(record['turns'])}: give a list of one text or more")
    if not isinstance(record.get("category", ""), str):
        raise PunaError(f"'category' is {shown(record['category'])}: give text")


def _ask_mt_bench(record: Record, texts: Sequence[str], settings: Settings) -> Ask:
    messages = []
    for question, answer in zip(record["turns"], texts, strict=False):
        messages += [_user(question), {"role": "assistant", "content": answer.strip()}]
    ask = _chat([*messages, _user(record["turns"][len(texts)])], settings, 1024)
    if "temperature" in settings.given:
        return ask
    return ask._replace(own={"temperature": _TEMPERATURES.get(record.get("category", ""), 0.7)})


def _write_mt_bench(record: Record, answers: Sequence[Progress], settings: Settings) -> Record:
    turns = [answer.text.strip() for answer in answers]
    return {
        "question_id": record["question_id"],
        "answer_id": _made_id(settings.model, record["question_id"], turns),
        "model_id": settings.model,
        "choices": [{"index": 0, "turns": turns}],
    }


# --- prompts


def _ask_prompt(record: Record, texts: Sequence[str], settings: Settings) -> Ask:
    if settings.template is None:
        return _plain(record["prompt"], settings, 128)
    return _chat([_user(record["prompt"])], settings, 128)


def _write_prompt(record: Record, answers: Sequence[Progress], settings: Settings) -> Record:
    return {**record, "completion": answers[0].text, "finish_reason": answers[0].finish}


# --- OpenAI's batches


def _check_openai(record: Record) -> None:
    if record["method"] != "POST":
        raise PunaError(f"'method' is {shown(record['method'])}: give POST")
    if record["url"] not in (CHAT, COMPLETIONS):
        raise PunaError(f"'url' is {shown(record['url'])}: give {CHAT} or {COMPLETIONS}")


def _ask_openai(record: Record, texts: Sequence[str], settings: Settings) -> Ask:
    body = read_body(record["url"], record["body"])
    if body.messages is not None:
        ask = _chat(body.messages, settings, None)
    else:
        ask = _plain(body.prompt or "", settings, 16)  # OpenAI's number
    return ask._replace(own=body.sampling, max_new_tokens=body.max_new_tokens, stop=(*ask.stop, *body.stop))


def _response(record: Record, status: int, body: Record) -> Record:
    made = _made_id(record["custom_id"], status, body)
    response = {"status_code": status, "request_id": f"req_{made}", "body": body}
    return {"id": f"batch_req_{made}", "custom_id": record["custom_id"], "response": response, "error": None}


def _write_openai(record: Record, answers: Sequence[Progress], settings: Settings) -> Record:
    (answer,) = answers
    read, made = len(answer.request.prompt), len(answer.tokens)
    chat = record["url"] == CHAT
    said = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": answer.finish}
    body = {
        "id": ("chatcmpl-" if chat else "cmpl-") + _made_id(settings.model, record["custom_id"], answer.text),
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,  # no time stamps: see the first lines of this file
        "model": settings.model,
        "choices": [choice],
        "usage": {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made},
    }
    return _response(record, 200, body)


def _openai_error(record: Record, error: PunaError) -> Record:
    param = error.param if isinstance(error, BadBody) else None
    told = {"message": str(error), "type": "invalid_request_error", "param": param, "code": None}
    return _response(record, 400, {"error": told})


# --- the table

_ID = (int, str)

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "openai", {"custom_id": (str,), "method": (str,), "url": (str,), "body": (object,)}, "custom_id",
            _ask_openai, _write_openai, check=_check_openai, sampling={"temperature": 1.0, "top_p": 1.0},
            templates=("chat_template",), on_error=_openai_error,
        ),
        Kind(
            "wizardlm", {"idx": _ID, "Instruction": (str,)}, "idx", _ask_wizardlm, _write_wizardlm,
            templates=("wizardlm",), sampling={"temperature": 1.0, "top_p": 0.9, "top_k": 40},
        ),
        Kind(
            "mt_bench", {"question_id": _ID, "turns": (list,)}, "question_id", _ask_mt_bench, _write_mt_bench,
            check=_check_mt_bench, turns=lambda record: len(record["turns"]),
            templates=("chat_template", "vicuna_v1.1"),
        ),
        Kind(
            "vicuna", {"question_id": _ID, "text": (str,)}, "question_id", _ask_vicuna, _write_vicuna,
            templates=("chat_template", "vicuna_v1.1"), sampling={"temperature": 0.7},
        ),
        Kind("prompt", {"prompt": (str,)}, None, _ask_prompt, _write_prompt, adds={"completion", "finish_reason"}),
    )
}  # fmt: skip


def kind_of(record: Record) -> Kind | None:
    """The kind whose keys a line has, with values of their types; the first of the table where several fit."""
    for kind in KINDS.values():
        try:
            _check_keys(record, kind)
        except PunaError:
            continue
        return kind
    return None
