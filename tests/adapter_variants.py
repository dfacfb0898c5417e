"""Adapters as peft can write them, each with what becomes of it here: peft's logits, or a refusal by name.

docs/conversion.md shows this table, and tests/test_adapter_variants.py tries every row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

QV = ["q_proj", "v_proj"]
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Tensors = dict[str, np.ndarray]


class Variant(NamedTuple):
    """One row.

    Attributes:
        config: arguments of peft's LoraConfig; targets are q_proj and v_proj where it names none.
        base: untied, tied, or biased (untied, with attention_bias and mlp_bias).
        rows: what the base is resized to before training; 0 for as it is.
        raw: what is then changed in adapter_config.json.
        edit: what is then changed in the tensors.
        refused: of what the message must speak, where Puna refuses it.
        unmergeable: the same, where only a merge is refused.
    """

    config: dict[str, Any] = {}
    base: str = "untied"
    rows: int = 0
    raw: dict[str, Any] = {}
    edit: Callable[[Tensors], Any] = lambda tensors: None
    refused: str = ""
    unmergeable: str = ""

    @property
    def outcome(self) -> str:
        """As docs/conversion.md says it."""
        if self.refused:
            return "refused"
        return "peft's logits; merging it is refused" if self.unmergeable else "peft's logits"


def renamed(old: str, new: str) -> Callable[[Tensors], Any]:
    """An edit: `old` in the tensors' names becomes `new`."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


def emptied(part: str) -> Callable[[Tensors], Any]:
    """An edit: tensors whose names hold `part` are as ZeRO-3 leaves them."""
    return lambda tensors: tensors.update({name: np.zeros(0, np.float32) for name in tensors if part in name})


def dropped(part: str) -> Callable[[Tensors], Any]:
    """An edit: tensors whose names hold `part` are lost."""
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


