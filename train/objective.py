"""What a run minimizes: the loss of a batch, through the model and the pieces that its config names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from convert.source import find_source
from model import lora
from model.config import LlamaConfig
from model.cudnn import Attend
from model.errors import PunaError
from model.fp8 import in_fp8
from model.llama import SPLIT_SEQUENCE, block_of, head_of, hidden
from model.params import Params
from model.pieces import checked, load_function
from train.attention import attend_of, laid_out, make_attend
from train.data.encode import IGNORE_INDEX
from train.distill import DistillConfig, slopes_of
from train.loss import make_loss, make_token_losses
from train.preference import PreferenceConfig, by_segment, dpo, most_segments, orpo, pairs_of
from train.sections import Config

Batch = Mapping[str, Array]
Forward = Callable[[Params, Batch], Array]
Part = tuple[Array, Mapping[str, Array]]
BATCH_KEYS = ("tokens", "labels", "segments")


@dataclass(frozen=True)
class Objective:
    """What a step minimizes: a mean over a whole batch, of which each microbatch gives its part of the sum.

    Attributes:
        loss: of (params, rows, batch, teacher): the sum over `rows`, a microbatch of `batch`, float32; and what else is
            summed over them, by the name of its metric. `teacher` is the parameters of [distill]'s model, or None.
        units: of what these are sums: how many there are in a batch, int32.
    """

    loss: Callable[..., Part]
    units: Callable[[Batch], Array]


def make_objective(config: Config, model: LlamaConfig, mesh: Mesh, row_segments: int | None = None) -> Objective:
    """What a step minimizes: the model's losses on a batch, summed over its trained tokens, or over its preferences.

    Args:
        config: how to compute: attention, remat, dtype, loss.
        model: what to compute, with the pieces that replace parts of it.
        mesh: where.
        row_segments: how many segments a packed row has at most, padding left out; None where that is not known.

    Returns:
        The objective, of batches that have BATCH_KEYS, int32 [B, T] each; and "reference", float32 [B, S], where
        preferences are compared with a reference that was computed before.

    Raises:
        PunaError: cuDNN attention on other devices than GPUs, a block that does not take what is set, or a function
            that the config names and that is not there.
    """
    forward = make_forward(config, model, mesh, row_segments)
    if config.preference is not None:
        return _of_preferences(config, config.preference, model, mesh, forward)
    if config.distill is not None:
        return _of_teacher(config, config.distill, model, mesh, forward, row_segments)
    if (name := config.model.loss) is not None:
        call = "loss(x [B, T, D], head [D, V], labels [B, T]) -> the float32 sum over trained tokens"
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        own = load_function(name, "model.loss")
        sum_of = checked(own, name, "model.loss", call, lambda x, head, labels: scalar)
    else:
        sum_of = make_loss(mesh, config.model.loss_chunk, config.optim.z_loss)

    def loss(params: Params, rows: Batch, batch: Batch, teacher: Params | None = None) -> Part:
        rows = laid_out(rows, mesh)
        x = forward(params, rows)
        with jax.named_scope("loss"):
            return sum_of(x, head_of(params, model), rows["labels"]), {}

    return Objective(loss, _trained_tokens)


def _trained_tokens(batch: Batch) -> Array:
    return jnp.sum(batch["labels"] != IGNORE_INDEX)


def make_forward(config: Config, model: LlamaConfig, mesh: Mesh, row_segments: int | None = None) -> Forward:
    """The function from parameters and rows, as `laid_out` gives them, to what the head multiplies, [B, T, D]. See
    `make_objective`."""
    wanted, own_attend = config.model, make_attend(config, model, mesh, row_segments)
    make_block(config, model, mesh)  # refuses at once what does not fit

    def forward(params: Params, rows: Batch) -> Array:
        attend = None if own_attend is None else own_attend(rows["segments"])
        x, _ = hidden(
            as_computed(config, params),
            rows["tokens"],
            model,
            positions=rows.get("positions"),
            segments=rows["segments"],  # without positions these follow from them: they restart at each segment
            dtype=wanted.dtype,
            block=make_block(config, model, mesh, attend),
            remat=wanted.remat,
        )
        return x

    return forward


def as_computed(config: Config, params: Params) -> Params:
    """Parameters whose products are computed as model.matmul says."""
    return in_fp8(params) if config.model.matmul == "fp8" else params


def make_block(config: Config, model: LlamaConfig, mesh: Mesh, attend: Attend | None = None) -> Callable[..., Any]:
    """The decoder layer as the config wants it computed. See `make_objective`.

    Args:
        config: the run's.
        model: its shape.
        mesh: its devices.
        attend: the form of cuDNN's attention that the rows allow; None for the one that takes any.
    """
    keywords: dict[str, Any] = {}  # how the block computes, not what: no part of the model
    if (attend := attend or attend_of(config, model, mesh)) is not None:
        keywords["attend"] = attend
    if config.mesh.sequence_parallel:
        keywords["residual"] = SPLIT_SEQUENCE
    return block_of(model, **keywords)


# --- a teacher


def _of_teacher(
    config: Config, wanted: DistillConfig, model: LlamaConfig, mesh: Mesh, forward: Forward, row_segments: int | None
) -> Objective:
    source = find_source(wanted.teacher)
    shape = source.config
    if shape.vocab_size != model.vocab_size:
        raise PunaError(
            f"distill.teacher {wanted.teacher} has {shape.vocab_size} tokens and the model {model.vocab_size}: choose "
            "one with the same vocabulary"
        )
    if config.data.max_length > shape.max_position_embeddings:
        raise PunaError(
            f"data.max_length {config.data.max_length} is beyond the max_position_embeddings "
            f"{shape.max_position_embeddings} of distill.teacher {wanted.teacher}: shorten it"
        )
    shown = make_forward(config, shape, mesh, row_segments)
    sum_of = make_loss(mesh, config.model.loss_chunk, of=slopes_of(wanted))

    def loss(params: Params, rows: Batch, batch: Batch, teacher: Params | None = None) -> Part:
        assert teacher is not None
        rows = laid_out(rows, mesh)
        y = jax.lax.stop_gradient(shown(teacher, rows))
        x = forward(params, rows)
        with jax.named_scope("loss"):
            return sum_of(x, head_of(params, model), rows["labels"], (y, head_of(teacher, shape))), {}

    return Objective(loss, _trained_tokens)


# --- preferences


def reads_reference(config: Config) -> bool:
    """Whether batches bring the log-probabilities of a reference."""
    wanted = config.preference
    return wanted is not None and wanted.loss == "dpo" and wanted.precompute_ref_log_probs


def make_log_probs(config: Config, model: LlamaConfig, mesh: Mesh) -> Callable[[Params, Batch], Array]:
    """The log-probability that a model gives to the trained tokens of each segment.

    Returns:
        A function from (params, rows) to float32 [B, S], with as many segments as a row of `config` can hold.

    Raises:
        PunaError: see `make_objective`.
    """
    forward, losses = make_forward(config, model, mesh), make_token_losses(mesh, config.model.loss_chunk)
    count = most_segments(config.data.max_length, config.data.packing)

    def log_probs(params: Params, rows: Batch) -> Array:
        rows = laid_out(rows, mesh)
        x = forward(params, rows)
        with jax.named_scope("loss"):
            return -by_segment(losses(x, head_of(params, model), rows["labels"]), rows["segments"], count)

    return log_probs


def _of_preferences(
    config: Config, wanted: PreferenceConfig, model: LlamaConfig, mesh: Mesh, forward: Forward
) -> Objective:
    losses, log_probs = make_token_losses(mesh, config.model.loss_chunk), make_log_probs(config, model, mesh)
    count = most_segments(config.data.max_length, config.data.packing)

    def compare(params: Params, rows: Batch, batch: Batch, teacher: Params | None = None) -> Part:
        reference = rows.get("reference")
        if reference is None:
            reference = jax.lax.stop_gradient(log_probs(lora.bases(params), rows))
        return summed(*dpo(log_probs(params, rows), reference, wanted), rows)

    def compare_odds(params: Params, rows: Batch, batch: Batch, teacher: Params | None = None) -> Part:
        laid = laid_out({**rows, "learned": _chosen_targets(rows)}, mesh)
        x, labels, learned, segments = forward(params, laid), laid["labels"], laid["learned"], laid["segments"]
        is_answer = labels != IGNORE_INDEX
        with jax.named_scope("loss"):
            each = losses(x, head_of(params, model), jnp.where(learned == IGNORE_INDEX, labels, learned))
        sums = by_segment(jnp.where(is_answer, -each, 0), segments, count)
        total, known = summed(*orpo(sums, by_segment(is_answer, segments, count), wanted), rows)
        # a mean over tokens beside one over pairs: as a sum over pairs, by how many tokens there are for each
        tokens = jnp.sum(_chosen_targets(batch) != IGNORE_INDEX)
        entropy = jnp.sum(each, where=learned != IGNORE_INDEX) * pairs_of(batch["segments"]) / jnp.maximum(tokens, 1)
        return total + entropy, {**known, "nll_loss": entropy}

    def summed(each: Array, known: Mapping[str, Array], rows: Batch) -> Part:
        is_there = rows["segments"].max(axis=1, keepdims=True) >= 2 * jnp.arange(1, count // 2 + 1)
        return jnp.sum(each, where=is_there), {k: jnp.sum(value, where=is_there) for k, value in known.items()}

    return Objective(compare if wanted.loss == "dpo" else compare_odds, lambda batch: pairs_of(batch["segments"]))


def _chosen_targets(rows: Batch) -> Array:
    """What the model must say at each token of a chosen answer and of its prompt, int32 [B, T]; -100 elsewhere."""
    tokens, segments = rows["tokens"], rows["segments"]
    following = jnp.roll(segments, -1, axis=1).at[:, -1].set(0)
    goes_on = (segments % 2 == 1) & (following == segments)
    return jnp.where(goes_on, jnp.roll(tokens, -1, axis=1), IGNORE_INDEX)
