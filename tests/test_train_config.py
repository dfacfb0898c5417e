"""Settings: everything that is wrong is named at once, with the nearest known; what is written reads back the same."""

import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax
import pytest

from model.config import PRESETS
from model.errors import PunaError
from model.pieces import Pieces, load_function
from model.tokenizer import load_tokenizer
from train.config import load_config, read_config, refuse_changes
from train.data.toy import write_tokenizer
from train.objective import make_objective
from train.schema import dump
from train.sections import Config
from train.start import mesh_of, model_of, tokenizer_of

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
MINIMAL = {"model": {"preset": "llama2-7b"}, "data": {"path": "x.jsonl", "max_length": 64}}


def read(**sections) -> Config:
    return read_config(MINIMAL | sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optm": {}}, "optm is not a setting; did you mean optim?"),
        ({"run": {"max_step": 1}}, "run.max_step is not a setting; did you mean run.max_steps?"),
        ({"run": {"learning_rate": 1.0}}, "run.learning_rate is not a setting; did you mean optim.learning_rate?"),
        ({"data": {"path": [{"path": "a", "wieght": 1}]}}, "data.path[0].wieght is not a setting; did you mean"),
        ({"lora": {"targets": ["q_prj"]}}, "lora targets ['q_prj']: choose from q_proj"),
        ({"lora": {"modules_to_save": ["norm"]}}, "lora modules_to_save: norm; choose from embed_tokens, lm_head"),
        ({"lora": {"alpha": 0.0}}, "lora.alpha is 0.0; it must be above 0"),
        ({"lora": {"alpha_pattern": {"q_proj": float("nan")}}}, "lora.alpha_pattern 'q_proj' is nan; it must be"),
        ({"lora": {"rank_pattern": {"q_proj": 0}}}, "lora.rank_pattern 'q_proj' is 0; it must be above 0"),
        ({"run": {"batch_size": 8.0}}, "run.batch_size is 8.0; it must be an integer"),
        ({"run": {"batch_size": True}}, "run.batch_size is true; it must be an integer"),
        ({"model": {"preset": 7}}, "model.preset is 7; it must be a string"),
        ({"data": {"path": "a", "packing": "yes"}}, 'data.packing is "yes"; it must be true or false'),
        (
            {"optim": {"optimizer": "adam"}},
            "optim.optimizer 'adam' is not known; choose adamw, muon, adafactor, or write \"module:function\"",
        ),
        ({"run": {"report_to": ["wandbb"]}}, 'run.report_to[0] is "wandbb"; it must be one of'),
        ({"lora": {"rank_pattern": {"q_proj": "8"}}}, 'lora.rank_pattern.q_proj is "8"; it must be an integer'),
        ({"optim": {"learning_rate": 0}}, "optim.learning_rate is 0.0; it must be above 0"),
        ({"optim": {"warmup_ratio": 3}}, "optim.warmup_ratio is 3.0; it must be between 0 and 1"),
        ({"run": {"save_steps": -1}}, "run.save_steps is -1; it must be 0 or above"),
        ({"lora": {"rank": 0}}, "lora.rank is 0; it must be above 0"),
        ({"run": {"gradient_accumulation_steps": 3}}, "run.batch_size 8 does not divide into"),
        ({"model": {"preset": "llama-7b", "path": "x"}}, "model.path and model.preset are both given"),
        ({"quantize": {}}, "quantize is given without lora"),
        ({"data": {}}, "data.path is missing"),
        ({"mesh": 3}, "mesh is 3; it must be a table"),
        ({"run": {"seed": -1}}, "run.seed is -1; it must be between 0 and 4294967295"),
        ({"run": {"keep_every": -1}}, "run.keep_every is -1; it must be 0 or above"),
        ({"optim": {"adam_beta2": 1.0}}, "optim.adam_beta2 is 1.0; it must be at least 0 and below 1"),
        ({"optim": {"adam_epsilon": 0.0}}, "optim.adam_epsilon is 0.0; it must be above 0"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate is nan; it must be a finite number"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout is 1.0; it must be at least 0 and below 1"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(sections, said):
    with pytest.raises(PunaError) as error:
        read(**sections)
    assert said in str(error.value)


def test_all_are_named_at_once():
    with pytest.raises(PunaError) as error:
        read(run={"max_step": 1, "seed": "x"}, optm={})
    assert all(name in str(error.value) for name in ("run.max_step ", "run.seed ", "optm "))


def test_overrides_are_toml_or_text(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[model]\npreset = "llama-7b"\n[data]\npath = "x"\n')
    config = load_config(
        path,
        [
            "model.preset=llama2-7b",
            "run.output_dir=runs/a b",
            "optim.learning_rate=1e-3",
            'data.path=[{path = "b", weight = 2}]',
            "lora.rank=4",
        ],
    )
    assert (config.model.preset, config.run.output_dir, config.optim.learning_rate) == ("llama2-7b", "runs/a b", 1e-3)
    assert config.lora and config.lora.rank == 4
    assert not isinstance(config.data.path, str) and getattr(config.data.path[0], "weight", None) == 2.0
    for wrong in ("max_steps=3", "run.max_steps", "=3"):
        with pytest.raises(PunaError, match="is not an override"):
            load_config(path, [wrong])
    path.write_text("[model\n")
    with pytest.raises(PunaError, match="c.toml: not TOML"):
        load_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_reads_back(path):
    config = load_config(path)
    assert read_config(tomllib.loads(dump(config))) == config
    head = path.read_text().split("\n\n")[0]
    assert all(word in head for word in ("python -m train run", "hardware:", "expected:"))


def test_the_model_comes_from_preset_or_dims():
    assert model_of(read()).hidden_size == 4096
    longer = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "max_position_embeddings": 8192}
    model = model_of(read(model={"preset": "llama2-7b", **longer}))
    assert model.rope_scaling and model.rope_scaling.factor == 2.0 and model.max_position_embeddings == 8192
    for sections, said in (
        ({"model": {"preset": "llama-8b"}}, "model.preset 'llama-8b' is not known"),
        ({"model": {}}, "model is empty"),
        ({"data": {"path": "x", "max_length": 5000}}, "data.max_length 5000 is beyond"),
    ):
        with pytest.raises(PunaError, match=said):
            model_of(read(**sections))


def test_a_preset_takes_the_special_tokens_of_its_tokenizer_and_its_own_context(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    wanted = {"preset": "llama3.2-1b", "vocab_size": 512, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    model = model_of(read(model=wanted), tokenizer)
    assert (model.bos_token_id, model.eos_token_id) == (tokenizer.bos_id, (tokenizer.eos_id,))
    assert (model.vocab_size, model.pad_token_id) == (512, tokenizer.pad_id)
    assert model.rope_scaling.original_max_position_embeddings == PRESETS["llama3.2-1b"].max_position_embeddings
    assert model_of(read(model={"preset": "llama3.2-1b"})) == PRESETS["llama3.2-1b"]
    stops = PRESETS["llama3.2-1b"].eos_token_id
    one_of_three: Any = SimpleNamespace(bos_id=None, eos_id=stops[0], pad_id=None, vocab_size=512)
    model = model_of(read(model={"preset": "llama3.2-1b"}), one_of_three)
    assert model.eos_token_id == stops
    assert model.bos_token_id == PRESETS["llama3.2-1b"].bos_token_id


@pytest.mark.parametrize("name", ["alpaca-7b", "vicuna-7b", "wizardlm-7b", "llama3-70b"])
def test_the_tokenizer_of_a_hub_id_comes_without_weights(name, tmp_path, monkeypatch):
    config = load_config(ROOT / "configs" / f"{name}.toml")
    write_tokenizer(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert tokenizer_of(config).vocab_size == load_tokenizer(tmp_path).vocab_size
    ((hub_id,), keywords) = asked[0]
    assert hub_id == (config.model.tokenizer or config.model.path)
    assert keywords["allow_patterns"] == ["*.json", "*.model", "*.jinja"]


def test_a_block_without_the_keyword_of_a_setting_is_refused(monkeypatch):
    config = read(model={"preset": "llama2-7b", "block": "a:b"}, mesh={"sequence_parallel": True, "tensor": 2})
    monkeypatch.setattr("model.llama.load_function", lambda name, setting: lambda *arguments, **any_of_them: None)
    model = replace(PRESETS["llama2-7b"], pieces=Pieces(block="a:b"))
    assert make_objective(config, model, mesh_of(config))
    monkeypatch.setattr("model.llama.load_function", lambda name, setting: lambda x, layer, config, context, cache: x)
    with pytest.raises(PunaError, match=r"block a:b has no keyword residual \(mesh.sequence_parallel\)"):
        make_objective(config, model, mesh_of(config))


def test_cudnn_attention_is_refused_on_other_devices():
    config = read(model={"preset": "llama2-7b", "attention": "cudnn"})
    with pytest.raises(
        PunaError, match="model.attention 'cudnn' needs an NVIDIA GPU, Ampere or newer, not cpu; choose 'auto' or 'xla'"
    ):
        make_objective(config, PRESETS["llama2-7b"], mesh_of(config))


def test_a_config_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe[run]")
    with pytest.raises(PunaError, match=r"c.toml: not TOML: 'utf-8' codec"):
        load_config(tmp_path / "c.toml")


def test_a_mesh_that_does_not_fit_is_refused():
    assert dict(mesh_of(read()).shape) == {"data": 1, "fsdp": jax.device_count(), "context": 1, "tensor": 1}
    with pytest.raises(PunaError, match="mesh data=3"):
        mesh_of(read(mesh={"data": 3}))


def test_what_may_change_when_a_run_resumes():
    free = {"max_steps": 9, "save_steps": 7, "save_minutes": 1, "logging_steps": 2, "gradient_accumulation_steps": 2}
    refuse_changes(read(), read(run=free, mesh={"tensor": 2}))
    with pytest.raises(PunaError, match=r"run.seed was 0 and is 1; lora.rank was None and is 8"):
        refuse_changes(read(), read(run={"seed": 1}, lora={}))


def test_functions_are_found_by_name():
    assert load_function("json:dumps", "model.block")({}) == "{}"
    for name in ("json", "json:absent", "no_such_module:f", ""):
        with pytest.raises(PunaError, match='write "module:function"'):
            load_function(name, "model.block")
