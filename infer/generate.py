"""Continues prompts: prefill a cache, then decode in small chunks of steps that never leave the device.

Rows of a batch have their own lengths, settings and ends. Lengths that shape a program (prompt, cache, the window that
attention reads) are rounded up to powers of two, so that few programs are compiled.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from infer.sample import Sampling, SamplingRows, sample, stack_sampling
from model import cpu
from model.cache import KVCache, init_cache
from model.config import LlamaConfig
from model.errors import PunaError
from model.layout import per_layer
from model.llama import hidden, logits
from model.params import Params
from model.sharding import named_sharding
from model.tokenizer import Tokenizer

PREFILL = 512  # most prompt tokens of a row in one pass: bounds the memory of attention scores
CHUNK = 8  # most decode steps between two looks at the text: bounds the delay of streaming
WINDOW = 128  # least positions that attention reads


class State(NamedTuple):
    """A batch of B rows in decoding.

    Attributes:
        cache: keys and values of all tokens before `token`.
        token: int32 [B], the last of each row, not in the cache yet.
        position: int32 [B], where it stands.
        seen: bool [B, V], the tokens of a row so far.
        done: bool [B], the rows that rest.
    """

    cache: KVCache
    token: Array
    position: Array
    seen: Array
    done: Array


@partial(jax.jit, static_argnames=("config", "window"), donate_argnames="cache")
def prefill(
    params: Params, cache: KVCache, tokens: Array, positions: Array, config: LlamaConfig, window: int
) -> KVCache:
    """Writes pieces of prompts into the cache.

    Args:
        params: unstacked, as the cache is.
        cache: donated.
        tokens: int32 [B, T].
        positions: int32 [B, T], where each token goes; padding stands at the cache's capacity.
        config: the shape of the model.
        window: how many positions attention reads; above every token's.
    """
    return cached(hidden(params, tokens, config, positions=positions, cache=cache, window=window)[1])


@partial(jax.jit, static_argnames=("config", "window"), donate_argnames="state")
def decode_steps(
    params: Params,
    state: State,
    rows: SamplingRows,
    eos: Array,
    steps: Array,
    vocab_limit: Array,
    config: LlamaConfig,
    window: int,
) -> tuple[State, Array]:
    """Up to `steps` tokens for every row that is not done; ends early when all are.

    Args:
        params: unstacked, as the cache is.
        state: donated.
        rows: the settings of the B rows.
        eos: int32 [E], tokens; a row is done after one of them.
        steps: int32 [], CHUNK at most.
        vocab_limit: int32 []; tokens from this id on are never chosen.
        config: the shape of the model.
        window: how many positions attention reads; above every row's.

    Returns:
        The state, and the tokens int32 [B, CHUNK], -1 where a row was done.
    """

    def unfinished(carry: tuple[Array, State, Array]) -> Array:
        step, state, _ = carry
        return (step < steps) & ~jnp.all(state.done)

    def advance(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        step, state, out = carry
        x, cache = hidden(
            params, state.token[:, None], config, positions=state.position[:, None], cache=state.cache, window=window
        )
        scores = jnp.where(jnp.arange(config.vocab_size) < vocab_limit, logits(params, x[:, 0], config), -jnp.inf)
        new = sample(scores, rows, state.seen, state.position + 1)
        new = jnp.where(state.done, state.token, new)
        out = out.at[:, step].set(jnp.where(state.done, -1, new))
        state = State(
            cache=cached(cache),
            token=new,
            position=jnp.where(state.done, state.position, state.position + 1),
            seen=state.seen.at[jnp.arange(len(new)), new].set(True),
            done=state.done | jnp.isin(new, eos),
        )
        return step + 1, state, out

    out = jnp.full((len(state.token), CHUNK), -1, jnp.int32)
    _, state, out = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state, out))
    return state, out


def cached(cache: KVCache | None) -> KVCache:
    """The cache that a pass given one returns."""
    assert cache is not None
    return cache


def generate(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    samplings: Sequence[Sampling] | None = None,
    eos_ids: Sequence[int] = (),
    stopped: Callable[[int], bool] = lambda row: False,
    mesh: Mesh | None = None,
    vocab_limit: int | None = None,
) -> Iterator[list[list[int]]]:
    """Continues token prompts as one batch.

    Args:
        params: stacked or unstacked; a caller that comes again gives them as `per_layer` makes stacked ones.
        config: the shape of the model.
        prompts: at least one token each, of any lengths.
        max_new_tokens: most tokens to make for a row.
        samplings: one for each prompt; greedy when not given.
        eos_ids: tokens that end a row; the one that ended it is its last.
        stopped: asked between chunks with a row's index; true ends the row.
        mesh: the mesh that `params` live on, if any.
        vocab_limit: how many tokens the tokenizer has, where it is fewer than the model: what pads a vocabulary to a
            round size is never chosen.

    Returns:
        An iterator that gives each row's new tokens as they come; a row that has ended gives none.

    Raises:
        PunaError: no token in a prompt, or no room for `max_new_tokens` after it in the model's context.
    """
    for number, prompt in enumerate(prompts, 1):
        check_room(f"prompt {number}", prompt, max_new_tokens, config)
    params = per_layer(params)
    settings = stack_sampling(list(samplings or [Sampling()] * len(prompts)))
    lengths = np.array([len(prompt) for prompt in prompts])
    state = prefill_prompts(params, config, prompts, int(lengths.max()) + max_new_tokens, mesh)
    eos = jnp.asarray(np.array(eos_ids, np.int32))
    limit = jax.device_put(np.int32(config.vocab_size if vocab_limit is None else vocab_limit))
    made, done = 0, np.zeros(len(prompts), bool)
    while made < max_new_tokens and not done.all():
        steps = min(CHUNK, max_new_tokens - made, max(1, made))  # short chunks first: words appear at once
        window = min(_round_up(int(lengths.max()) + made + steps, WINDOW), state.cache.capacity)
        state, out = decode_steps(params, state, settings, eos, jax.device_put(np.int32(steps)), limit, config, window)
        made += steps
        yield [[token for token in row if token >= 0] for row in jax.device_get(out).tolist()]
        done = jax.device_get(state.done) | [stopped(row) for row in range(len(prompts))]
        state = state._replace(done=_placed(done, mesh))


def check_room(
    name: str, prompt: Sequence[int], max_new_tokens: int, config: LlamaConfig, scored: bool = False
) -> None:
    """Checks that a prompt's tokens are the model's, and that they and `max_new_tokens` more fit in its context.

    Args:
        name: what an error calls the prompt.
        prompt: token ids.
        max_new_tokens: tokens to make.
        config: the shape of the model.
        scored: the prompt's tokens are scored, so `max_new_tokens` may be 0. The prompt's last token is not read then,
            and needs no room.

    Raises:
        PunaError: they are not, or do not fit; or the prompt is empty, or `max_new_tokens` too small.
    """
    context = config.max_position_embeddings
    if max_new_tokens < (0 if scored else 1):
        raise PunaError(f"max_new_tokens is {max_new_tokens}: give a number above 0")
    if not prompt:
        raise PunaError(f"{name} is empty and the tokenizer has no beginning-of-text token: give some text")
    if max(prompt) >= config.vocab_size:
        raise PunaError(
            f"{name} holds token {max(prompt)} and the model has {config.vocab_size} (vocab_size): the tokenizer is "
            f"another model's: give its own"
        )
    if len(prompt) + max_new_tokens > context + (max_new_tokens == 0):
        raise PunaError(
            f"{name} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, together more than the context "
            f"of {context} (max_position_embeddings): shorten the prompt, or give a smaller max_new_tokens"
        )


def cache_dtype(params: Params) -> Any:
    """What keys and values are kept in: the model's own dtype, or what CPUs are fastest with."""
    return cpu.CACHE_DTYPE if cpu.platform_of(params) == cpu.PLATFORM else params["embed"].dtype


