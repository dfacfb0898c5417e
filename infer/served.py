"""What a server serves: one model with its adapters, and how requests of OpenAI's API become requests of the engine."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import cached_property
from typing import Any

from infer.grammar import Grammars
from infer.host import Host
from infer.load import sampling
from infer.openai_api import ApiError, ChatMessage, ChatRequest, CompletionRequest, EmbeddingRequest, NamedTool, Sampled
from infer.request import Constraint, Request
from infer.sample import Sampling
from infer.slots import STOPS
from infer.tools import Form, find_form
from model.chat import Template, stop_ids
from model.errors import PunaError
from model.tokenizer import Tokenizer

DEFAULT_TOKENS = 16  # of a completion, as OpenAI's API has it; a chat goes on to the end of the context


@dataclass(frozen=True)
class Served:
    """One model, by name, with its adapters.

    Attributes:
        context: tokens that a request may have, prompt and text.
        generation: generation_config.json, which gives the sampling settings that a request leaves out.
        template: how conversations are written; None refuses them.
        adapters: the index of each adapter in the engine, by the name that requests use.
        timeout: seconds that a request may take; None is no limit.
    """

    name: str
    host: Host
    tokenizer: Tokenizer
    vocab_size: int
    context: int
    eos_ids: tuple[int, ...]
    generation: Mapping[str, Any] = field(default_factory=dict)
    template: Template | None = None
    adapters: Mapping[str, int] = field(default_factory=dict)
    timeout: float | None = None

    @cached_property
    def grammars(self) -> Grammars:
        """The grammars of this tokenizer, whose texts end with the tokens that end a reply."""
        return Grammars(self.tokenizer, self.vocab_size, self.chat_stops)

    @cached_property
    def chat_stops(self) -> tuple[int, ...]:
        """The tokens that end a reply in a conversation."""
        own = stop_ids(self.template, self.tokenizer) if self.template else ()
        return tuple(dict.fromkeys((*own, *self.eos_ids)))[:STOPS]

    @cached_property
    def form(self) -> Form | None:
        """How this model writes calls of tools; None where that is not known."""
        takes_tools = self.template is not None and self.template.with_tools is not None
        return find_form(self.tokenizer.chat_template) if takes_tools else None

    def completions(self, body: CompletionRequest) -> list[Request]:
        """The requests of each prompt in turn, `n` of each.

        Raises:
            ApiError: one of them can never be met.
        """
        requests = []
        for prompt in body.prompts:
            ids = self.ids(prompt, "prompt")
            if body.max_tokens == 0 and not body.echo:
                raise ApiError(400, "max_tokens is 0: give 1 or more, or echo=true for the prompt alone", "max_tokens")
            most = self._room(ids, DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens, body)
            request = self._request(body, ids, most, self.eos_ids, body.stops)
            scored = bool(body.echo) and (body.logprobs is not None or most == 0)
            requests += self._choices(changed(request, logprobs=body.logprobs, score_prompt=scored), body)
        return requests

    def chat(self, body: ChatRequest) -> list[Request]:
        """The `n` requests of a conversation.

        Raises:
            ApiError: they can never be met.
        """
        tools = self._tools(body)
        ids = self.chat_ids(body.messages, tools)
        given = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if given == 0:
            raise ApiError(400, "max_tokens is 0: give 1 or more", "max_tokens")
        assert self.template is not None
        request = self._request(
            body, ids, self._room(ids, given, body), self.chat_stops, (*body.stops, *self.template.stop)
        )
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs is only for requests with logprobs=true", "top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        requests = self._choices(changed(request, logprobs=logprobs), body)
        return [changed(one, constraint=self._constraint(body, tools)) for one in requests]

    def embeddings(self, body: EmbeddingRequest) -> list[Request]:
        """One request for each input.

        Raises:
            ApiError: one of them can never be met.
        """
        adapter = self.adapter(body.model)
        rows = [self.ids(given, "input") for given in body.inputs]
        deadline = self._deadline()
        return [Request(ids, self._room(ids, 1, None), embed=True, adapter=adapter, deadline=deadline) for ids in rows]

    def ids(self, prompt: str | Sequence[int], param: str) -> list[int]:
        """The token ids of a text, after the beginning-of-text token where they get one; ids stay as they are.

        Raises:
            ApiError: no tokens, or one that the model lacks.
        """
        if isinstance(prompt, str):
            self._check_size([prompt], param)
            ids = self.tokenizer.encode(prompt, add_bos=self.tokenizer.adds_bos)
        else:
            ids = list(prompt)
        if not ids:
            raise ApiError(400, f"{param} is empty, and this model has no token to begin with: give some text", param)
        if max(ids) >= self.vocab_size:
            raise ApiError(400, f"{param} holds token {max(ids)}; this model has {self.vocab_size}", param)
        return ids

    def chat_ids(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The token ids of a conversation, ready for a reply.

        Raises:
            ApiError: the template has no place for it, or the model has no template.
        """
        template = self.template
        if template is None:
            raise ApiError(400, "this model has no chat template: start the server with --template", "messages")
        try:
            if tools and template.with_tools:
                template = template.with_tools(tools)
            turns = [message.message() for message in messages]
            pieces = template.render(turns, add_generation_prompt)
            texts = [piece.text for piece in pieces if not piece.special]
            self._check_size(texts, "messages", len(pieces) - len(texts))
            return template.encode(pieces, self.tokenizer)[0]
        except (PunaError, KeyError, TypeError) as error:
            raise ApiError(400, str(error), "messages") from None

    def _check_size(self, texts: Sequence[str], param: str, specials: int = 0) -> None:
        """Refuses what can not fit before it is encoded, which takes seconds for megabytes."""
        size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
        least = specials + -(-size // self.tokenizer.longest)
        if least > self.context:
            raise ApiError(
                400,
                f"{param}: {size} bytes of text make at least {least} tokens; this model's context is {self.context} "
                "tokens: shorten it",
                param,
                "context_length_exceeded",
            )

    def adapter(self, model: str | None) -> int:
        """The engine's index for the model that a request names: -1 for the base.

        Raises:
            ApiError: no such model here.
        """
        if model is None or model == self.name:
            return -1
        if model not in self.adapters:
            names = ", ".join([self.name, *self.adapters])
            raise ApiError(404, f"the model {model!r} is not here: {names}", "model", "model_not_found")
        return self.adapters[model]

    def _request(
        self, body: Sampled, ids: list[int], most: int, ends: tuple[int, ...], stop: tuple[str, ...]
    ) -> Request:
        body.check_stream()
        return Request(
            prompt=ids,
            max_new_tokens=most,
            sampling=self._sampling(body),
            stop_ids=() if body.ignore_eos else ends[:STOPS],
            stop=stop,
            adapter=self.adapter(body.model),
            deadline=self._deadline(),
        )

    def _deadline(self) -> float | None:
        return None if self.timeout is None else time.monotonic() + self.timeout

    def _sampling(self, body: Sampled) -> Sampling:
        bias = []
        for key, value in (body.logit_bias or {}).items():
            if not key.isdecimal() or int(key[:12]) >= self.vocab_size or len(key) > 12:
                raise ApiError(400, f"logit_bias has {key[:20]!r}: its keys are token ids below {self.vocab_size}")
            bias.append((int(key), value))
        # Without a temperature OpenAI's API samples; a model's own settings go before that.
        temperature = body.temperature
        if temperature is None and not self.generation.get("do_sample"):
            temperature = 1.0
        top_k = 0 if body.top_k == -1 else body.top_k
        try:
            return sampling(
                dict(self.generation),
                temperature=temperature,
                top_k=top_k,
                top_p=body.top_p,
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias=tuple(bias),
                seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
            )
        except PunaError as error:
            raise ApiError(400, str(error)) from None

    def _choices(self, request: Request, body: Sampled) -> list[Request]:
        """`n` times the request; each choice has a seed of its own, the first the one that was given."""
        seeds = ((request.sampling.seed + 0x9E3779B97F4A7C15 * index) % 2**63 for index in range(body.n or 1))
        return [changed(request, sampling=changed(request.sampling, seed=seed)) for seed in seeds]

    def _room(self, ids: list[int], wanted: int | None, body: Sampled | None) -> int:
        """How many tokens may follow the prompt: as many as are `wanted`, or as there is room for."""
        room = self.context - len(ids)
        given = "input" if body is None else "messages" if isinstance(body, ChatRequest) else "prompt"
        explicit = (
            body is None or body.max_tokens is not None or getattr(body, "max_completion_tokens", None) is not None
        )
        most = room if wanted is None else wanted if explicit else min(wanted, max(room, 1))
        if room < most or (room < 1 and wanted != 0):
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens and {max(most, 1)} are to follow; this model's context is "
                f"{self.context} tokens: shorten the prompt or ask for fewer",
                "max_tokens" if room >= 1 else given,
                "context_length_exceeded",
            )
        return most

    def _tools(self, body: ChatRequest) -> list[dict[str, Any]]:
        """The tools that the template shows to the model."""
        if not body.tools or body.tool_choice == "none":
            if body.tool_choice not in (None, "none", "auto"):
                raise ApiError(400, "tool_choice asks for a call and no tools are given", "tool_choice")
            return []
        if self.form is None:
            raise ApiError(400, "this model's chat template has no form of tool calls that we can read", "tools")
        return [tool.model_dump(exclude_none=True) for tool in body.tools]

    def _constraint(self, body: ChatRequest, tools: list[dict[str, Any]]) -> Constraint | None:
        """A new constraint, for a form of the reply or for a call that must be made."""
        schema = None
        if isinstance(body.tool_choice, NamedTool):
            name = body.tool_choice.function.name
            tools = [tool for tool in tools if tool["function"]["name"] == name]
            if not tools:
                raise ApiError(400, f"tool_choice names {name!r}, which is no tool of this request", "tool_choice")
        if tools and (body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)):
            assert self.form is not None
            schema = self.form.schema(tools)
        elif body.response_format is not None and body.response_format.type != "text":
            given = body.response_format.json_schema
            if body.response_format.type == "json_object":
                schema = {"type": "object"}
            elif given is None or given.schema_ is None:
                raise ApiError(400, "response_format is json_schema and has no schema", "response_format")
            else:
                schema = given.schema_
        if schema is None:
            return None
        try:
            return self.grammars.json_schema(schema)
        except PunaError as error:
            raise ApiError(400, str(error), "response_format") from None
