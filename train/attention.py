"""Which attention a run computes with: cuDNN's where it applies, and in the form that its rows allow."""

from collections.abc import Callable

from jax import Array
from jax.sharding import Mesh

from model import cpu
from model.attention import ATTENTIONS
from model.config import LlamaConfig
from model.cudnn import MOST_SEGMENTS, Attend, attend_for, form, is_nvidia, why_not
from model.errors import PunaError
from train.config import Config


def choose_attention(config: Config, model: LlamaConfig, mesh: Mesh) -> str:
    """Which of ours computes attention where no function of the model's does: "xla" or "cudnn".

    It is what model.attention says, or with "auto" what is fastest.

    Raises:
        PunaError: cuDNN is asked for and does not apply.
    """
    wanted, device = config.model.attention, mesh.devices.flat[0]
    if wanted not in ("auto", "cudnn") or model.pieces.attention is not None:
        return "xla"
    if wanted == "auto" and model.pieces.block is not None:  # it may have no use for an attention that it is given
        return "xla"
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
    if choose_attention(config, model, mesh) == "xla":
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
    """What makes the attention of a batch from its segments, int32 [B, T]; None where it is the model's own.

    Args:
        config: the run's.
        model: its shape.
        mesh: its devices.
        row_segments: how many segments a packed row has at most, padding left out; None where that is not known.

    Raises:
        PunaError: cuDNN is asked for and does not apply.
    """
    if choose_attention(config, model, mesh) == "xla":
        return None
    known = _known(config, row_segments)
    return lambda segments: attend_for(segments, known)


def _known(config: Config, row_segments: int | None) -> int | None:
    """How many segments a row has at most; None where that is not known, as of preferences."""
    if config.preference is not None:
        return None
    return row_segments if config.data.packing else 1
