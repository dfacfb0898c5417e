"""What preferences are trained with: DPO (arXiv:2305.18290) and ORPO (arXiv:2403.07691).

The losses are those of TRL. A pair is two segments that follow each other, the chosen answer's and the rejected one's,
so rows may hold several pairs, and batches are cut and sharded as any others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from model.errors import PunaError


@dataclass(frozen=True)
class PreferenceConfig:
    """[preference]: trains on pairs of a chosen and a rejected answer; the loss is a mean over pairs.

    Attributes:
        loss: "dpo" compares with a reference, the model that the run starts from; "orpo" needs none, and learns the
            chosen texts beside. [DPO, arXiv:2305.18290; ORPO, arXiv:2403.07691]
        beta: with dpo, how much a difference from the reference weighs; with orpo, the weight of the odds ratio beside
            the cross-entropy. [TRL]
        label_smoothing: with dpo, the part of the preferences that is taken to be wrong. [cDPO, arXiv:2305.18290]
        precompute_ref_log_probs: with dpo, the reference's log-probabilities are computed once and kept in
            data.cache_dir; false, under [lora], computes them at every step with the base under the adapters. [TRL]
    """

    loss: Literal["dpo", "orpo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    precompute_ref_log_probs: bool = True


def check(config: PreferenceConfig) -> None:
    """Raises PunaError for values that no run could use."""
    if config.beta <= 0:
        raise PunaError(f"preference.beta is {config.beta}; it must be above 0")
    if not 0 <= config.label_smoothing < 0.5:
        raise PunaError(f"preference.label_smoothing is {config.label_smoothing}; it must be at least 0 and below 0.5")


def most_segments(max_length: int, packing: bool) -> int:
    """The most segments that a row of preferences holds: none is shorter than two tokens."""
    return 2 * max(1, max_length // 4) if packing else 2


def by_segment(values: Array, segments: Array, count: int) -> Array:
    """The sum of each segment's values.

    Args:
        values: [B, T].
        segments: int32 [B, T], from 1; 0 is padding.
        count: the most segments of a row, S.

    Returns:
        [B, S].
    """
    is_of = segments[:, :, None] == jnp.arange(1, count + 1)
    return jnp.sum(jnp.where(is_of, values[:, :, None], 0), axis=1)


def pairs_of(segments: Array) -> Array:
    """How many pairs rows of segments int32 [B, T] hold: int32 []."""
    return jnp.sum(segments.max(axis=1) // 2)


def dpo(sums: Array, reference: Array, config: PreferenceConfig) -> tuple[Array, Mapping[str, Array]]:
    """The losses of pairs by how much more likely than under the reference the chosen answer is, and the rejected one.

    Args:
        sums: float32 [B, S], the log-probability of each answer; the chosen ones at even places.
        reference: the same under the reference.
        config: the settings.

    Returns:
        The losses [B, S / 2], and what else is known of each pair, by name. Numbers of pairs that are not there mean
        nothing.
    """
    reward = config.beta * (sums - reference)
    margin = reward[:, ::2] - reward[:, 1::2]
    smoothing = config.label_smoothing
    loss = -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
    return loss, rewards(reward)


def orpo(sums: Array, counts: Array, config: PreferenceConfig) -> tuple[Array, Mapping[str, Array]]:
    """The losses of pairs by the ratio of the odds of both answers, of which each counts as its mean token does.

    Args:
        sums: float32 [B, S], the log-probability of each answer; the chosen ones at even places.
        counts: [B, S], the tokens of each.
        config: the settings.

    Returns:
        As `dpo`; the cross-entropy of the chosen texts is still to be added.
    """
    mean = sums / jnp.maximum(counts, 1)
    mean = jnp.where(counts > 0, mean, -1.0)  # of an answer that is not there, so that its odds are finite
    odds = mean - jnp.log(-jnp.expm1(mean))
    loss = -config.beta * jax.nn.log_sigmoid(odds[:, ::2] - odds[:, 1::2])
    return loss, rewards(config.beta * mean)


def rewards(reward: Array) -> Mapping[str, Array]:
    """What is said of pairs, [B, S / 2] each, by the reward of each answer [B, S]."""
    chosen, rejected = reward[:, ::2], reward[:, 1::2]
    return {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": (chosen > rejected).astype(jnp.float32),
    }
