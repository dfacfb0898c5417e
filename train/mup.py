"""muP: a model of any width trains best at the learning rate of a narrow one (Tensor Programs V, arXiv:2203.03466).

Width is counted from a base model, which is as ever. Table 8 of the paper says, for Adam, with r = base width / width:

|                       | embedding, norms, biases | matrices of layers | head |
|-----------------------|--------------------------|--------------------|------|
| variance when fresh   | of the base              | r, of the base     | of the base |
| factor in the forward | 1                        | 1                  | r    |
| learning rate         | 1                        | r                  | 1    |

and that scores are divided by the width of a head, not by its root. No factor stays in the forward pass here: to Adam a
weight with a factor is the weight that has it inside, whose fresh numbers and whose updates are that many times as
large (the paper's appendix J.2.1). So the model is a plain LLaMA at every step, and its export is one. Weight decay
is not scaled: it shrinks a weight by the same part at every width.
"""

import math
from typing import Any, Protocol

import jax

from model.config import LlamaConfig
from model.errors import PunaError
from model.params import LINEARS, Params, ParamSpec, map_specs


class Wanted(Protocol):
    """What [model] says of muP."""

    @property
    def parametrization(self) -> str: ...
    @property
    def mup_base_hidden_size(self) -> int: ...
    @property
    def mup_base_head_dim(self) -> int | None: ...


def check(model: Wanted, optimizer: str, is_adapted: bool) -> None:
    """Raises PunaError where [model] asks for muP in a run that it says nothing of."""
    if model.parametrization != "mup":
        return
    if optimizer != "adamw":
        raise PunaError(
            f"optim.optimizer is {optimizer!r}, and model.parametrization 'mup' is for 'adamw': leave one of them out"
        )
    if is_adapted:
        raise PunaError("model.parametrization 'mup' is for whole models, and [lora] trains adapters: leave one out")


def factors(wanted: Wanted, model: LlamaConfig) -> dict[str, tuple[float, float]] | None:
    """What fresh weights and their updates are multiplied by, by the weight's name; others by 1.

    Returns:
        Two numbers for each name, as "wq"; None without muP.

    Raises:
        PunaError: the head is the embedding, which would need two widths at once.
    """
    if wanted.parametrization != "mup":
        return None
    if model.tie_word_embeddings:
        raise PunaError(
            "model.parametrization 'mup' scales the head and not the embedding, and here they are one: set "
            "model.tie_word_embeddings = false"
        )
    ratio = wanted.mup_base_hidden_size / model.hidden_size
    heads = math.sqrt((wanted.mup_base_head_dim or model.head_dim) / model.head_dim)
    found = {name: (math.sqrt(ratio), ratio) for name in LINEARS}
    found["wq"] = (heads * math.sqrt(ratio), heads * ratio)
    return found | {"bq": (1.0, heads), "lm_head": (ratio, ratio)}


def scaled_start(wanted: Wanted, model: LlamaConfig, params: Params) -> Params:
    """Fresh parameters as the parametrization has them; they are donated.

    Args:
        wanted: the run's [model].
        model: the config of `params`.
        params: as `init_params` gives them.
    """
    if (scales := _tree(wanted, model, 0)) is None:
        return params
    scale = jax.jit(
        lambda tree: jax.tree.map(lambda x, by: (x * by).astype(x.dtype), tree, scales),
        out_shardings=jax.tree.map(lambda x: x.sharding, params),
        donate_argnums=0,
    )
    return scale(params)


def update_scales(wanted: Wanted, model: LlamaConfig) -> Params | None:
    """What the update of each weight is multiplied by, before weight decay; None for 1 everywhere."""
    return _tree(wanted, model, 1)


def _tree(wanted: Wanted, model: LlamaConfig, which: int) -> Any:
    known = factors(wanted, model)

    def one(name: str, spec: ParamSpec) -> float:
        assert known is not None
        return known.get(name.removeprefix("layers/"), (1.0, 1.0))[which]

    return None if known is None else map_specs(one, model)
