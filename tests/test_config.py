"""Configurations: honoured or refused, in the spellings of transformers 4 and 5 and of Meta."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers import LlamaConfig as HFConfig

from model import PRESETS, LlamaConfig, RopeScaling, param_count
from model.errors import PunaError

# Total parameters as the model cards and papers count them, in billions.
PUBLISHED_BILLIONS = {
    "llama-7b": 6.738,
    "llama-13b": 13.016,
    "llama-33b": 32.529,
    "llama-65b": 65.286,
    "llama2-7b": 6.738,
    "llama2-13b": 13.016,
    "llama2-70b": 68.977,
    "codellama-34b": 33.744,
    "llama3-8b": 8.030,
    "llama3-70b": 70.554,
    "llama3.1-8b": 8.030,
    "llama3.1-405b": 405.853,
    "llama3.2-1b": 1.236,
    "llama3.2-3b": 3.213,
    "llama3.3-70b": 70.554,
}


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_preset_sizes_are_the_published_ones(name):
    assert round(param_count(PRESETS[name]) / 1e9, 3) == pytest.approx(PUBLISHED_BILLIONS[name], abs=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_hugging_face_and_meta(name):
    config = PRESETS[name]
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    if not config.tie_word_embeddings:
        meta = replace(config, eos_token_id=config.eos_token_id[:1])
        assert LlamaConfig.from_meta(json.loads(json.dumps(meta.to_meta()))) == meta


@pytest.mark.parametrize("name", ["llama-7b", "llama3.1-8b", "llama3.2-1b"])
def test_transformers_reads_what_we_write_and_we_what_it_writes(name, tmp_path):
    config = PRESETS[name]
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf("bfloat16")))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.head_dim == config.head_dim
    theirs.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in written  # the spelling of transformers 5
    assert LlamaConfig.from_hf(written) == config


def test_both_spellings_of_real_configs(data_dir):
    derived = data_dir / "stories260k-derived"
    v4 = json.loads((derived / "config.v4style.json").read_text())
    v5 = json.loads((derived / "hf_sharded" / "config.json").read_text())
    assert LlamaConfig.from_hf(v4) == LlamaConfig.from_hf(v5)
    meta = json.loads((derived / "meta_mp1" / "params.json").read_text())
    ours = replace(LlamaConfig.from_meta(meta), max_position_embeddings=512)  # params.json cannot say how long it is
    assert ours == LlamaConfig.from_hf(v5)
    third = json.loads((data_dir / "hf-config" / "llama-3.2-3b-instruct.config.json").read_text())
    config = LlamaConfig.from_hf(third)
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert config.eos_token_id == (128001, 128008, 128009)


def test_transformers_defaults_are_ours():
    written = HFConfig(hidden_size=64, num_attention_heads=4).to_dict()
    config = LlamaConfig.from_hf(written)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)


GOOD = PRESETS["llama-7b"].to_hf()

REFUSED = [
    ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
    ({"model_type": "mixtral", "num_local_experts": 8}, "model_type 'mixtral' is not supported"),
    ({"num_local_experts": 8}, "unknown active field num_local_experts = 8"),
    ({"sliding_window": 1024}, "unknown active field sliding_window = 1024"),
    ({"logit_scale": 0.5, "residual_multiplier": 2}, "logit_scale = 0.5, residual_multiplier = 2"),
    ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
    ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type 'su' is not supported"),
    ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "type and rope_type disagree"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor 0.5 is below 1"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast is not a setting"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs high_freq_factor, low_freq_factor"),
    ({"rope_scaling": {"factor": 8.0}}, "factor given, but rope_type is default"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"puna": {}}, "puna names no part of a model: remove it"),
    ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
    ({"hidden_size": 100, "head_dim": None}, "hidden_size 100 does not divide by num_attention_heads 32"),
    ({"head_dim": 33}, "head_dim 33 is odd"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive integer"),
    ({"vocab_size": "many"}, "vocab_size is 'many'; it must be a positive integer"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_is_not_honoured_is_refused_by_name(change, said):
    with pytest.raises(PunaError, match=said):
        LlamaConfig.from_hf(GOOD | change)


@given(st.dictionaries(st.text(min_size=1), st.sampled_from([None, False, 0, 0.0, "", (), {}])))
def test_unknown_inactive_fields_are_ignored(extra):
    extra = {k: list(v) if v == () else v for k, v in extra.items() if k not in GOOD and k not in REFUSED_NAMES}
    assert LlamaConfig.from_hf(GOOD | extra) == PRESETS["llama-7b"]


REFUSED_NAMES = {*LlamaConfig.__dataclass_fields__, "puna", "quantization_config", "is_causal", "partial_rotary_factor"}


@given(
    st.integers(1, 64).map(lambda n: 8 * n),
    st.integers(1, 4000),
)
def test_any_mlp_width_survives_metas_rule(dim, width):
    config = LlamaConfig(hidden_size=dim, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4)
    assert LlamaConfig.from_meta(config.to_meta()).intermediate_size == width


def test_meta_faults():
    meta = PRESETS["llama2-70b"].to_meta()
    assert LlamaConfig.from_meta({"model": meta | {"vocab_size": -1}}, vocab_size=32000) == PRESETS["llama2-70b"]
    with pytest.raises(PunaError, match="vocab_size is -1"):
        LlamaConfig.from_meta(meta | {"vocab_size": -1})
    with pytest.raises(PunaError, match="dim is missing"):
        LlamaConfig.from_meta({key: value for key, value in meta.items() if key != "dim"})
    with pytest.raises(PunaError, match="unknown active field moe_args"):
        LlamaConfig.from_meta(meta | {"moe_args": {"num_experts": 16}})
    for change in ({"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 64}):
        with pytest.raises(PunaError, match="cannot be written as Meta's params.json"):
            replace(PRESETS["llama-7b"], **change).to_meta()
    for scaling in (RopeScaling("linear", 2.0), RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)):
        with pytest.raises(PunaError, match="rope_scaling = "):
            replace(PRESETS["llama-7b"], rope_scaling=scaling).to_meta()


# (dim, layers, heads, multiplier) as in Meta's params.json, and the factor in the config.json of the same model.
STRETCHED = {
    "Llama 3.2 1B": (2048, 16, 32, 1.5, 32.0),
    "Llama 3.2 3B": (3072, 28, 24, 1.0, 32.0),
    "Llama 3.1 8B": (4096, 32, 32, 1.3, 8.0),
    "Llama 3.3 70B": (8192, 80, 64, 1.3, 8.0),
}


@pytest.mark.parametrize("name", STRETCHED)
def test_params_json_does_not_say_by_how_much_rope_is_stretched(name):
    dim, layers, heads, multiplier, factor = STRETCHED[name]
    params = {"dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": 8, "vocab_size": 128256}
    params |= {"ffn_dim_multiplier": multiplier, "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 500000.0}
    params |= {"use_scaled_rope": True}
    said = []
    config = LlamaConfig.from_meta(params, say=said.append)
    assert config.rope_scaling == RopeScaling("llama3", factor, 8192, 1.0, 4.0)
    assert said == [
        f"what it does not say is its family's: use_scaled_rope is by {factor:g}, max_seq_len is {2**17}",
    ]
    written = config.to_meta()
    assert written.keys() - params.keys() == {"max_seq_len"}  # no key that Meta's code would drop
    assert LlamaConfig.from_meta(written) == config
    own = LlamaConfig.from_meta(params | {"rope_scaling_factor": 16, "rope_high_freq_factor": 2}, say=said.append)
    assert own.rope_scaling == RopeScaling("llama3", 16.0, 8192, 1.0, 2.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_args", {"num_experts": 16}),
        ("moe", {"num_experts": 8}),
        ("quantization_args", {"group_size": 32}),
        ("lora_args", {"rank": 16}),
        ("sliding_window", 4096),
        ("head_dim", 64),
        ("vision_chunk_size", 448),
        ("use_qk_norm", True),
    ],
)
def test_a_key_of_params_json_that_acts_is_refused(key, value):
    with pytest.raises(PunaError, match=f"params.json: unknown active field {key} = "):
        LlamaConfig.from_meta(PRESETS["llama2-7b"].to_meta() | {key: value})


def test_other_keys_of_params_json():
    """Mistral's names for what Meta derives; room for a cache; what nobody knows."""
    said, meta = [], PRESETS["llama2-7b"].to_meta()
    mistral = {"hidden_dim": 14336, "head_dim": 128, "max_batch_size": 8, "vision_chunk_size": -0.0, "moe_args": None}
    config = LlamaConfig.from_meta(meta | mistral, say=said.append)
    assert config == replace(PRESETS["llama2-7b"], intermediate_size=14336) and not said
    assert LlamaConfig.from_meta(meta | {"note": "x"}, say=said.append) == PRESETS["llama2-7b"]
    assert said == ["unknown keys, not used: note"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"attention_bias": 0}, "attention_bias is 0; it must be true or false"),
        ({"mlp_bias": "no"}, "mlp_bias is 'no'; it must be true or false"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a positive number"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; it must be a positive number"),
        ({"rope_theta": True}, "rope_theta is True; it must be a positive number"),
        ({"initializer_range": "0.02"}, "initializer_range is '0.02'; it must be a number from 0 on"),
        ({"bos_token_id": "1"}, "bos_token_id is '1'; it must be a token's number"),
        ({"eos_token_id": [2, "3"]}, "eos_token_id is '3'; it must be a token's number"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token's number"),
    ],
)
def test_values_of_another_type_are_refused_as_transformers_does(change, said):
    own = PRESETS["llama-7b"].to_hf()
    with pytest.raises(PunaError, match=re.escape(said)):
        LlamaConfig.from_hf(own | change)
    if "token" not in next(iter(change)) and "rope_theta" not in change:  # which it looks at when RoPE is made
        with pytest.raises(Exception):  # noqa: B017
            HFConfig(**(own | change))
