"""What is evaluated, as a task asks it: a model here (`Local`), or one behind OpenAI's API (`Remote`)."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infer.endpoint import Endpoint, one_line
from infer.evaluation import Evaluated
from model.config import LlamaConfig
from model.errors import JobFailed, PunaError
from model.llama import hidden, logits
from model.params import Params

ROWS = 8  # prompts that are scored in one pass
SHORTEST = 32  # tokens of a pass; longer ones are powers of two, so that few programs are compiled


class Subject(Protocol):
    """A model that answers tasks."""

    def prompt(self, text: str) -> str:
        """The text as the model is asked it: in its template, where there is one."""
        ...

    def fits(self, prompt: str, max_tokens: int) -> bool:
        """Whether the model has room for the prompt and an answer."""
        ...

    def choose(self, prompts: Sequence[str], choices: Sequence[str], spellings: Sequence[str]) -> np.ndarray:
        """How likely each choice is as the one token that follows each prompt.

        Args:
            prompts: texts, as `prompt` gives them.
            choices: what may follow, as "A".
            spellings: texts that end in "{}", each of which a choice makes whole; its last token then is one that the
                choice may be. Of several, a choice's log-probabilities are added up. One begins with the end of each
                prompt, and says what stands between that and the choice, as ": {}".

        Returns:
            Log-probabilities [prompts, choices].
        """
        ...

    def texts(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """The likeliest text after each prompt."""
        ...


class Local:
    """A model here.

    Args:
        evaluated: its engine and tokenizer; its template is that of `prompt`.
        mesh: the devices that it lies on; None for one.
    """

    def __init__(self, evaluated: Evaluated, mesh: Mesh | None = None):
        self.evaluated = evaluated
        self._mesh = mesh

    def prompt(self, text: str) -> str:
        """See `Subject`."""
        if self.evaluated.template is None:
            return text
        return self.evaluated.render([{"role": "user", "content": text}])

    def fits(self, prompt: str, max_tokens: int) -> bool:
        """See `Subject`."""
        return len(self.evaluated.encode(prompt)) + max_tokens <= self.evaluated.length

    def choose(self, prompts: Sequence[str], choices: Sequence[str], spellings: Sequence[str]) -> np.ndarray:
        """See `Subject`.

        Raises:
            PunaError: two choices are the same token, or a prompt is longer than the model's context.
        """
        encode = self.evaluated.tokenizer.encode
        ids = np.array([[encode(text.format(choice))[-1] for choice in choices] for text in spellings])
        if any(len(set(row)) < len(choices) for row in ids.tolist()):
            raise PunaError(f"the tokenizer has no token for each of {', '.join(choices)}: this task can't be asked")
        if len(spellings) == 1:  # as one text, for what stands between may be one token with the prompt's end
            rows = [self.evaluated.encode(_joined(prompt, spellings[0]) + choices[0])[:-1] for prompt in prompts]
        else:
            rows = [self.evaluated.encode(prompt) for prompt in prompts]
        found = np.empty((len(rows), len(choices)))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), ROWS):
            several = order[start : start + ROWS]
            found[several] = self._next([rows[i] for i in several])[:, ids].sum(axis=1)
        return found

    def texts(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """See `Subject`."""
        settings = {"max_gen_toks": max_tokens, "until": list(stop)}
        return self.evaluated.texts([(prompt, settings) for prompt in prompts])

    def _next(self, rows: list[list[int]]) -> np.ndarray:
        """Log-probabilities [rows, vocabulary] of what follows each row."""
        longest = max(map(len, rows))
        if longest > self.evaluated.length:
            raise PunaError(
                f"a prompt has {longest} tokens and there is room for {self.evaluated.length}: ask with fewer --shots, "
                "or a larger --context"
            )
        width = min(max(SHORTEST, 1 << (longest - 1).bit_length()), self.evaluated.length)
        tokens, lengths = np.zeros((ROWS, width), np.int32), np.ones(ROWS, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], lengths[i] = row, len(row)
        engine = self.evaluated.engine
        where = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        found = _last_logprobs(engine.params, *jax.device_put((tokens, lengths), where), engine.config)
        return np.asarray(found)[: len(rows)]


@partial(jax.jit, static_argnames="config")
def _last_logprobs(params: Params, tokens: Array, lengths: Array, config: LlamaConfig) -> Array:
    there = jnp.arange(tokens.shape[1]) < lengths[:, None]
    x, _ = hidden(params, tokens, config, segments=there.astype(jnp.int32))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(logits(params, last, config))


def _joined(prompt: str, spelling: str) -> str:
    """The prompt, and what the spelling says stands between it and a choice."""
    ending = spelling.removesuffix("{}")
    shared = next(n for n in range(len(ending), -1, -1) if prompt.endswith(ending[:n]))
    return prompt + ending[shared:]


class Remote:
    """A model behind OpenAI's completions, with `echo` and `logprobs` where a task chooses.

    Args:
        endpoint: the server and its model.
        parallel: requests at once.
    """

    def __init__(self, endpoint: Endpoint, parallel: int = 8):
        self.endpoint, self.parallel = endpoint, parallel

    def prompt(self, text: str) -> str:
        """See `Subject`. A completion has no template."""
        return text

    def fits(self, prompt: str, max_tokens: int) -> bool:
        """See `Subject`. The server refuses what it has no room for."""
        return True

    def choose(self, prompts: Sequence[str], choices: Sequence[str], spellings: Sequence[str]) -> np.ndarray:
        """See `Subject`.

        Raises:
            PunaError: more than one spelling: a server's tokens can't be asked apart.
            JobFailed: the server can't be asked, or gives no log-probabilities of a prompt.
        """
        if len(spellings) > 1:
            raise PunaError("this task adds up the logits of two tokens: give the model, not an endpoint")

        def score(both: tuple[str, str]) -> float:
            prompt, choice = both
            text = _joined(prompt, spellings[0]) + choice
            given = self._complete(text, max_tokens=0, echo=True, logprobs=1).logprobs
            try:  # offsets count from where the server likes, as from a token that begins the text
                start = given.text_offset[-1] + len(given.tokens[-1]) - (len(text) - len(prompt))
                found = zip(given.text_offset, given.token_logprobs, strict=True)
                return float(sum(value for offset, value in found if offset >= start))
            except (AttributeError, IndexError, TypeError, ValueError):
                raise JobFailed(
                    f"{self.endpoint.client.base_url} gives no log-probabilities of prompts (echo with logprobs)"
                ) from None

        asked = [(prompt, choice) for prompt in prompts for choice in choices]
        return np.array(self._all(score, asked)).reshape(len(prompts), len(choices))

    def texts(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """See `Subject`."""
        return self._all(
            lambda prompt: self._complete(prompt, max_tokens=max_tokens, stop=list(stop) or None).text, prompts
        )

    def _complete(self, prompt: str, **settings: Any) -> Any:
        client = self.endpoint.client
        with one_line(client):
            answer = client.completions.create(model=self.endpoint.model, prompt=prompt, temperature=0, **settings)
            return answer.choices[0]

    def _all(self, ask: Callable[[Any], Any], asked: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(ask, asked))
