"""Texts of a given form: JSON by schema, as constraints of the engine. The grammars are llguidance's."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from model.errors import PunaError
from model.tokenizer import Tokenizer


class Grammars:
    """Makes constraints for one tokenizer.

    Args:
        vocab_size: V of the model; the tokenizer may have fewer.
        eos_ids: tokens that end a text; one of them must follow a text that is complete.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, list(eos_ids)

    def json_schema(self, schema: dict[str, Any]) -> "JsonText":
        """JSON that meets `schema`; `{}` is any.

        Raises:
            PunaError: a schema that is none, uses what the library cannot hold to, or a model without an end token.
        """
        if not self._eos_ids:
            raise PunaError("text of a given form needs a token that ends it, and this model has none (eos_token_id)")
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_pattern": _SPACE})
        except ValueError as error:
            raise PunaError(f"the JSON schema is wrong: {error}") from None
        wrong, problems = LLMatcher.validate_grammar_with_warnings(grammar, self._vocabulary)
        if wrong:
            raise PunaError(f"the JSON schema is wrong: {problems[0]}")
        return JsonText(LLMatcher(self._vocabulary, grammar), self._vocab_size)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return LLTokenizer(
            TokenizerWrapper(_Bytes(self._tokenizer, self._eos_ids[0])),
            n_vocab=self._vocab_size,
            eos_token=self._eos_ids,
        )


class JsonText:
    """One text that is being made: a `Constraint` of the engine."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher, self._words = matcher, -(-vocab_size // 32)

    def allowed(self) -> np.ndarray:
        """See `Constraint`.

        Raises:
            PunaError: the grammar has become too large.
        """
        mask = self._matcher.compute_bitmask()
        self._check()
        words = np.zeros(self._words, np.uint32)
        found = np.frombuffer(mask[: len(mask) // 4 * 4], np.uint32)[: self._words]
        words[: len(found)] = found
        return words

    def accept(self, token: int) -> None:
        """See `Constraint`.

        Raises:
            PunaError: a token that was not allowed.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise PunaError(f"the text cannot be held to its form: {self._matcher.get_error().splitlines()[0]}")


_SPACE = r"[ \n]{0,24}"  # between JSON's parts: enough to indent, not enough for a model to lose itself in
_APART = "\x02"  # a character that no token joins to another


class _Bytes:
    """A tokenizer as llguidance asks for it: every token's bytes, and text to ids."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int):
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        specials = {id: text.encode() for text, id in tokenizer.special_tokens.items()}
        self.special_token_ids = sorted(specials)
        self.tokens = [specials.get(id) or tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        """The ids that spell `text` and nothing else: SentencePiece would put a space before its first word."""
        text = text.decode() if isinstance(text, bytes) else text
        ids = self._encode(text)
        if b"".join(self.tokens[id] for id in ids) == text.encode():
            return ids
        before = self._encode(_APART)
        return self._encode(_APART + text)[len(before) :]