def prefill_prompts(
    params: Params, config: LlamaConfig, prompts: Sequence[Sequence[int]], longest: int, mesh: Mesh | None
) -> State:
    """The state after all tokens of each prompt but the last.

    Args:
        params: unstacked.
        config: the shape of the model.
        prompts: at least one token each, of any lengths.
        longest: how many tokens a row has room for; the model's context at most.
        mesh: the mesh that `params` live on, if any.
    """
    capacity = min(_round_up(longest, WINDOW), config.max_position_embeddings)
    cache = init_cache(config, len(prompts), capacity, cache_dtype(params), mesh, layout="per_layer")
    cache = jax.device_put(cache, jax.local_devices()[0]) if mesh is None else cache
    width = _round_up(max(len(prompt) for prompt in prompts), 16)
    tokens = np.zeros((len(prompts), width), np.int32)
    positions = np.full((len(prompts), width), capacity, np.int32)
    seen = np.zeros((len(prompts), config.vocab_size), bool)
    for row, prompt in enumerate(prompts):
        known = len(prompt) - 1
        tokens[row, :known], positions[row, :known] = prompt[:-1], range(known)
        seen[row, prompt] = True
    for first in range(0, width, PREFILL):
        part = slice(first, min(first + PREFILL, width))
        if (positions[:, part] < capacity).any():
            window = min(_round_up(part.stop, WINDOW), capacity)
            cache = prefill(params, cache, tokens[:, part], positions[:, part], config, window)
    last = np.array([prompt[-1] for prompt in prompts], np.int32)
    position = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    done = np.zeros(len(prompts), bool)
    rest = (_placed(last, mesh), _placed(position, mesh), _placed(seen, mesh, "vocab"), _placed(done, mesh))
    return State(cache, *rest)


def _placed(array: np.ndarray, mesh: Mesh | None, *axes: str) -> Array:
    """`array` [B, *axes] committed where `decode_steps` will return it, so that it compiles once."""
    if mesh is None:
        return jax.device_put(array, jax.local_devices()[0])
    return jax.device_put(array, named_sharding(mesh, (None, *axes), array.shape, "state"))


def _round_up(length: int, least: int) -> int:
    """The power of two at or above `length` and `least`."""
    return max(least, 1 << (length - 1).bit_length())


class TextStream:
    """The text of one continuation: whole characters only, and nothing of a stop string.

    Text that may yet turn out to begin a stop string is held back. The stop string that is complete first wins,
    however the text is cut into tokens; it and all after it are left out.

    Args:
        tokenizer: the model's.
        prompt: the tokens that are continued: what they spell is no part of the text.
        stop: the stop strings.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.stopped = False
        self._stop = stop
        self._held = ""
        self._stream = tokenizer.stream()
        for token in prompt:
            self._stream.push(token)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` make certain."""
        return "".join(self._release(self._stream.push(token)) for token in tokens)

    def flush(self) -> str:
        """What was held back, once no token follows."""
        text = self._release(self._stream.flush()) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
