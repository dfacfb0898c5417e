"""Which attention a run computes with: cuDNN's where it applies, and in the form that its rows allow; a ring where the
mesh splits the tokens of a row."""

from collections.abc import Callable, Mapping

from jax import Array
from jax.sharding import Mesh

from model import cpu
from model.attention import ATTENTIONS
from model.config import LlamaConfig
from model.cudnn import MOST_SEGMENTS, Attend, attend_cudnn, attend_for, form, is_nvidia, why_not
from model.errors import PunaError
from model.ring import make_ring, zigzag
from model.rope import positions_of
from model.sharding import constrain
from train.sections import Config

SPLIT = ("tokens", "labels", "segments", "positions", "learned")  # what batches hold of each token


def choose_attention(config: Config, model: LlamaConfig, mesh: Mesh) -> str:
    """Which of ours computes attention where no function of the model's does: "xla", "cudnn" or "ring".

    It is what model.attention says, or with "auto" what is fastest.

    Raises:
        PunaError: what is asked for does not apply.
    """
    wanted, device, count = config.model.attention, mesh.devices.flat[0], mesh.shape["context"]
    if wanted == "ring" and count == 1:
        raise PunaError("model.attention 'ring' is for rows that mesh.context splits, and it is 1: choose 'auto'")
    if wanted == "cudnn" and count > 1:
        raise PunaError(
            f"model.attention 'cudnn' needs whole rows, and mesh.context {count} splits them: choose 'auto' or 'ring'"
        )
    if wanted not in ("auto", "cudnn", "ring") or model.pieces.attention is not None:
        return "xla"
    if wanted == "auto" and model.pieces.block is not None:  # it may have no use for an attention that it is given
        return "xla"
    if count > 1:
        return "ring"
    if is_nvidia(device):
        if (reason := why_not(config.model.dtype, model.head_dim)) is None:
            return "cudnn"
    else:
        reason = f"needs an NVIDIA GPU, Ampere or newer, not {device.platform}"
    if wanted == "cudnn":
        raise PunaError(f"model.attention 'cudnn' {reason}; choose 'auto' or 'xla'")
    return "xla"


def describe_attention(config: Config, model: LlamaConfig, mesh: Mesh, row_segments: int | None) -> str | None:
    """What a run says of its attention; None on CPUs, and where the config names a function.

    Args:
        config: the run's.
        model: its shape.
        mesh: its devices.
        row_segments: as in `make_attend`.
    """
    if mesh.devices.flat[0].platform == cpu.PLATFORM or config.model.attention not in ATTENTIONS:
        return None
    if (chosen := choose_attention(config, model, mesh)) == "ring":
        return "attention: a ring of XLA's blocks over the context axis"
    if chosen == "xla":
        reason = why_not(config.model.dtype, model.head_dim)
        return "attention: XLA's" + (f"; cuDNN's {reason}" if reason else "")
    known = _known(config, row_segments)
    how = {
        "rows": "without a mask",
        "packed": f"by the lengths of up to {known} segments a row",
        "mask": f"with a mask in memory, for rows of preferences or of more than {MOST_SEGMENTS} segments",
    }
    return f"attention: cuDNN's, {how[form(known)]}"


def make_attend(
    config: Config, model: LlamaConfig, mesh: Mesh, row_segments: int | None = None
) -> Callable[[Array], Attend] | None:
    """What makes the attention of a batch from its segments, int32 [B, T]; None where it does not depend on them.

    Args:
        config: the run's.
        model: its shape.
        mesh: its devices.
        row_segments: how many segments a packed row has at most, padding left out; None where that is not known.

    Raises:
        PunaError: cuDNN is asked for and does not apply.
    """
    if choose_attention(config, model, mesh) != "cudnn":
        return None
    known = _known(config, row_segments)
    return lambda segments: attend_for(segments, known)


def attend_of(config: Config, model: LlamaConfig, mesh: Mesh) -> Attend | None:
    """The attention that takes any rows; None where it is the model's own. See `choose_attention`."""
    match choose_attention(config, model, mesh):
        case "cudnn":
            return attend_cudnn
        case "ring":
            return make_ring(mesh)
        case _:
            return None


def laid_out(rows: Mapping[str, Array], mesh: Mesh) -> Mapping[str, Array]:
    """Rows with their tokens in the order in which the model computes with them.

    Over a mesh that splits rows the tokens are put in zigzag, once, and get their positions, as "positions": neither
    the model nor the loss moves any. On any other mesh rows stay as they are.

    Args:
        rows: int32 [B, T] arrays by name; what is not of tokens stays.
        mesh: where they are computed with.
    """
    count = mesh.shape["context"]
    if count == 1:
        return rows
    each = {**rows, "positions": positions_of(rows["segments"])}
    return {k: constrain(zigzag(x, count), ("batch", "tokens")) if k in SPLIT else x for k, x in each.items()}


def _known(config: Config, row_segments: int | None) -> int | None:
    """How many segments a row has at most; None where that is not known, as of preferences."""
    if config.preference is not None:
        return None
    return row_segments if config.data.packing else 1