LAYERS = {"target_modules": ["q_proj", "up_proj"]}
VARIANTS: dict[str, Variant] = {
    # names
    "target_modules: ends of names": Variant(),
    "target_modules: longer ends": Variant({"target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]}),
    "target_modules: whole names": Variant({"target_modules": ["model.layers.1.self_attn.o_proj"]}),
    "target_modules: a regular expression": Variant({"target_modules": r".*\.layers\.[12]\.(self_attn|mlp)\.\w*_proj"}),
    "target_modules: all-linear": Variant({"target_modules": "all-linear"}),
    "target_modules: none said": Variant(raw={"target_modules": None}),
    "exclude_modules: ends of names": Variant(
        {"target_modules": "all-linear", "exclude_modules": ["v_proj", "0.mlp.up_proj"]}
    ),
    "exclude_modules: a regular expression": Variant({**LAYERS, "exclude_modules": r".*layers\.0\..*"}),
    "layers_to_transform: a list": Variant({**LAYERS, "layers_to_transform": [0, 2]}),
    "layers_to_transform: a number": Variant({**LAYERS, "layers_to_transform": 1}),
    "layers_pattern": Variant({**LAYERS, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "layers_pattern: a list of expressions": Variant(
        {**LAYERS, "layers_to_transform": [1], "layers_pattern": ["h", "model.l[aeiou]yers"]}
    ),
    "layers_to_transform beside lm_head": Variant(
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}
    ),
    "adapter name inside tensor names": Variant(edit=renamed("lora_A.weight", "lora_A.default.weight")),
    # ranks, scales, starts
    "use_rslora": Variant({"use_rslora": True}),
    "rank_pattern, alpha_pattern": Variant(
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 7},
            "alpha_pattern": {"v_proj": 3, "layers.2.mlp.gate_proj": 5},
        }
    ),
    "rank_pattern with use_rslora": Variant({"use_rslora": True, "rank_pattern": {"^model.layers.1.*v_proj": 6}}),
    "use_dora": Variant({"use_dora": True}),
    "use_dora with use_rslora and rank_pattern": Variant(
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}}
    ),
    "use_dora in some layers": Variant({"use_dora": True, "layers_to_transform": [1]}),
    "lora_dropout": Variant({"lora_dropout": 0.5}),
    "fan_in_fan_out, without effect": Variant({"fan_in_fan_out": True}),
    "init_lora_weights: gaussian": Variant({"init_lora_weights": "gaussian"}),
    "init_lora_weights: eva, with its eva_config": Variant({"init_lora_weights": "eva"}),
    "init_lora_weights: orthogonal": Variant({"init_lora_weights": "orthogonal"}),
    "init_lora_weights: mica": Variant({"init_lora_weights": "mica"}),
    "init_lora_weights: false": Variant({"init_lora_weights": False}),
    "sub-configs of another initialization": Variant(
        raw={"eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}}
    ),
    # the embedding and the head
    "LoRA on embed_tokens": Variant({"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on embed_tokens, tied": Variant({"target_modules": ["q_proj", "embed_tokens"]}, "tied"),
    "LoRA on embed_tokens, tied, resized": Variant({"target_modules": ["q_proj", "embed_tokens"]}, "tied", rows=101),
    "DoRA on embed_tokens": Variant({"target_modules": ["embed_tokens"], "use_dora": True}),
    "LoRA on lm_head": Variant({"target_modules": ["lm_head", "v_proj"]}),
    "LoRA on lm_head, tied": Variant({"target_modules": ["lm_head", "v_proj"]}, "tied"),
    "DoRA on lm_head": Variant({"target_modules": ["lm_head"], "use_dora": True, "use_rslora": True}),
    "LoRA on both": Variant(
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "alpha_pattern": {"lm_head": 3, "embed_tokens": 6}}
    ),
    "LoRA on both, tied": Variant(
        {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 3}}, "tied"
    ),
    "LoRA on both, resized": Variant({"target_modules": ["embed_tokens", "lm_head"]}, rows=101),
    "LoRA with ensure_weight_tying, tied": Variant(
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "tied"
    ),
    "LoRA with ensure_weight_tying, named by lm_head, tied": Variant(
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, "tied"
    ),
    "LoRA with ensure_weight_tying, untied": Variant({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    # rows
    "trainable_token_indices": Variant({"trainable_token_indices": [5, 7, 95]}),
    "trainable_token_indices, tied": Variant({"trainable_token_indices": [5, 7, 95]}, "tied"),
    "trainable_token_indices by name": Variant({"trainable_token_indices": {"embed_tokens": [0, 9]}}),
    "trainable_token_indices of lm_head": Variant({"trainable_token_indices": {"lm_head": [0, 9]}}),
    "trainable_token_indices of lm_head, tied": Variant({"trainable_token_indices": {"lm_head": [0, 9]}}, "tied"),
    "trainable_token_indices of both": Variant({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2, 4]}}),
    "trainable_token_indices of both, the same, tied": Variant(
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}}, "tied"
    ),
    "trainable_token_indices of both, others, tied": Variant(
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [6]}}, "tied"
    ),
    "trainable_token_indices, resized": Variant({"trainable_token_indices": [5, 100]}, rows=101),
    "trainable_token_indices, resized, tied": Variant({"trainable_token_indices": [5, 100]}, "tied", rows=101),
    "trainable_token_indices beside LoRA on lm_head": Variant(
        {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [5]}
    ),
    # biases
    "lora_bias": Variant({"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}),
    "lora_bias in some layers": Variant({"lora_bias": True, "layers_to_transform": [0, 2]}),
    "lora_bias on a base with biases": Variant({"lora_bias": True, "target_modules": "all-linear"}, "biased"),
    "lora_bias on lm_head": Variant({"lora_bias": True, "target_modules": ["lm_head"]}, unmergeable="bias to lm_head"),
    "bias: all, on a base without any": Variant({"bias": "all"}),
    "bias: all": Variant({"bias": "all"}, "biased"),
    "bias: lora_only": Variant({"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]}, "biased"),
    "bias: all, with lora_bias": Variant({"bias": "all", "lora_bias": True}, "biased"),
    "bias: all, with use_dora": Variant({"bias": "all", "use_dora": True}, "biased"),
    # whole modules
    "modules_to_save: embed_tokens": Variant({"modules_to_save": ["embed_tokens"]}),
    "modules_to_save: embed_tokens, tied": Variant({"modules_to_save": ["embed_tokens"]}, "tied"),
    "modules_to_save: model.embed_tokens, tied": Variant({"modules_to_save": ["model.embed_tokens"]}, "tied"),
    "modules_to_save: lm_head, tied": Variant({"modules_to_save": ["lm_head"]}, "tied"),
    "modules_to_save: the end of a name, tied": Variant({"modules_to_save": ["bed_tokens", "head"]}, "tied"),
    "modules_to_save: both": Variant({"modules_to_save": ["embed_tokens", "lm_head"]}),
    "modules_to_save: both, resized, tied": Variant({"modules_to_save": ["embed_tokens", "lm_head"]}, "tied", rows=101),
    "modules_to_save: embed_tokens, resized, tied": Variant({"modules_to_save": ["embed_tokens"]}, "tied", rows=101),
    "modules_to_save with ensure_weight_tying, tied": Variant(
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "tied"
    ),
    "modules_to_save: lm_head, with ensure_weight_tying, tied": Variant(
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "tied"
    ),
    "modules_to_save: norm": Variant({"modules_to_save": ["norm"]}),
    "modules_to_save: embed_tokens and norm, as LongLoRA": Variant(
        {"modules_to_save": ["embed_tokens", "norm"]}, "tied"
    ),
    "modules_to_save: mlp": Variant({"modules_to_save": ["mlp"]}),
    "modules_to_save: one linear map": Variant({"modules_to_save": ["layers.1.self_attn.k_proj"]}),
    "modules_to_save: linear maps with biases": Variant({"modules_to_save": ["k_proj"]}, "biased"),
    "a resized base, nothing else": Variant(rows=101),
    # what is refused
    "init_lora_weights: pissa": Variant(raw={"init_lora_weights": "pissa"}, refused="pissa.*merge_and_unload"),
    "init_lora_weights: olora": Variant(raw={"init_lora_weights": "olora"}, refused="olora.*merge_and_unload"),
    "init_lora_weights: corda": Variant(raw={"init_lora_weights": "corda"}, refused="corda.*merge_and_unload"),
    "init_lora_weights: loftq": Variant(raw={"init_lora_weights": "loftq"}, refused="loftq.*merge_and_unload"),
    "init_lora_weights: lora_ga": Variant(raw={"init_lora_weights": "lora_ga"}, refused="lora_ga.*merge_and_unload"),
    "init_lora_weights: a word unknown here": Variant(
        raw={"init_lora_weights": "new"}, refused="'new'.*merge_and_unload"
    ),
    "peft_type: IA3, ADALORA, ...": Variant(raw={"peft_type": "IA3"}, refused="IA3.*merge_and_unload"),
    "layer_replication": Variant(raw={"layer_replication": [[0, 2], [1, 3]]}, refused="layer_replication.*merge_and"),
    "target_parameters": Variant(raw={"target_parameters": ["mlp.x"]}, refused="target_parameters.*merge_and_unload"),
    "use_qalora": Variant(raw={"use_qalora": True}, refused="use_qalora.*merge_and_unload"),
    "alora_invocation_tokens": Variant(raw={"alora_invocation_tokens": [1, 2]}, refused="alora_invocation.*merge_and"),
    "use_bdlora, arrow_config, kasa_config, monteclora_config, velora_config, megatron_config": Variant(
        raw={"kasa_config": {"beta": 1.0}}, refused="kasa_config.*merge_and_unload"
    ),
    "trainable_token_indices beside LoRA on lm_head, tied": Variant(
        {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [5]},
        "tied",
        refused="trainable_token_indices beside another change of lm_head.*merge_and_unload",
    ),
    "trainable_token_indices of another module": Variant(
        raw={"trainable_token_indices": {"q_proj": [1]}}, refused="trainable_token_indices .*q_proj.*merge_and_unload"
    ),
    "trainable_token_indices beyond the vocabulary": Variant(
        {"trainable_token_indices": [5]}, raw={"trainable_token_indices": [96]}, refused="96 in a table of 96 rows"
    ),
    "trainable_token_indices without their rows": Variant(
        raw={"trainable_token_indices": [5]}, refused="names 1 rows of model.embed_tokens"
    ),
    "token rows without trainable_token_indices": Variant(
        {"trainable_token_indices": [5]}, raw={"trainable_token_indices": None}, refused="token rows of embed"
    ),
    "ZeRO-3's empty tensors": Variant(edit=emptied("lora"), refused="12 of 12 tensors are empty.*ZeRO-3"),
    "ZeRO-3's empty tensors, some": Variant(
        edit=emptied("1.self_attn.v_proj.lora_B"), refused="1 of 12 tensors.*ZeRO-3"
    ),
    "ZeRO-3's empty tensors of modules_to_save": Variant(
        {"modules_to_save": ["lm_head"]}, edit=emptied("lm_head"), refused="1 of 13 tensors are empty.*ZeRO-3"
    ),
    "biases that the base lacks": Variant(
        {"bias": "all", "target_modules": ["q_proj"]},
        edit=lambda t: t.update({A0.replace("q_proj.lora_A.weight", "o_proj.bias"): np.zeros(32, np.float32)}),
        refused="o_proj.bias, which this base lacks",
    ),
    "biases without lora_bias": Variant(
        {"lora_bias": True}, raw={"lora_bias": False}, refused="lora_bias and lora_B.bias"
    ),
    "a base weight that peft would not read": Variant(
        edit=lambda t: t.update({A0.replace("lora_A.weight", "weight"): np.zeros((32, 32), np.float32)}),
        refused="q_proj.weight belong to no part",
    ),
    "a module of modules_to_save that is not there": Variant(
        {"modules_to_save": ["norm"]}, edit=dropped("2.input_layernorm"), refused="lacks the .*layers.2.input_layernorm"
    ),
    "an adapter that the names leave out": Variant(raw={"target_modules": ["q_proj"]}, refused="adapter of .*v_proj"),
    "a lost module, with init_lora_weights: false": Variant(
        {"init_lora_weights": False}, edit=dropped("layers.1"), refused="layers.1.self_attn.q_proj.*fetch it again"
    ),
    "a vocabulary that only the embedding grew, untied": Variant(
        {"target_modules": ["q_proj", "embed_tokens"]}, rows=101, refused="only one of embed_tokens and lm_head"
    ),
    "tensors without peft's prefix, which peft passes over": Variant(
        edit=renamed("base_model.model.model.", "model."), refused="named as peft reads them: base_model.model."
    ),
    "tensors of a model without its head": Variant(
        edit=renamed("base_model.model.model.", "base_model.model."), refused="no part"
    ),
}
