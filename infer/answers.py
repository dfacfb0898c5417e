"""The answers of OpenAI's API, whole and in pieces, from what the engine has made."""

import base64
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from infer.openai_api import ApiError
from infer.request import Progress, TokenLogprobs
from infer.tools import Form, as_openai
from model.errors import PunaError
from model.tokenizer import Tokenizer


def check_ended_well(progress: Progress) -> None:
    """Raises ApiError where a request ended otherwise than by a stop or its length."""
    if progress.finish == "deadline":
        raise ApiError(408, "the request took longer than this server allows", code="timeout")
    if progress.finish == "error" and isinstance(progress.error, PunaError):
        raise ApiError(400, str(progress.error))
    if progress.finish in ("error", "cancelled"):
        raise ApiError(503, "the model failed and has been started again: send the request again", code="engine_error")


def usage(progress: Sequence[Progress]) -> dict[str, Any]:
    """The tokens of a request's choices; a prompt counts once, however many choices it has."""
    prompts = {id(one.request.prompt): len(one.request.prompt) for one in progress}
    prompt, made = sum(prompts.values()), sum(len(one.tokens) for one in progress)
    reused = sum({id(one.request.prompt): one.reused for one in reversed(progress)}.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


class Tokens:
    """Tokens as the API shows them: text where the bytes are text, else `bytes:` and their values."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._specials = {id: text for text, id in tokenizer.special_tokens.items()}

    def bytes(self, token: int) -> bytes:
        """What a token spells; a special one its name, and one that no tokenizer knows nothing."""
        if token in self._specials:
            return self._specials[token].encode()
        return self._tokenizer.token_bytes(token) if token < self._tokenizer.vocab_size else b""

    def text(self, token: int) -> str:
        """As `bytes`, as text."""
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat(self, scores: Sequence[TokenLogprobs], count: int) -> list[dict[str, Any]]:
        """`logprobs.content` of a chat: each token with its `count` likeliest ones."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self.text(token), "logprob": logprob, "bytes": list(self.bytes(token))}

        return [
            entry(score.token, score.logprob) | {"top_logprobs": [entry(*pair) for pair in score.top[:count]]}
            for score in scores
        ]

    def completion(
        self, first: Sequence[int], scores: Sequence[TokenLogprobs], count: int, offset: int
    ) -> dict[str, Any]:
        """`logprobs` of a completion.

        Args:
            first: tokens before those scored, which have no score: an echoed prompt's first.
            count: the likeliest tokens to show for each; at least one is shown.
            offset: characters of the text before these tokens.
        """
        tokens = [*first, *(score.token for score in scores)]
        texts = [self.text(token) for token in tokens]
        tops = [self._distinct([*score.top[: max(count, 1)], (score.token, score.logprob)]) for score in scores]
        return {
            "tokens": texts,
            "token_logprobs": [None] * len(first) + [score.logprob for score in scores],
            "top_logprobs": [None] * len(first) + tops,
            "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=offset)) if texts else [],
        }

    def _distinct(self, pairs: Sequence[tuple[int, float]]) -> dict[str, float]:
        """The pairs by text; a token whose text another one has already goes by its id."""
        texts: dict[str, int] = {}
        values: dict[str, float] = {}
        for token, logprob in pairs:
            text = self.text(token)
            if texts.setdefault(text, token) != token:
                text = f"token_id:{token}"
            values[text] = logprob
        return values


class CompletionChoice:
    """One choice of a completion as it grows: `delta` gives what is new in it."""

    def __init__(self, index: int, progress: Progress, tokens: Tokens, echo: str | None, logprobs: int | None):
        self._index, self._progress, self._tokens, self._logprobs = index, progress, tokens, logprobs
        self._echo, self._scored_prompt = echo or "", echo is not None
        self._text = self._count = 0
        self._begun = False

    def delta(self, last: bool) -> dict[str, Any] | None:
        """The choice with what came since the call before; None where that is nothing and it is not the `last`."""
        progress, offset = self._progress, self._text
        text, scores = progress.text[self._text :], progress.logprobs[self._count :]
        if not (text or scores or last):
            return None
        self._text, self._count = len(progress.text), len(progress.logprobs)
        first: Sequence[int] = ()
        if not self._begun:
            text = self._echo + text
            if self._scored_prompt:
                first, scores = progress.request.prompt[:1], [*progress.prompt_logprobs, *scores]
        elif self._echo:
            offset += len(self._echo)
        self._begun = True
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._tokens.completion(first, scores, self._logprobs, offset)
        finish = progress.finish if last else None
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish}


class ChatChoice:
    """One choice of a chat as it grows.

    Args:
        form: how the model writes calls of tools; None where it was given none.
        salt: the answer's id, from which the ids of calls come.
    """

    def __init__(
        self, index: int, progress: Progress, tokens: Tokens, logprobs: int | None, form: Form | None, salt: str
    ):
        self._index, self._progress, self._tokens, self._logprobs = index, progress, tokens, logprobs
        self._form, self._salt = form, f"{salt}/{index}"
        self._text = self._count = 0
        self._role: dict[str, Any] = {"role": "assistant", "content": ""}

    def opening(self) -> dict[str, Any]:
        """The first piece, which names the role."""
        return {"index": self._index, "delta": self._role, "logprobs": None, "finish_reason": None}

    def delta(self, last: bool) -> dict[str, Any] | None:
        """The piece with what came since the call before; None where that is nothing and it is not the `last`."""
        progress = self._progress
        delta: dict[str, Any] = {}
        finish = progress.finish if last else None
        if last:
            content, calls = self._read()
            content = content[self._text :] if content else ""
            if calls:
                numbered = [{"index": number, **call} for number, call in enumerate(calls)]
                delta, finish = {"tool_calls": numbered}, "tool_calls"
        else:
            end = len(progress.text) if self._form is None else self._form.safe(progress.text)
            content, self._text = progress.text[self._text : end], max(end, self._text)
        if content:
            delta["content"] = content
        scores, self._count = progress.logprobs[self._count :], len(progress.logprobs)
        if not (delta or last or (scores and self._logprobs is not None)):
            return None
        return {"index": self._index, "delta": delta, "logprobs": self._scores(scores), "finish_reason": finish}

    def whole(self) -> dict[str, Any]:
        """The choice, once it has ended."""
        progress = self._progress
        content, calls = self._read()
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._scores(progress.logprobs),
            "finish_reason": "tool_calls" if calls else progress.finish,
        }

    def _read(self) -> tuple[str, list[dict[str, Any]]]:
        if self._form is None:
            return self._progress.text, []
        content, calls = self._form.read(self._progress.text)
        return content, as_openai(calls, self._salt)

    def _scores(self, scores: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return {"content": self._tokens.chat(scores, self._logprobs), "refusal": None}


def embedding(index: int, state: np.ndarray, encoding: str | None) -> dict[str, Any]:
    """One entry of `data`: the vector at length 1, as numbers or as base64 of little-endian float32."""
    vector = (state / max(float(np.linalg.norm(state)), 1e-12)).astype("<f4")
    shown = base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": shown}
