"""Every setting changes something that can be seen, or is refused where nothing reads it."""

import ast
import json
import re
import tomllib
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import jax
import pytest

from convert import save_model
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import init_params
from model.tokenizer import load_tokenizer
from train.config import load_config, read_config
from train.data import Sampler, load_dataset
from train.data.config import DataConfig, DataSource, sources
from train.data.dataset import cache_folder
from train.data.toy import make_examples, write_tokenizer
from train.distill import DistillConfig
from train.hints import ELSEWHERE
from train.integrity import fingerprints
from train.optim import make_schedule
from train.preference import PreferenceConfig
from train.schema import _meanings, dump, flat, not_a_setting, settings
from train.sections import Config, LoraConfig, QuantizeConfig
from train.settings import as_markdown, describe
from train.start import mesh_of, model_of, tokenizer_of
from train.state import abstract_batch, abstract_state, abstract_teacher, base_params, init_state, shardings_of
from train.step import make_step

ROOT = Path(__file__).parent.parent
FEW = {
    "vocab_size": 264, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip

# setting: another value, and what it needs to act (its sections); how that shows follows from the section.
MODEL = {
    "vocab_size": (272, {}),
    "hidden_size": (32, {}),
    "intermediate_size": (48, {}),
    "num_hidden_layers": (3, {}),
    "num_attention_heads": (4, {}),
    "num_key_value_heads": (1, {}),
    "head_dim": (4, {}),
    "max_position_embeddings": (128, {"model": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}}),
    "rms_norm_eps": (1e-3, {}),
    "rope_theta": (500.0, {}),
    "rope_scaling": ({"rope_type": "linear", "factor": 2.0}, {}),
    "tie_word_embeddings": (True, {}),
    "attention_bias": (True, {}),
    "mlp_bias": (True, {}),
    "initializer_range": (0.5, {}),
    "parametrization": ("mup", {}),
    "mup_base_hidden_size": (8, {"model": {"parametrization": "mup"}}),
    "mup_base_head_dim": (4, {"model": {"parametrization": "mup"}}),
    "dtype": ("bfloat16", {}),
    "param_dtype": ("bfloat16", {}),
    "remat": ("full", {}),
    "matmul": ("fp8", {}),
    "loss_chunk": (16, {}),
    "block": ("configs.ablations.parallel_block:block", {}),
    "attention": ("test_settings:causal", {}),
    "norm": ("configs.ablations.layer_norm:norm", {}),
    "loss": ("test_settings:no_loss", {}),
}
OPTIM = {
    "optimizer": ("adafactor", {}),
    "learning_rate": (1e-3, {}),
    "learning_rate_pattern": ({"lm_head": 0.5}, {}),
    "lr_scheduler_type": ("linear", {}),
    "warmup_ratio": (0.5, {}),
    "warmup_steps": (5, {}),
    "decay_ratio": (0.5, {"optim": {"lr_scheduler_type": "wsd"}}),
    "min_lr_ratio": (0.5, {}),
    "weight_decay": (0.1, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.5, {}),
    "adam_epsilon": (1e-3, {}),
    "muon_momentum": (0.5, {"optim": {"optimizer": "muon"}}),
    "max_grad_norm": (0.0, {}),
    "z_loss": (1e-2, {}),
    "offload": (True, {}),
    "master": ("none", {"model": {"param_dtype": "bfloat16"}}),
}
LORA = {
    "rank": (4, {}),
    "alpha": (4.0, {}),
    "dropout": (0.5, {}),
    "targets": (["q_proj"], {}),
    "modules_to_save": (["lm_head"], {}),
    "rslora": (True, {}),
    "dora": (True, {}),
    "rank_pattern": ({"q_proj": 2}, {}),
    "alpha_pattern": ({"q_proj": 2.0}, {}),
}
PREFERENCE = {
    "loss": ("orpo", {}),
    "beta": (0.3, {}),
    "label_smoothing": (0.1, {}),
    "precompute_ref_log_probs": (False, {"lora": {}}),
}
DISTILL = {"divergence": ("reverse", {}), "top_k": (4, {}), "temperature": (2.0, {}), "alpha": (0.5, {})}
QUANTIZE = {"method": ("int8", {}), "double_quant": (True, {}), "block": (32, {"quantize": {"method": "int4"}})}
MESH = {
    "data": (2, {}),
    "fsdp": (2, {"mesh": {"data": -1, "fsdp": 1}}),
    "tensor": (2, {}),
    "context": (2, {}),
    "sequence_parallel": (True, {"mesh": {"tensor": 2}}),
}
DATA = {
    "path": ("other.jsonl", {}),
    "format": ("text", {"data": {"path": "text.jsonl"}}),
    "columns": ({"completion": "prompt"}, {}),
    "template": ("{prompt}: {completion}", {}),
    "response_template": ("=", {"data": {"template": "{prompt} = {completion}"}}),
    "max_length": (32, {}),
    "on_overlong": ("truncate", {"data": {"max_length": 18}}),
    "packing": (True, {}),
    "packing_strategy": ("wrapped", {"data": {"packing": True}}),
    "eval_path": ("other.jsonl", {}),
    "validation_split": (0.5, {}),
    "seed": (3, {"data": {"validation_split": 0.5}}),
    "cache_dir": ("elsewhere", {}),
}
UNREAD = [  # the value, what makes that nothing reads it, and the remedy
    ("optim.z_loss", 1e-4, {"model": {"loss": "m:f"}}),
    ("model.loss_chunk", 64, {"model": {"loss": "m:f"}}),
    ("optim.adam_beta1", 0.8, {"optim": {"optimizer": "adafactor"}}),
    ("optim.adam_beta2", 0.8, {"optim": {"optimizer": "adafactor"}}),
    ("optim.adam_epsilon", 1e-6, {"optim": {"optimizer": "adafactor"}}),
    ("optim.muon_momentum", 0.5, {}),
    ("optim.learning_rate_pattern", {"lm_head": 0.5}, {"optim": {"optimizer": "a:b"}}),
    ("optim.decay_ratio", 0.2, {}),
    ("optim.min_lr_ratio", 0.2, {"optim": {"lr_scheduler_type": "constant"}}),
    ("optim.master", "float32", {}),
    ("optim.master", "none", {"model": {"param_dtype": "bfloat16"}, "lora": {}}),
    ("model.mup_base_hidden_size", 64, {}),
    ("model.mup_base_head_dim", 64, {}),
    ("run.eval_steps", 5, {}),
    ("run.keep_every", 5, {"run": {"save_steps": 0}}),
    ("data.seed", 5, {}),
    ("data.on_overlong", "error", {"data": {"packing": True, "packing_strategy": "wrapped"}}),
    ("data.on_overlong", "error", {"data": {"format": "text"}}),
    ("mesh.sequence_parallel", True, {}),
    ("model.loss", "m:f", {"preference": {"loss": "orpo"}}),
    ("optim.z_loss", 1e-4, {"preference": {"loss": "orpo"}}),
    ("preference.label_smoothing", 0.1, {"preference": {"loss": "orpo"}}),
    ("preference.precompute_ref_log_probs", False, {"preference": {"loss": "orpo"}}),
]


