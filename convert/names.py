"""One table from our parameters to other people's tensor names, and the account of every tensor, both ways.

Unstacked, our parameters are named `embed`, `layers.3.wq`, `final_norm`. Linear weights are `[in, out]` here and
`[out, in]` everywhere else; Meta's query and key rows are also in another order (`pairs_to_halves`).
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from convert.lazy import LazyTensor
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import param_specs

# our name: (Hugging Face's, Meta's), inside a layer and outside
_LAYER = {
    "attn_norm": ("input_layernorm.weight", "attention_norm.weight"),
    "wq": ("self_attn.q_proj.weight", "attention.wq.weight"),
    "wk": ("self_attn.k_proj.weight", "attention.wk.weight"),
    "wv": ("self_attn.v_proj.weight", "attention.wv.weight"),
    "wo": ("self_attn.o_proj.weight", "attention.wo.weight"),
    "mlp_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "w_gate": ("mlp.gate_proj.weight", "feed_forward.w1.weight"),
    "w_up": ("mlp.up_proj.weight", "feed_forward.w3.weight"),
    "w_down": ("mlp.down_proj.weight", "feed_forward.w2.weight"),
    "bq": ("self_attn.q_proj.bias", "attention.wq.bias"),
    "bk": ("self_attn.k_proj.bias", "attention.wk.bias"),
    "bv": ("self_attn.v_proj.bias", "attention.wv.bias"),
    "bo": ("self_attn.o_proj.bias", "attention.wo.bias"),
    "b_gate": ("mlp.gate_proj.bias", "feed_forward.w1.bias"),
    "b_up": ("mlp.up_proj.bias", "feed_forward.w3.bias"),
    "b_down": ("mlp.down_proj.bias", "feed_forward.w2.bias"),
}
_OUTER = {
    "embed": ("model.embed_tokens.weight", "tok_embeddings.weight"),
    "final_norm": ("model.norm.weight", "norm.weight"),
    "lm_head": ("lm_head.weight", "output.weight"),
}
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|^rope\.freqs$")  # computed from the config; some files carry them


class Parameter(NamedTuple):
    """One unstacked parameter: our name and shape, and its name in other formats, where linears lie transposed."""

    name: str
    shape: tuple[int, ...]
    hf: str
    meta: str
    is_transposed: bool

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.is_transposed else self.shape

    def swap_layout(self, tensor: LazyTensor) -> LazyTensor:
        """From a foreign layout to ours, or back."""
        return tensor.transposed() if self.is_transposed else tensor


def parameters(config: LlamaConfig) -> list[Parameter]:
    """Every parameter of the model in the order of a forward pass, layers unstacked."""
    specs = param_specs(config)
    layers = [
        Parameter(
            f"layers.{i}.{name}", spec.shape[1:], f"model.layers.{i}.{hf}", f"layers.{i}.{meta}", len(spec.shape) == 3
        )
        for i in range(config.num_hidden_layers)
        for name, spec in specs["layers"].items()
        for hf, meta in [_LAYER[name]]
    ]
    outer = {
        name: Parameter(name, specs[name].shape, *_OUTER[name], name == "lm_head") for name in _OUTER if name in specs
    }
    return [outer.pop("embed"), *layers, *outer.values()]


def our_name(hf: str) -> str | None:
    """Our name of the parameter that Hugging Face's files call `hf`, of whatever depth; None for no LLaMA's."""
    if match := re.fullmatch(r"model\.layers\.(0|[1-9]\d*)\.(.+)", hf):
        return next((f"layers.{match[1]}.{ours}" for ours, (name, _) in _LAYER.items() if name == match[2]), None)
    return next((ours for ours, (name, _) in _OUTER.items() if name == hf), None)


def hf_name(ours: str) -> str:
    """Hugging Face's name of our unstacked parameter."""
    if ours in _OUTER:
        return _OUTER[ours][0]
    _, number, key = ours.split(".")
    return f"model.layers.{number}.{_LAYER[key][0]}"


def is_buffer(name: str) -> bool:
    """Whether a foreign tensor is known to be computed, not trained, so that it may be left where it is."""
    return _BUFFERS.search(name) is not None


def pairs_to_halves(size: int, head_dim: int) -> np.ndarray:
    """For each row of a query or key weight in our order, the row of Meta's that holds it: Meta and llama.cpp rotate
    adjacent pairs of a head's entries, we its halves."""
    return np.arange(size).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def check_keys(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raises PunaError listing the tensors that `where` lacks or has too many, unless they are known buffers."""
    expected, found = set(expected), {name for name in found if not is_buffer(name)}
    complaints = [
        f"{verb} {_listed(names)}"
        for verb, names in (("lacks", expected - found), ("has unknown", found - expected))
        if names
    ]
    if complaints:
        raise PunaError(f"{where} {' and '.join(complaints)}: is it complete, and is the config its own?")


def check_shape(name: str, tensor: LazyTensor, shape: tuple[int, ...]) -> None:
    """Raises PunaError where the tensor is not of the shape that the config says."""
    if tensor.shape != shape:
        raise PunaError(f"{tensor.where}: {name} has shape {tensor.shape}; the config says {shape}")


def from_foreign(config: LlamaConfig, tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """Tensors under Hugging Face's names, all accounted for, under ours and in our layout."""
    table = parameters(config)
    check_keys((param.hf for param in table), tensors, where)
    for param in table:
        check_shape(param.hf, tensors[param.hf], param.foreign_shape)
    return {param.name: param.swap_layout(tensors[param.hf]) for param in table}


def _listed(names: set[str], most: int = 8) -> str:
    def numerically(name: str) -> list[int | str]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    ordered = sorted(names, key=numerically)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return f"{len(ordered)} tensor{'s' * (len(ordered) > 1)} ({', '.join(ordered[:most])}{more})"
