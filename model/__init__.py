"""What a LLaMA is: pure functions over trees of arrays."""

from model.cache import KVCache, init_cache
from model.capture import captured
from model.config import PRESETS, LlamaConfig, RopeScaling
from model.llama import forward, hidden, logits
from model.params import Params, abstract_params, init_params, param_count, stack, unstack
from model.sharding import make_mesh

__all__ = [
    "PRESETS",
    "KVCache",
    "LlamaConfig",
    "Params",
    "RopeScaling",
    "abstract_params",
    "captured",
    "forward",
    "hidden",
    "init_cache",
    "init_params",
    "logits",
    "make_mesh",
    "param_count",
    "stack",
    "unstack",
]