PLAIN = read_config({"data": {"path": "x"}})


def causal(q, k, v, mask):
    return q


def no_loss(x, head, targets):
    return x.sum() * 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_tokenizer(folder)
    examples = make_examples(40)
    for name, part in {"train": examples[:20], "other": examples[20:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in part))
    texts = [{"text": "abc", **example} for example in examples]
    (folder / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    shape = LlamaConfig(**FEW)
    save_model(folder / "base", shape, init_params(shape, jax.random.key(0)))
    return folder


def config_of(folder, *changes) -> Config:
    sections: dict = {
        "model": dict(FEW, tokenizer=str(folder)),
        "data": {"path": "train.jsonl", "template": "plain", "max_length": 64, "cache_dir": str(folder / "cache")},
        "mesh": {"fsdp": -1},
        "run": {"batch_size": 8},
    }
    for change in changes:
        for section, values in change.items():
            sections[section] = sections.get(section, {}) | values
    for key in ("path", "eval_path"):
        if key in sections["data"]:
            sections["data"][key] = str(folder / sections["data"][key])
    if sections["data"]["cache_dir"] == "elsewhere":
        sections["data"]["cache_dir"] = str(folder / "elsewhere")
    return read_config(sections)


@cache
def program(written: str) -> str:
    """The lowered step of a configuration as TOML, with its constants, shapes and shardings."""
    config = read_config(tomllib.loads(written))
    mesh, model = mesh_of(config), model_of(config, tokenizer_of(config))
    abstract = replace(abstract_state(config, model, mesh), teacher=abstract_teacher(config, mesh))
    step = make_step(config, model, mesh, make_schedule(config.optim, 20), shardings_of(abstract))
    return step.trace(abstract, abstract_batch(config, mesh)).lower().as_text()


@cache
def born(written: str) -> dict:
    """The fingerprints of the state that it starts from."""
    config = read_config(tomllib.loads(written))
    mesh, model = mesh_of(config), model_of(config, tokenizer_of(config))
    state = init_state(config, model, base_params(config, model, mesh, None), abstract_state(config, model, mesh))
    return {name: int(value) for name, value in fingerprints(state).items()}


def differ(one: Config, other: Config) -> bool:
    """Whether two configurations are of different runs: another program, or another state where that is the same."""
    return any(of(dump(one)) != of(dump(other)) for of in (program, born))


def rows(config) -> list:
    """What the run reads, and where it keeps it."""
    datasets = load_dataset(config.data, load_tokenizer(config.model.tokenizer))
    sampler = Sampler(datasets, 4)
    held_out = datasets.evaluation and (datasets.evaluation.digest, datasets.evaluation.rows.start.tolist())
    seen = [{name: values.tolist() for name, values in sampler.batch(step).items()} for step in range(3)]
    return [str(cache_folder(config.data)), seen, held_out, [source.path for source in sources(config.data)]]


def names_of(record) -> set[str]:
    return {field.name for field in fields(record)}


EVERY = list(settings(Config))


def test_every_setting_has_a_meaning_in_the_docstring_of_its_section():
    for setting in EVERY:
        assert setting.meaning.endswith("."), setting.name
        assert setting.source or "." not in setting.name, setting.name
    for record in (
        DataSource,
        DistillConfig,
        LoraConfig,
        PreferenceConfig,
        QuantizeConfig,
        *(type(section) for section in vars(PLAIN).values()),
    ):
        if is_dataclass(record):
            assert _meanings(record).keys() == names_of(record), record  # and none of a setting that is no more
    assert {setting.name for setting in EVERY} >= dict(flat(PLAIN)).keys()


def test_docs_settings_is_written_from_them():
    assert (ROOT / "docs/settings.md").read_text() == as_markdown(), "run `make settings`"


def test_settings_are_described_by_name():
    expected = "lora.alpha: a number; default 16.0\n    the update is scaled by alpha / rank. Source: LoRA,"
    assert describe("lora.alpha").startswith(expected)
    assert describe("[mesh]").count("mesh.") == 5 and describe("seed").count("seed:") == 2
    assert all(f"{setting.name}: " in describe(None) for setting in EVERY if setting.source)
    assert all(f"data.path[].{name}: " in describe("data.path") for name in names_of(DataSource))
    with pytest.raises(PunaError, match="alhpa is not a setting; did you mean lora.alpha?"):
        describe("alhpa")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("optim.lr", "optim.learning_rate"),
        ("run.lr", "optim.learning_rate"),
        ("run.lerning_rate", "optim.learning_rate"),
        ("run.epochs", "run.num_train_epochs"),
        ("optim.wd", "optim.weight_decay"),
        ("data.batch", "run.batch_size"),
        ("data.max_seq_len", "data.max_length"),
        ("data.max-length", "data.max_length"),
        ("data.maxlength", "data.max_length"),
        ("lora.r", "lora.rank"),
        ("lora.lora_alpha", "lora.alpha"),
        ("lora.target_modules", "lora.targets"),
        ("run.per_device_train_batch_size", "run.batch_size"),
        ("run.grad_accumulation_steps", "run.gradient_accumulation_steps"),
        ("model.bf16", 'model.dtype = "bfloat16"'),
        ("model.n_layer", "model.num_hidden_layers"),
        ("quantize.load_in_4bit", 'quantize.method = "nf4"'),
        ("run.save_total_limits", "run.keep_last"),
        ("data.path[1].weights", "data.path[].weight"),
    ],
)
def test_a_name_of_another_tool_and_a_misspelling_hint_at_ours(written, meant):
    assert not_a_setting(written, [setting.name for setting in EVERY]) == (
        f"{written} is not a setting; did you mean {meant}?"
    )
    if "[" not in written:
        section, _, key = written.partition(".")
        needed: dict = {"model": {}, "data": {"path": "x"}}
        with pytest.raises(PunaError, match=re.escape(f"did you mean {meant}?")):
            read_config(needed | {section: needed.get(section, {}) | {key: 1}})


