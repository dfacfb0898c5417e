"""What the tests hold the model against: transformers' LLaMA, and its weights as our tree, by a mapping of its own."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from model.config import LlamaConfig

_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "bo": "self_attn.o_proj.bias",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
    "b_gate": "mlp.gate_proj.bias",
    "b_up": "mlp.up_proj.bias",
    "b_down": "mlp.down_proj.bias",
}


def hf_config(**changes: Any) -> HFConfig:
    """A small LLaMA of transformers, four layers' worth of everything that can differ."""
    defaults = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
    }
    return HFConfig(**(defaults | changes))


def hf_model(config: HFConfig, seed: int = 0) -> LlamaForCausalLM:
    """Random float32 weights, larger than the usual start so that every weight shows in the logits."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            offset = 1.0 if "norm" in name else 0.0
            weight.copy_(torch.randn_like(weight) * 0.15 + offset)
    return model


def params_of(model: LlamaForCausalLM) -> dict[str, Any]:
    """Our stacked tree of a transformers model's weights."""
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    layers = {}
    for ours, theirs in _LAYER.items():
        rows = [state.get(f"model.layers.{i}.{theirs}") for i in range(model.config.num_hidden_layers)]
        if all(row is not None for row in rows):
            layers[ours] = jnp.asarray(np.stack([np.asarray(row).T for row in rows]))
    params = {
        "embed": jnp.asarray(state["model.embed_tokens.weight"]),
        "layers": layers,
        "final_norm": jnp.asarray(state["model.norm.weight"]),
    }
    if not model.config.tie_word_embeddings:
        params["lm_head"] = jnp.asarray(state["lm_head.weight"].T)
    return params


def config_of(model: LlamaForCausalLM) -> LlamaConfig:
    """Our configuration, read from what transformers would write."""
    return LlamaConfig.from_hf(model.config.to_dict())


def hf_logits(model: LlamaForCausalLM, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """Float32 logits [B, T, V] of one full pass."""
    where = None if positions is None else torch.tensor(positions)
    with torch.no_grad():
        out = model(torch.tensor(tokens), position_ids=where, use_cache=False)
    return out.logits.float().numpy()
