"""Calls of tools in what a model writes: the forms that chat templates teach, read back into OpenAI's `tool_calls`.

A form is told by the template's own text: Llama 3.1's and 3.2's JSON object with `name` and `parameters`, and Hermes'
(NousResearch) `<tool_call>` blocks, which many ChatML models have. With another template `tools` are refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call that was read: `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Form:
    """How calls are written.

    Attributes:
        opening: text from which on a reply may be a call; "" where only a whole reply can be one, from its `{`.
        closing: text that ends one.
        key: the name of the arguments within the JSON object.
    """

    opening: str
    closing: str
    key: str

    def read(self, text: str) -> tuple[str, list[Call]]:
        """The text outside of calls, and the calls. What looks like a call and is none stays text."""
        if not self.opening:
            calls = [_call(part, self.key) for part in _objects(text)]
            whole = [call for call in calls if call is not None]
            return ("", whole) if calls and len(whole) == len(calls) else (text, [])
        outside, *blocks = text.split(self.opening)
        calls = []
        for block in blocks:
            inside, _, after = block.partition(self.closing)
            call = _call(inside, self.key)
            outside += self.opening + block if call is None else after
            calls += [] if call is None else [call]
        return (outside.strip() if calls else text), calls

    def safe(self, text: str) -> int:
        """How many characters at the start of a growing text are certainly no call."""
        if not self.opening:
            return 0 if text.lstrip()[:1] in ("", "{") else len(text)
        found = text.find(self.opening)
        if found >= 0:
            return found
        longest = min(len(self.opening) - 1, len(text))
        held = (size for size in range(longest, 0, -1) if self.opening.startswith(text[-size:]))
        return len(text) - next(held, 0)

    def schema(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The JSON schema of one call of one of `tools`."""

        def one(tool: Mapping[str, Any]) -> dict[str, Any]:
            function = tool["function"]
            parts = {"name": {"const": function["name"]}, self.key: function.get("parameters") or {"type": "object"}}
            return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}

        return {"anyOf": [one(tool) for tool in tools]}


LLAMA = Form(opening="", closing="", key="parameters")
HERMES = Form(opening="<tool_call>", closing="</tool_call>", key="arguments")


def find_form(template: str | None) -> Form | None:
    """The form in which a chat template has a model write its calls; None where it is none of ours."""
    if template is None or "tools" not in template:
        return None
    if "<tool_call>" in template:
        return HERMES
    return LLAMA if "<|python_tag|>" in template or '"parameters"' in template else None


def as_openai(calls: Sequence[Call], salt: str) -> list[dict[str, Any]]:
    """`tool_calls` as OpenAI's API has them; ids come from `salt`, the reply's own id."""

    def named(index: int, call: Call) -> dict[str, Any]:
        digest = hashlib.sha256(f"{salt}/{index}".encode()).hexdigest()[:24]
        return {
            "id": f"call_{digest}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    return [named(index, call) for index, call in enumerate(calls)]


def _objects(text: str) -> list[str]:
    """The JSON objects that make up `text`, with spaces or `;` between them (Llama 3.1); none where it is more."""
    decoder, found, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        try:
            _, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        found.append(rest[:end])
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return found


def _call(text: str, key: str) -> Call | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get(key, {})
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