def test_sections_and_overrides_hint_too():
    for written, meant in (("peft", "lora"), ("optimizer", "optim"), ("training", "run"), ("quantise", "quantize")):
        with pytest.raises(PunaError, match=f"{written} is not a setting; did you mean {meant}?"):
            read_config({"data": {"path": "x"}, written: {}})
    with pytest.raises(PunaError, match="xyzzy is not a setting; `python -m train settings` lists what there is"):
        read_config({"data": {"path": "x"}, "xyzzy": {}})
    with pytest.raises(PunaError, match="'lr=3' is not an override; write .*, as in optim.learning_rate=3"):
        load_config(ROOT / "configs/tiny.toml", ["lr=3"])
    known = {setting.name for setting in EVERY}
    assert all(name.split(" ")[0] in known for name in ELSEWHERE.values())


def test_the_tables_name_every_setting():
    assert MODEL.keys() | {"path", "preset", "tokenizer"} == names_of(type(read_config({"data": {"path": "x"}}).model))
    plain = read_config({"data": {"path": "x"}})
    assert OPTIM.keys() == names_of(type(plain.optim)) and MESH.keys() == names_of(type(plain.mesh))
    assert PREFERENCE.keys() == names_of(PreferenceConfig)
    assert DISTILL.keys() | {"teacher"} == names_of(DistillConfig)
    assert LORA.keys() == names_of(LoraConfig) and QUANTIZE.keys() == names_of(QuantizeConfig)
    assert MESH.keys() == names_of(type(read_config({"data": {"path": "x"}}).mesh)) and DATA.keys() == names_of(
        DataConfig
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "name"),
    [(section, name) for section, table in (("model", MODEL), ("optim", OPTIM), ("mesh", MESH)) for name in table],
)
def test_a_setting_of_model_optim_and_mesh_changes_the_step(folder, section, name):
    value, needs = {"model": MODEL, "optim": OPTIM, "mesh": MESH}[section][name]
    changed = config_of(folder, needs, {section: {name: value}})
    assert differ(changed, config_of(folder, needs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "name"),
    [(section, name) for section, table in (("lora", LORA), ("quantize", QUANTIZE)) for name in table],
)
def test_a_setting_of_lora_and_quantize_changes_the_step(folder, section, name):
    value, needs = {"lora": LORA, "quantize": QUANTIZE}[section][name]
    adapted = [{"lora": {}}, *([{"quantize": {}}] if section == "quantize" else []), needs]
    assert differ(config_of(folder, *adapted, {section: {name: value}}), config_of(folder, *adapted))


