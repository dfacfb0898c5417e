"""A checkpoint's own jinja chat template, rendered in a sandbox, with what users wrote kept apart from what it writes.

Before rendering, every special token that a message *contains* is broken by a mark that no message holds; after
rendering, the special tokens that are still whole are the template's own, and the marks are taken out. A template that
looks for special tokens in messages (it splits an answer at `</think>`) would not find them so: where the text differs
from what it writes of the messages as they are, the marks go before the special tokens that the template itself writes.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, partial
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import PunaError
from model.tokenizer import Tokenizer

# Noncharacters: valid code points that Unicode reserves for a program's own use.
_OPEN, _CLOSE = "\ufdee", "\ufdef"
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDEE)]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, transformers' tag around what the assistant writes: marks its ends."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


_LONGEST_SPECIAL = 1000


class _Specials:
    """The special tokens' texts, ready for searching."""

    def __init__(self, texts: Iterable[str]):
        self.texts = sorted(texts, key=len, reverse=True)
        if self.texts and len(self.texts[0]) > _LONGEST_SPECIAL:  # every head and tail of each is kept
            raise PunaError(
                f"a special token has {len(self.texts[0]):,} characters; none has more than {_LONGEST_SPECIAL:,}"
            )
        any_of = "|".join(map(re.escape, self.texts)) or r"(?!)"
        self.pattern = re.compile(any_of)
        self.first = re.compile(f"(?=(?:{any_of}))(.)", re.DOTALL)  # the first character of each, overlapping or not
        self.heads = tuple({text[:cut] for text in self.texts for cut in range(1, len(text))})
        self.tails = tuple({text[cut:] for text in self.texts for cut in range(1, len(text))})

    def protect(self, value: Any, mark: str) -> Any:
        """`value` with the special tokens in its texts broken by `mark`, also those that only start or end in one."""
        if isinstance(value, Mapping):
            return {self._protected_key(key, mark): self.protect(item, mark) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [self.protect(item, mark) for item in value]
        if not isinstance(value, str):
            return value
        value = self.first.sub(rf"\1{mark}", value)
        core = value.strip()
        before, after = value[: len(value) - len(value.lstrip())], value[len(value.rstrip()) :] if core else ""
        return f"{before}{mark * core.startswith(self.tails)}{core}{mark * core.endswith(self.heads)}{after}"

    def _protected_key(self, key: Any, mark: str) -> Any:
        """A key, which names an argument of a tool or what templates look for; these hold no special token."""
        return self.protect(key, mark) if isinstance(key, str) and self.pattern.search(key) else key


_ROLE_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class _Marker:
    """Puts `mark` before the special tokens that a template writes, and not before those that it looks for."""

    def __init__(self, specials: _Specials, mark: str):
        self._pattern, self._mark = specials.pattern, mark
        self.written = re.compile(f"{mark}(?:{specials.pattern.pattern})")

    def text(self, value: str) -> str:
        return self._pattern.sub(lambda found: self._mark + found[0], value)

    def tree(self, node: nodes.Node, sought: bool = False) -> None:
        """Change a parsed template; `sought` for what it compares a text with, splits it at or replaces in it."""
        if isinstance(node, nodes.Const) and isinstance(node.value, str) and not sought:
            node.value = self.text(node.value)
        elif isinstance(node, nodes.TemplateData):
            node.data = self.text(node.data)
        elif isinstance(node, nodes.Name) and node.name in _ROLE_NAMES and node.ctx == "load" and not sought:
            node.name = f"written_{node.name}"
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            self._sides(node.node, node.args, node.node.attr == "replace", sought)
            return
        if isinstance(node, nodes.Filter) and node.name == "replace":
            self._sides(node.node, node.args, True, sought)
            return
        for child in node.iter_child_nodes():
            self.tree(child, sought or isinstance(node, nodes.Compare | nodes.Test))

    def _sides(self, text: nodes.Node | None, arguments: list[nodes.Expr], replacing: bool, sought: bool) -> None:
        """A method of a text, or the filter `replace`: what it is given is sought, save what `replace` puts there."""
        if text is not None:
            self.tree(text, sought)
        for number, argument in enumerate(arguments):
            self.tree(argument, sought or not (replacing and number == 1))


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it is, where jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def jinja_render(source: str, tokenizer: Tokenizer) -> Callable[..., list[tuple[str, bool, bool]]]:
    """Compile the jinja chat template `source`.

    Returns:
        `render(messages, add_generation_prompt, masked, tools=None)`, which gives (text, trained, special) in order.
        Trained is what `{% generation %}` encloses; in a template without it what each assistant message adds, and with
        `masked` false nothing. `tools` are functions that the model may call, as OpenAI's API has them. `render` raises
        PunaError where the template refuses the messages, or rewrites earlier turns so that what each assistant message
        adds cannot be told (such a template needs `{% generation %}`).

    Raises:
        PunaError: the template does not compile.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        compiled = environment.from_string(source)
    except (TemplateError, RecursionError) as error:  # RecursionError: nested too deeply
        raise PunaError(f"the chat template does not compile: {error}") from error
    # Added tokens that are not special are the template's too where it writes them, as DeepSeek-R1-Distill's roles are.
    # Those in tag form, such as <think>, the model writes itself: in an answer they are tokens, as for transformers.
    own = {text for text in tokenizer.ordinary_tokens if text in source}
    specials = _Specials({*tokenizer.special_tokens, *own})
    in_answers = _Specials({*tokenizer.special_tokens, *(text for text in own if not re.fullmatch(r"</?\w+>", text))})
    names: dict[int | None, str] = {number: text for text, number in tokenizer.special_tokens.items()}
    roles = dict(
        zip(_ROLE_NAMES, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id), strict=True)
    )
    constants: dict[str, Any] = {"documents": None, **{role: names.get(id, "") for role, id in roles.items()}}

    @cache
    def marked(mark: str) -> tuple[Any, _Marker]:
        marker, tree = _Marker(specials, mark), environment.parse(source)
        marker.tree(tree)
        return environment.from_string(tree), marker

    def text_of(
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Any = None,
        template: Any = compiled,
        **more: str,
    ) -> str:
        try:
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, **constants, **more
            )
        except Exception as error:  # a template is foreign code: whatever it does wrong, it refuses
            raise PunaError(f"the chat template refuses these messages: {error}") from error

    def render(
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        masked: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[tuple[str, bool, bool]]:
        mark = _unused_mark([*messages, *(tools or [])])

        def protect(message: Mapping[str, Any]) -> Any:
            return (in_answers if message.get("role") == "assistant" else specials).protect(message, mark)

        given, pattern = [protect(message) for message in messages], specials.pattern
        given_tools = None if tools is None else specials.protect(tools, mark)
        written = partial(text_of, tools=given_tools)
        text = written(given, add_generation_prompt)
        if given != list(messages) or given_tools != tools:
            plain = text_of(messages, add_generation_prompt, tools)
            if text.replace(mark, "") != plain:  # the template looks for special tokens
                template, marker = marked(mark)
                more = {f"written_{role}": marker.text(constants[role]) for role in _ROLE_NAMES}
                given, pattern = list(messages), marker.written
                written = partial(text_of, tools=tools, template=template, **more)
                text = written(given, add_generation_prompt)
                if text.replace(mark, "") != plain:
                    raise PunaError(
                        "a message holds a special token that the chat template looks for in a way in which its own "
                        "cannot be told from the message's: take special tokens out of the messages"
                    )
        if _OPEN in text:
            text, spans = _tagged_spans(text)
        else:
            spans = _assistant_spans(given, text, written, pattern) if masked else []
        return _split(text, spans, pattern, mark)

    return render


def referenced_names(source: str) -> set[str]:
    """The names that a template reads from outside, such as `tools`.

    Raises:
        PunaError: the template does not compile.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return find_undeclared_variables(environment.parse(source))
    except TemplateError as error:
        raise PunaError(f"the chat template does not compile: {error}") from error


def _unused_mark(messages: Sequence[Mapping[str, Any]]) -> str:
    written = set(json.dumps(messages, ensure_ascii=False))
    free = [mark for mark in _MARKS if mark not in written]
    if not free or written & {_OPEN, _CLOSE}:
        raise PunaError("a message holds Unicode noncharacters (U+FDD0 to U+FDEF), which chat templates cannot carry")
    return free[0]


def _tagged_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """`text` without the marks of `{% generation %}`, and the spans that they enclosed."""
    plain, spans, position = [], [], 0
    for number, part in enumerate(re.split(f"[{_OPEN}{_CLOSE}]", text)):
        if number % 2:
            spans.append((position, position + len(part)))
        plain.append(part)
        position += len(part)
    return "".join(plain), spans


def _assistant_spans(
    messages: Sequence[Mapping[str, Any]],
    text: str,
    text_of: Callable[[Sequence[Mapping[str, Any]], bool], str],
    pattern: re.Pattern[str],
) -> list[tuple[int, int]]:
    """What each assistant message adds to its generation prompt, through the special token that ends it."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, replied = text_of(messages[:number], True), text_of(messages[: number + 1], False)
        if not (replied.startswith(prompt) and text.startswith(replied)):
            raise PunaError(
                "the chat template rewrites earlier turns, so the tokens of an answer cannot be told: "
                "enclose them in {% generation %} in the template, or choose a named template"
            )
        ends = [found.end() for found in pattern.finditer(replied, len(prompt))]
        closed = bool(ends) and not replied[ends[-1] :].strip()
        spans.append((len(prompt), ends[-1] if closed else len(replied)))
    return spans


def _split(
    text: str, spans: Sequence[tuple[int, int]], pattern: re.Pattern[str], mark: str
) -> list[tuple[str, bool, bool]]:
    """Cut `text` at special tokens and at the ends of trained spans, and take the marks out."""
    found = {match.start(): match.end() for match in pattern.finditer(text)}
    cuts = sorted({0, len(text), *found, *found.values(), *(end for span in spans for end in span)})
    pieces = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        trained = any(first <= start and end <= last for first, last in spans)
        pieces.append((text[start:end].replace(mark, ""), trained, start in found))
    return [piece for piece in pieces if piece[0]]
