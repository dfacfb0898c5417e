"""Distillation (arXiv:1503.02531): a model learns what a teacher says of the next token, not only what came next."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from model.errors import PunaError
from train.data.encode import IGNORE_INDEX
from train.loss import Slopes, cross_entropy
from train.schema import PathText

OUT = -1e30  # the logit of a token that is left out: its probability is 0, and no difference of two is not a number


@dataclass(frozen=True)
class DistillConfig:
    """[distill]: trains on a teacher's distributions, beside the cross-entropy; the loss is a mean over trained tokens.

    Attributes:
        teacher: a model with the same vocabulary: a folder, a Hub id or a run.
        divergence: "forward" is KL(teacher || student), "reverse" KL(student || teacher). [GKD, arXiv:2306.13649]
        top_k: both distributions are over the teacher's likeliest tokens, so many of them; 0 is all. [TRL]
        temperature: logits of both are divided by it. [arXiv:1503.02531]
        alpha: the weight of the divergence; the rest, 1 - alpha, is the cross-entropy's.
    """

    teacher: PathText
    divergence: Literal["forward", "reverse"] = "forward"
    top_k: int = 0
    temperature: float = 1.0
    alpha: float = 1.0


def check(config: DistillConfig) -> None:
    """Raises PunaError for values that no run could use."""
    if not config.teacher:
        raise PunaError("distill.teacher is empty: name a model")
    if config.top_k < 0 or config.top_k == 1:
        raise PunaError(f"distill.top_k is {config.top_k}; give 2 tokens or more, or 0 for all")
    if config.temperature <= 0:
        raise PunaError(f"distill.temperature is {config.temperature}; it must be above 0")
    if not 0 < config.alpha <= 1:
        raise PunaError(f"distill.alpha is {config.alpha}; it must be above 0 and at most 1")


def slopes_of(config: DistillConfig) -> Slopes:
    """The loss of a token that `train.loss.make_loss` takes in place of the cross-entropy."""
    return partial(divergence, config=config)


def divergence(
    logits: Array, theirs: Array | None, target: Array, first: Array, config: DistillConfig
) -> tuple[Array, Array]:
    """The divergences of n tokens, and what the cross-entropy adds; arguments and results as of `cross_entropy`."""
    assert theirs is not None
    own, shown = logits / config.temperature, theirs / config.temperature
    if config.top_k:
        kept = shown >= _least(shown, config.top_k)
        own, shown = jnp.where(kept, own, OUT), jnp.where(kept, shown, OUT)
    log_p, log_q = _log_softmax(own), _log_softmax(shown)
    p, ratio = jnp.exp(log_p), log_p - log_q
    if config.divergence == "forward":
        q = jnp.exp(log_q)
        loss = jax.lax.psum(-(q * ratio).sum(axis=-1), "tensor")
        slope = p - q
    else:
        loss = jax.lax.psum((p * ratio).sum(axis=-1), "tensor")
        slope = p * (ratio - loss[:, None])
    trained = target != IGNORE_INDEX
    loss = config.alpha * jnp.where(trained, loss, 0.0)
    slope = config.alpha / config.temperature * jnp.where(trained[:, None], slope, 0.0)
    if config.alpha == 1:
        return loss, slope
    entropy, its_slope = cross_entropy(logits, None, target, first)
    return loss + (1 - config.alpha) * entropy, slope + (1 - config.alpha) * its_slope


def _log_softmax(logits: Array) -> Array:
    """Over a vocabulary that the axis `tensor` splits."""
    top = jax.lax.pmax(logits.max(axis=-1, keepdims=True), "tensor")
    return logits - top - jnp.log(jax.lax.psum(jnp.exp(logits - top).sum(axis=-1, keepdims=True), "tensor"))


def _least(logits: Array, count: int) -> Array:
    """The count-th largest logit of each token, [n, 1], of a vocabulary that the axis `tensor` splits."""
    here = jax.lax.top_k(logits, min(count, logits.shape[1]))[0]
    every = jax.lax.all_gather(here, "tensor", axis=1, tiled=True)
    return jax.lax.top_k(every, min(count, every.shape[1]))[0][:, -1:]