@pytest.mark.slow
@pytest.mark.parametrize("name", PREFERENCE)
def test_a_setting_of_preference_changes_the_step(folder, name):
    value, needs = PREFERENCE[name]
    compared = {"model": {"path": str(folder / "base")}, "preference": {}}
    changed = config_of(folder, compared, needs, {"preference": {name: value}})
    assert differ(changed, config_of(folder, compared, needs))


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTILL)
def test_a_setting_of_distill_changes_the_step(folder, name):
    value, needs = DISTILL[name]
    taught = {"distill": {"teacher": str(folder / "base")}}
    assert differ(config_of(folder, taught, needs, {"distill": {name: value}}), config_of(folder, taught, needs))


@pytest.mark.parametrize("name", DATA)
def test_a_setting_of_data_changes_the_rows(folder, name):
    value, needs = DATA[name]
    assert rows(config_of(folder, needs, {"data": {name: value}})) != rows(config_of(folder, needs))


@pytest.mark.parametrize(("setting", "value", "because"), UNREAD, ids=str)
def test_a_setting_that_nothing_reads_is_refused_by_name(folder, setting, value, because):
    section, _, name = setting.partition(".")
    with pytest.raises(PunaError, match=rf"{setting} is .*, which nothing reads with .*: leave it out, or change"):
        config_of(folder, because, {section: {name: value}})


def test_every_setting_of_a_run_is_read_by_the_code_that_runs_it():
    """How often to save or log cannot be told from a step: the attribute must be read, outside the checks of it."""
    read = set()
    for path in (ROOT / "train").glob("*.py"):
        if path.name not in ("checks.py", "config.py", "sections.py", "schema.py"):
            read |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    run = type(read_config({"data": {"path": "x"}}).run)
    assert is_dataclass(run) and names_of(run) <= read
