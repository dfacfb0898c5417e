"""What a run minimizes: the loss of a batch, through the model and the pieces that its config names."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from model import cpu
from model.attention import ATTENTIONS
from model.config import LlamaConfig
from model.errors import PunaError
from model.llama import SPLIT_SEQUENCE, block_of, head_of, hidden
from model.params import Params
from model.pieces import checked, load_function
from train.config import Config
from train.loss import make_loss

Batch = Mapping[str, Array]
BATCH_KEYS = ("tokens", "labels", "segments")


def make_objective(config: Config, model: LlamaConfig, mesh: Mesh) -> Callable[[Params, Batch], Array]:
    """What a step minimizes: the model's losses on a batch, summed.

    Args:
        config: how to compute: attention, remat, dtype, loss.
        model: what to compute, with the pieces that replace parts of it.
        mesh: where.

    Returns:
        `objective(params, batch)`, where `batch` has BATCH_KEYS, int32 [B, T] each -> float32, the sum over its trained
        tokens.

    Raises:
        PunaError: cuDNN attention on other devices than GPUs, a block that does not take what is set, or a function
            that the config names and that is not there.
    """
    wanted, platform = config.model, mesh.devices.flat[0].platform
    keywords: dict[str, Any] = {}  # how the block computes, not what: no part of the model
    if wanted.attention == "cudnn" and platform == cpu.PLATFORM:
        raise PunaError(f"model.attention 'cudnn' needs an NVIDIA GPU, not {platform}; choose 'xla'")
    if wanted.attention in ATTENTIONS and wanted.attention != "xla":
        keywords["attend"] = ATTENTIONS[wanted.attention]
    if config.mesh.sequence_parallel:
        keywords["residual"] = SPLIT_SEQUENCE
    block = block_of(model, **keywords)
    if wanted.loss:
        call = "loss(x [B, T, D], head [D, V], labels [B, T]) -> the float32 sum over trained tokens"
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        own = load_function(wanted.loss, "model.loss")
        loss = checked(own, wanted.loss, "model.loss", call, lambda x, head, labels: scalar)
    else:
        loss = make_loss(mesh, wanted.loss_chunk, config.optim.z_loss)

    def objective(params: Params, batch: Batch) -> Array:
        x, _ = hidden(
            params,
            batch["tokens"],
            model,
            segments=batch["segments"],  # positions follow from them: they restart at each segment
            dtype=wanted.dtype,
            block=block,
            remat=wanted.remat,
        )
        with jax.named_scope("loss"):
            return loss(x, head_of(params, model), batch["labels"])

    return objective
