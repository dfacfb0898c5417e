"""From logits to a token, each row by its own settings. Settings are arrays, so that new ones never recompile.

Filters come in Hugging Face's order: repetition penalty, temperature, top-k, top-p, min-p; OpenAI's penalties and bias
come after the repetition penalty. The exact top-k and top-p
thresholds are found by bisection over the ordered bits of a float, which reads the logits 32 times; sorting a
vocabulary of 128,000 costs more.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.errors import PunaError

BIASES = 300  # tokens that one request may bias, at most: OpenAI's limit


@dataclass(frozen=True)
class Sampling:
    """How one prompt is continued. The defaults are greedy: the likeliest token each time.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep a token where the likelier ones sum to at most p.
        min_p: keep the tokens at least this fraction as likely as the likeliest.
        repetition_penalty: positive logits of tokens seen, prompt included, are divided by it, negative multiplied.
        presence_penalty: taken from the logits of tokens made so far, the prompt's left out.
        frequency_penalty: the same, once for each time that a token was made.
        logit_bias: pairs of a token id and what is added to its logit; at most BIASES.
        seed: the same seed gives the same text, alone or in a batch.

    Raises:
        PunaError: a value is out of its range; NaN is out of every range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name, wanted, ok in (
            ("temperature", "a number that is 0 (greedy) or more", 0 <= self.temperature < math.inf),
            ("top_k", "0 (all tokens) or a count of tokens", 0 <= self.top_k < 2**31),
            ("top_p", "a number above 0 and at most 1", 0 < self.top_p <= 1),
            ("min_p", "a number from 0 to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "a number above 0; 1 is none", 0 < self.repetition_penalty < math.inf),
            ("presence_penalty", "a number from -2 to 2", -2 <= self.presence_penalty <= 2),
            ("frequency_penalty", "a number from -2 to 2", -2 <= self.frequency_penalty <= 2),
            ("logit_bias", f"at most {BIASES} tokens with finite numbers", _is_bias(self.logit_bias)),
            ("seed", "a whole number from 0 to 2**63 - 1", 0 <= self.seed < 2**63),
        ):
            if not ok:
                raise PunaError(f"{name} is {getattr(self, name)}: give {wanted}")


def _is_bias(pairs: tuple[tuple[int, float], ...]) -> bool:
    return len(pairs) <= BIASES and all(token >= 0 and math.isfinite(bias) for token, bias in pairs)


class SamplingRows(NamedTuple):
    """The settings of a batch of B rows; `Sampling` says what they mean.

    Attributes:
        temperature: float32 [B].
        top_k: int32 [B].
        top_p: float32 [B].
        min_p: float32 [B].
        repetition_penalty: float32 [B].
        presence_penalty: float32 [B].
        frequency_penalty: float32 [B].
        bias_ids: int32 [B, BIASES]; unused places are token 0 with bias 0.
        bias: float32 [B, BIASES].
        key: uint32 [B, 2], the words of JAX's keys.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    presence_penalty: Array
    frequency_penalty: Array
    bias_ids: Array
    bias: Array
    key: Array


def stack_sampling(samplings: list[Sampling]) -> SamplingRows:
    """Settings for a batch whose row i follows `samplings[i]`."""

    def column(name: str, dtype: type) -> Array:
        return jnp.asarray(np.array([getattr(sampling, name) for sampling in samplings], dtype))

    names = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    numbers = {name: column(name, np.float32) for name in names}
    bias_ids, bias = np.zeros((len(samplings), BIASES), np.int32), np.zeros((len(samplings), BIASES), np.float32)
    for row, sampling in enumerate(samplings):
        for place, (token, value) in enumerate(sampling.logit_bias):
            bias_ids[row, place], bias[row, place] = token, value
    # A seed of up to 63 bits in two halves, since JAX's integers have 32.
    low, high = (
        jnp.asarray(np.array([s.seed >> shift & 0xFFFFFFFF for s in samplings], np.uint32)) for shift in (0, 32)
    )
    keys = jax.vmap(lambda low, high: jax.random.fold_in(jax.random.key(low), high))(low, high)
    return SamplingRows(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        bias_ids=jnp.asarray(bias_ids),
        bias=jnp.asarray(bias),
        key=jax.random.key_data(keys),
        **numbers,
    )


def sample(logits: Array, rows: SamplingRows, seen: Array, positions: Array, counts: Array | None = None) -> Array:
    """The next token of each row.

    Args:
        logits: float32 [B, V].
        rows: the settings of the rows.
        seen: bool [B, V], the tokens in a row's prompt and text so far.
        positions: int32 [B], where the new token will stand. Row b draws with `fold_in(key[b], positions[b])`, so
            that its text does not depend on its neighbours.
        counts: int32 [B, V], how often each token was made; None where nobody has asked for OpenAI's penalties.

    Returns:
        int32 [B].
    """
    logits = penalize(logits, rows, seen)
    if counts is not None:
        logits = penalize_made(logits, rows, counts)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        warm = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        filtered = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
        kept = jax.lax.cond(jnp.any(filtered), lambda: keep(warm, rows), lambda: warm)
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.key), positions)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, drawn, likeliest)

    return jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: likeliest)


def penalize(logits: Array, rows: SamplingRows, seen: Array) -> Array:
    """Repetition penalty (CTRL, arXiv:1909.05858, section 4.1).

    Args:
        logits: float32 [B, V].
        rows: the settings of the rows.
        seen: bool [B, V], the tokens that are penalized.

    Returns:
        float32 [B, V].
    """
    penalty = rows.repetition_penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_made(logits: Array, rows: SamplingRows, counts: Array) -> Array:
    """OpenAI's presence and frequency penalties and logit_bias, as its API reference gives them.

    Args:
        logits: float32 [B, V].
        rows: the settings of the rows.
        counts: int32 [B, V], how often each token was made.

    Returns:
        float32 [B, V].
    """

    def apply() -> Array:
        taken = rows.presence_penalty[:, None] * (counts > 0) + rows.frequency_penalty[:, None] * counts
        return (logits - taken).at[jnp.arange(len(logits))[:, None], rows.bias_ids].add(rows.bias, mode="drop")

    wanted = (rows.presence_penalty != 0) | (rows.frequency_penalty != 0) | jnp.any(rows.bias != 0, axis=1)
    return jax.lax.cond(jnp.any(wanted), apply, lambda: logits)


def keep(logits: Array, rows: SamplingRows) -> Array:
    """Filters by top-k, top-p (nucleus sampling, arXiv:1904.09751, section 3.1) and min-p (arXiv:2407.01082).

    Tokens that tie with the last one kept are kept. The likeliest token always is.

    Args:
        logits: float32 [B, V], divided by the temperature.
        rows: the settings of the rows.

    Returns:
        float32 [B, V], minus infinity for the tokens left out.
    """
    vocab = logits.shape[-1]
    count = jnp.where(rows.top_k > 0, rows.top_k, vocab).astype(jnp.float32)
    # A token stays where fewer than k are likelier, and (Meta's rule) where the likelier sum to at most p.
    logits = _from_threshold(logits, lambda above: jnp.sum(above, axis=-1) < count)
    probabilities = jax.nn.softmax(logits, axis=-1)

    def within_top_p(above: Array) -> Array:
        return (jnp.sum(probabilities, axis=-1, where=above) <= rows.top_p) | (rows.top_p >= 1)

    logits = _from_threshold(logits, within_top_p)
    floor = jnp.max(logits, axis=-1) + jnp.log(rows.min_p)
    return jnp.where(logits < floor[:, None], -jnp.inf, logits)


def _from_threshold(logits: Array, fits) -> Array:
    """Keeps the logits at or above the lowest threshold t of each row for which `fits(logits > t)` holds.

    `fits` maps bool [B, V] to bool [B], and holds for every threshold above one for which it holds.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats they stand for

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        ok = fits(order > middle[:, None])
        return jnp.where(ok, low, middle + 1), jnp.where(ok, middle, high)

    highest = jnp.max(order, axis=-1)
    _, threshold = jax.lax.fori_loop(0, 32, halve, (jnp.full_like(highest, jnp.iinfo(jnp.int32).min), highest))
    return jnp.where(order < threshold[:, None], -jnp.inf, logits)
