"""A run as one frozen record: TOML sections onto nested dataclasses, dotted overrides, and everything named when wrong.

The keys carry the ecosystem's names. An unknown key or a wrong type is an error that names the setting, and all of
them are named at once. The presence of [lora] or [quantize] is the switch that turns them on.
"""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from model.attention import ATTENTIONS
from model.errors import PunaError
from model.fp8 import check_matmul
from model.lora import check_saved_modules, target_weights
from model.quantize import quantizer
from train.data.config import DataConfig, sources
from train.data.config import check as check_data
from train.distill import DistillConfig
from train.distill import check as check_distill
from train.hints import meant
from train.master import check_master
from train.mup import check as check_mup
from train.preference import PreferenceConfig
from train.preference import check as check_preference
from train.schema import PathText, flat, read, settings


@dataclass(frozen=True)
class ModelConfig:
    """[model]: one of `path`, `preset`, or explicit dims: `hidden_size` and so on, under Hugging Face's names.

    Attributes:
        path: a checkpoint to continue from; max_position_embeddings and the rope settings may differ.
        preset: a published shape, from scratch; dims that are given too replace its own.
        tokenizer: a file, folder or Hub id; the checkpoint's by default.
        vocab_size: rows of the embedding; the tokenizer's tokens by default. [transformers]
        hidden_size: numbers that stand for a token between the layers. [transformers]
        intermediate_size: width of the MLP. [transformers]
        num_hidden_layers: how many blocks. [transformers]
        num_attention_heads: heads of the queries. [transformers]
        num_key_value_heads: heads of keys and values; as many as of queries by default. [GQA, arXiv:2305.13245]
        head_dim: width of a head; hidden_size / num_attention_heads by default. [transformers]
        max_position_embeddings: the longest text that the model is made for, in tokens. [transformers]
        rms_norm_eps: what RMSNorm adds to the mean square. [RMSNorm, arXiv:1910.07467]
        rope_theta: the base of the rotary frequencies. [RoPE, arXiv:2104.09864]
        rope_scaling: how the frequencies are stretched for longer texts: a table as in config.json. [transformers]
        tie_word_embeddings: the head is the embedding. [transformers]
        attention_bias: biases in the products of attention. [transformers]
        mlp_bias: biases in the products of the MLP. [transformers]
        initializer_range: standard deviation of fresh weights. [transformers]
        parametrization: "mup" scales fresh weights and their learning rates with the width, so that the best rate of a
            narrow model is that of a wide one. [Tensor Programs V, arXiv:2203.03466]
        mup_base_hidden_size: with mup, the hidden_size at which both parametrizations are the same.
        mup_base_head_dim: with mup, the head_dim at that size; the model's own by default: wide models have more heads.
        dtype: what is computed in.
        param_dtype: how weights are kept (float32 masters by default); gradients and optimizer state follow it.
        remat: what the backward pass recomputes: nothing, all but products, or whole blocks. [arXiv:1604.06174]
        matmul: the layers' linear products are in `dtype`, or in "fp8": activations, weights and gradients are scaled
            and rounded to 8-bit floats, which NVIDIA's GPUs from Hopper on multiply fast. [arXiv:2209.05433]
        loss_chunk: rows of logits alive at a time; 512 on CPUs and 2,048 on others by default.
        block: a "module:function" in place of LLaMA's block.
        attention: "auto" is "ring" where mesh.context splits rows, else "cudnn" on NVIDIA GPUs, where dtype is
            bfloat16, and "xla" elsewhere; or "module:function". [FlashAttention, arXiv:2205.14135]
        norm: a "module:function" in place of RMSNorm.
        loss: a "module:function" in place of the cross-entropy.
    """

    path: PathText | None = None
    preset: str | None = None
    tokenizer: PathText | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    rms_norm_eps: float | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    initializer_range: float | None = None
    parametrization: Literal["standard", "mup"] = "standard"
    mup_base_hidden_size: int = 256
    mup_base_head_dim: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    matmul: Literal["dtype", "fp8"] = "dtype"
    loss_chunk: int | None = None
    block: str | None = None
    attention: str = "auto"
    norm: str | None = None
    loss: str | None = None


@dataclass(frozen=True)
class OptimConfig:
    """[optim]: the optimizer and its schedule, under transformers' names.

    Attributes:
        optimizer: "adamw", "muon" (for the layers' matrices, AdamW for the rest), "adafactor", or a "module:function"
            that makes an optax transformation (train.optim).
        learning_rate: the highest rate of the schedule; 2e-4 under [lora] where it is not given. [transformers; QLoRA,
            arXiv:2305.14314]
        learning_rate_pattern: what the rate is multiplied by for modules whose name, as model.layers.0.mlp.up_proj,
            ends in a key, a regular expression; the first that matches counts, and 0 keeps them as they are.
        lr_scheduler_type: how the rate falls after warming up; wsd holds it and decays it over the last decay_ratio of
            the steps. [transformers; WSD, arXiv:2404.06395]
        warmup_ratio: the part of all steps in which the rate rises. [transformers]
        warmup_steps: the steps in which it rises; wins over warmup_ratio where it is not 0. No step has the rate 0: 3
            steps have 1/4, 2/4 and 3/4 of learning_rate. [transformers]
        decay_ratio: with wsd, the part of all steps at the end in which the rate falls. [arXiv:2404.06395]
        min_lr_ratio: the rate at the end, as a part of learning_rate.
        weight_decay: of the weights, not of norms and biases, decoupled from the gradient. [AdamW, arXiv:1711.05101]
        adam_beta1: how much of the mean of gradients stays at a step. [Adam, arXiv:1412.6980]
        adam_beta2: how much of the mean of their squares stays. [Adam, arXiv:1412.6980]
        adam_epsilon: what is added to the root of that mean. [Adam, arXiv:1412.6980]
        muon_momentum: with muon, how much of the mean of gradients stays at a step. [Muon; arXiv:2502.16982]
        max_grad_norm: longer gradients are scaled down to it; 0 turns clipping off. [arXiv:1211.5063]
        z_loss: the weight of log(Z)^2 in the loss; 1e-4 in its paper. [PaLM, arXiv:2204.02311]
        offload: keeps the optimizer state in host memory between steps. [ZeRO-Offload, arXiv:2101.06840]
        master: how weights in bfloat16 (model.param_dtype) take updates smaller than they can tell: "stochastic" rounds
            these and the optimizer's state at random, right in the mean; "float32" updates a float32 copy, which with
            AdamW takes 8 more bytes a weight; "none" rounds to the nearest, which loses them. [arXiv:2010.06192]
    """

    optimizer: str = "adamw"
    learning_rate: float = 2e-5
    learning_rate_pattern: dict[str, float] = field(default_factory=dict)
    lr_scheduler_type: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    decay_ratio: float = 0.1
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    muon_momentum: float = 0.95
    max_grad_norm: float = 1.0
    z_loss: float = 0.0
    offload: bool = False
    master: Literal["stochastic", "float32", "none"] = "stochastic"


@dataclass(frozen=True)
class LoraConfig:
    """[lora]: adapters; only they train, with the modules in `modules_to_save`.

    Attributes:
        rank: of an update, the width between its two matrices; r elsewhere. [LoRA, arXiv:2106.09685]
        alpha: the update is scaled by alpha / rank. [LoRA, arXiv:2106.09685]
        dropout: the part of an update's inputs that is zeroed at a step. [peft]
        targets: the names of the weights that get one, as q_proj, or "all-linear"; [] where modules_to_save alone
            are to train. [peft]
        modules_to_save: embed_tokens and lm_head, where they are to train whole. [peft]
        rslora: scales by alpha / sqrt(rank) instead. [rsLoRA, arXiv:2312.03732]
        dora: a magnitude for every column of a weight too. [DoRA, arXiv:2402.09353]
        rank_pattern: other ranks for modules whose name ends in a key, a regular expression. [peft]
        alpha_pattern: other alphas, in the same way. [peft]
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizeConfig:
    """[quantize]: how the frozen base is kept under [lora] (QLoRA, arXiv:2305.14314).

    Attributes:
        method: int8, int4 (ours) or nf4. [QLoRA, arXiv:2305.14314; LLM.int8(), arXiv:2208.07339]
        double_quant: for nf4, the scales are quantized too. [QLoRA, arXiv:2305.14314]
        block: for int4, how many weights share a scale: 32, 64 or 128.
    """

    method: Literal["int8", "int4", "nf4"] = "nf4"
    double_quant: bool = False
    block: int = 64


@dataclass(frozen=True)
class MeshConfig:
    """[mesh]: sizes whose product is the number of devices; -1 is the rest.

    Attributes:
        data: copies of the weights; the batch is split over data and fsdp.
        fsdp: shards of the weights. [ZeRO, arXiv:1910.02054]
        tensor: parts of the heads, of the MLP and of the vocabulary. [Megatron-LM, arXiv:1909.08053]
        context: parts of the tokens of each row, and shards of the weights beside fsdp; keys and values go round a
            ring, two blocks of tokens from each part. [Ring Attention, arXiv:2310.01889; arXiv:2407.21783]
        sequence_parallel: splits the activations between blocks over the tensor axis too. [arXiv:2205.05198]
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True)
class RunConfig:
    """[run]: how long, how much at a time, and what is kept.

    Attributes:
        output_dir: the folder of the run: settings, metrics, checkpoints and final/. [transformers]
        batch_size: sequences of one update, over all devices and microbatches.
        gradient_accumulation_steps: microbatches into which a batch is cut. [transformers]
        max_steps: how many updates; 0 means that num_train_epochs decides. [transformers]
        num_train_epochs: how often each row is seen: once an epoch, whose last batch is filled up with rows that do not
            count. [transformers]
        seed: of fresh weights, of the order of rows and of dropout. [transformers]
        logging_steps: steps between two lines of metrics. [transformers]
        save_steps: a save is due at its multiples; 0 turns it off. [transformers]
        save_minutes: a save is due so long after the last one; 0 turns it off.
        keep_last: how many of the newest checkpoints stay.
        keep_every: beside them the checkpoints of its multiples stay; 0: none.
        keep_best: the checkpoint of the lowest held-out loss stays too, and is what final/ holds.
        eval_steps: steps between two evaluations, beside those at the start and the end; 0: none. [transformers]
        stats_steps: at its multiples metrics have the norms of each layer's activations, gradients and updates, and
            layer_stats.png shows them; such a step takes about twice as long, and changes no number; 0: none.
        ema: how much of the moving average of the weights stays at a step; it is kept beside them and exported as
            final-ema; 0: none. [arXiv:1806.04498]
        from_checkpoint: a step of another run's checkpoints, as runs/long/checkpoints/800: weights, optimizer and the
            number of the step come from there, and the schedule and the data go on from it. With wsd, a cooldown.
        max_skipped_steps: so many non-finite updates in a row end the run.
        step_timeout: seconds without a finished step after which every process writes its stacks and ends with 86; 10
            times the median step, and 300 at least, by default; 0: none.
        report_to: where metrics go beside metrics.jsonl. [transformers]
        deterministic: asks the backend for bitwise repeatable kernels.
        profile_steps: the first and the last step of a trace in output_dir/profile, for xprof or Perfetto.
        prepare: a "module:function" that gets the Config before the data is read, to make or fetch it.
    """

    output_dir: PathText = "runs/default"
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_steps: int = 0
    num_train_epochs: float = 1.0
    seed: int = 0
    logging_steps: int = 1
    save_steps: int = 500
    save_minutes: float = 0.0
    keep_last: int = 3
    keep_every: int = 0
    keep_best: bool = False
    eval_steps: int = 0
    stats_steps: int = 0
    ema: float = 0.0
    from_checkpoint: PathText | None = None
    max_skipped_steps: int = 10
    step_timeout: float | None = None
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    deterministic: bool = False
    profile_steps: tuple[int, ...] = ()
    prepare: str | None = None


@dataclass(frozen=True)
class Config:
    """Everything a run is told, by section; those that are None by default turn on what they are about."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig | None = None
    quantize: QuantizeConfig | None = None
    preference: PreferenceConfig | None = None
    distill: DistillConfig | None = None
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()


LORA_LEARNING_RATE = 2e-4  # QLoRA's (arXiv:2305.14314), for models of up to 13 billion parameters
LARGEST = 16 * 2**20  # bytes of a file of settings
OPTIMIZERS = ("adamw", "muon", "adafactor")

# What may lie elsewhere when a run resumes: that it is the same is told by fingerprints of its content.
PLACES = ("model.path", "model.tokenizer", "data.path", "data.eval_path", "distill.teacher", "run.from_checkpoint")

# What a run may change when it resumes: nothing that alters the numbers beyond rounding, and how long it goes on.
MAY_CHANGE = (
    "mesh",
    "data.cache_dir",
    "model.remat",
    "model.loss_chunk",
    "optim.offload",
    "run.gradient_accumulation_steps",
    "run.output_dir",
    "run.max_steps",
    "run.num_train_epochs",
    "run.logging_steps",
    "run.save_steps",
    "run.save_minutes",
    "run.keep_last",
    "run.keep_every",
    "run.keep_best",
    "run.eval_steps",
    "run.stats_steps",
    "run.max_skipped_steps",
    "run.step_timeout",
    "run.report_to",
    "run.deterministic",
    "run.profile_steps",
    "run.prepare",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and what is to replace settings of it.

    Args:
        path: the file.
        overrides: `section.key=value` each; the value is TOML, or plain text where it is not.

    Raises:
        PunaError: naming every unknown key (with the nearest known one) and every value of the wrong type, or the first
            value that no run could use.
    """
    if Path(path).is_file() and Path(path).stat().st_size > LARGEST:
        raise PunaError(f"{path} has {Path(path).stat().st_size:,} bytes: this is no file of settings")
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:  # RecursionError: nested too deeply
        raise PunaError(f"{path}: not TOML: {error}") from None
    for override in overrides:
        _override(table, override)
    return read_config(table)


def read_config(table: dict[str, Any]) -> Config:
    """The Config that a parsed TOML document means.

    Raises:
        PunaError: see `load_config`.
    """
    if "lora" in table and isinstance(optim := table.get("optim", {}), dict):
        table = table | {"optim": {"learning_rate": LORA_LEARNING_RATE} | optim}
    if "preference" in table and isinstance(data := table.get("data", {}), dict):
        table = table | {"data": {"format": "preference"} | data}
    config = read(Config, {"model": {}, "data": {}} | table)
    _check(config)
    return config


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not sections or not name:
        found = meant(name, [setting.name for setting in settings(Config)]) if equals and name else None
        example = f"{found}={text}" if found and "." in found and " " not in found else "run.max_steps=100"
        raise PunaError(f"{override!r} is not an override; write section.key=value, as in {example}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise PunaError(f"{override!r}: {section} is a value, not a section")
    table[name] = value


def _check(config: Config) -> None:
    """Refuses values that no run could use, by name."""
    check_data(config.data)
    optim, run, model = config.optim, config.run, config.model
    positive = {
        "optim.learning_rate": optim.learning_rate,
        "run.batch_size": run.batch_size,
        "run.gradient_accumulation_steps": run.gradient_accumulation_steps,
        "run.logging_steps": run.logging_steps,
        "run.num_train_epochs": run.num_train_epochs,
        "run.max_skipped_steps": run.max_skipped_steps,
        "run.keep_last": run.keep_last,
        **({} if model.loss_chunk is None else {"model.loss_chunk": model.loss_chunk}),
        "model.mup_base_hidden_size": model.mup_base_hidden_size,
        **({} if model.mup_base_head_dim is None else {"model.mup_base_head_dim": model.mup_base_head_dim}),
        "optim.adam_epsilon": optim.adam_epsilon,
        **(_positive_lora(config.lora) if config.lora else {}),
    }
    for name, value in (*flat(config), *positive.items()):
        if isinstance(value, float) and not math.isfinite(value):
            raise PunaError(f"{name} is {value}; it must be a finite number")
    for name, value in positive.items():
        if value <= 0:
            raise PunaError(f"{name} is {value}; it must be above 0")
    not_negative = {
        **{f"run.{name}": getattr(run, name) for name in ("max_steps", "save_steps", "save_minutes", "eval_steps")},
        "run.stats_steps": run.stats_steps,
        **{f"optim.{name}": getattr(optim, name) for name in ("weight_decay", "warmup_steps", "max_grad_norm")},
        "optim.z_loss": optim.z_loss,
        **{f"optim.learning_rate_pattern {name!r}": value for name, value in optim.learning_rate_pattern.items()},
        "run.keep_every": run.keep_every,
        "run.step_timeout": run.step_timeout or 0,
    }
    for name, value in not_negative.items():
        if value < 0:
            raise PunaError(f"{name} is {value}; it must be 0 or above")
    below_one = {
        "optim.adam_beta1": optim.adam_beta1,
        "optim.adam_beta2": optim.adam_beta2,
        "optim.muon_momentum": optim.muon_momentum,
        "lora.dropout": config.lora.dropout if config.lora else 0.0,
        "run.ema": run.ema,
    }
    for name, value in below_one.items():
        if not 0 <= value < 1:
            raise PunaError(f"{name} is {value}; it must be at least 0 and below 1")
    for name, value in flat(config):
        if isinstance(value, int) and abs(value) >= 2**31 and not name.endswith("seed"):
            raise PunaError(f"{name} is {value}; it must be below {2**31}")
    if not run.output_dir.strip():
        raise PunaError("run.output_dir is empty: name a folder")
    if not 0 <= run.seed < 2**32:
        raise PunaError(f"run.seed is {run.seed}; it must be between 0 and {2**32 - 1}")
    for name in ("warmup_ratio", "decay_ratio", "min_lr_ratio"):
        if not 0 <= getattr(optim, name) <= 1:
            raise PunaError(f"optim.{name} is {getattr(optim, name)}; it must be between 0 and 1")
    if run.batch_size % run.gradient_accumulation_steps:
        raise PunaError(
            f"run.batch_size {run.batch_size} does not divide into run.gradient_accumulation_steps "
            f"{run.gradient_accumulation_steps} microbatches"
        )
    if model.path is not None and model.preset is not None:
        raise PunaError("model.path and model.preset are both given; keep path to continue, preset to start afresh")
    if optim.optimizer not in OPTIMIZERS and ":" not in optim.optimizer:
        known = ", ".join(OPTIMIZERS)
        raise PunaError(f'optim.optimizer {optim.optimizer!r} is not known; choose {known}, or write "module:function"')
    if run.profile_steps and run.max_steps and run.profile_steps[-1] > run.max_steps:
        raise PunaError(
            f"run.profile_steps is {list(run.profile_steps)} and run.max_steps {run.max_steps}: give steps of the run"
        )
    if run.profile_steps and not (len(run.profile_steps) == 2 and 1 <= run.profile_steps[0] <= run.profile_steps[1]):
        raise PunaError(f"run.profile_steps is {list(run.profile_steps)}; give a first and a last step, as [10, 13]")
    _check_preference(config)
    if config.distill is not None:
        check_distill(config.distill)
        if config.preference is not None:
            raise PunaError("[distill] and [preference] are both given: keep one of them")
    check_mup(model, optim.optimizer, config.lora is not None)
    _refuse_unread(config)
    check_matmul(model.matmul, config.quantize is not None, config.lora is not None and config.lora.dora)
    check_master(optim.master, model.param_dtype, config.lora is not None and not config.lora.modules_to_save)
    if config.lora is not None:
        target_weights(config.lora.targets)
        check_saved_modules(config.lora.modules_to_save, config.lora.targets)
    if config.lora is None and model.path is None:  # what model.path names may be an adapter, which says [lora]
        refuse_quantized_training(config)
    if (wanted := config.quantize) is not None:
        quantizer(wanted.method, wanted.block, wanted.double_quant)


def _check_preference(config: Config) -> None:
    """Refuses [preference] without preferences, and the other way round, and a reference that there is not."""
    wanted, formats = config.preference, {source.format for source in sources(config.data)}
    if wanted is None:
        if "preference" in formats:
            raise PunaError('data.format is "preference" without a [preference] section: add one')
        return
    check_preference(wanted)
    if others := formats - {"preference"}:
        raise PunaError(f'data.format is "{others.pop()}" under [preference], which reads "preference": leave it out')
    if wanted.loss == "dpo" and config.model.path is None:
        raise PunaError(
            'preference.loss "dpo" compares with the model that a run starts from: give model.path, or choose "orpo"'
        )
    if wanted.loss == "dpo" and not wanted.precompute_ref_log_probs:
        if config.lora is None or config.lora.modules_to_save:
            raise PunaError(
                "preference.precompute_ref_log_probs is false, and the reference is not there beside what trains: set "
                "it to true, or train adapters alone ([lora] without modules_to_save)"
            )


def refuse_quantized_training(config: Config) -> None:
    """Raises PunaError where weights would be quantized that are to train."""
    if config.quantize is not None and config.lora is None:
        raise PunaError("quantize is given without lora: quantized weights do not train; add a [lora] section")


def _refuse_unread(config: Config) -> None:
    """Refuses settings that nothing in this run would read. A setting at its default says nothing, so that a config
    written out in full (config.toml of a run) can be read again. Where one setting wins over another, as max_steps over
    num_train_epochs, both may be given: an override on the command line is then a word, not two."""
    optim, model, run, data = config.optim, config.model, config.run, config.data
    has_loss, is_adafactor = model.loss is not None, optim.optimizer == "adafactor"
    pairs = config.preference
    has_pairs, is_orpo = pairs is not None, pairs is not None and pairs.loss == "orpo"
    has_teacher = config.distill is not None
    unread = (  # the setting, the one because of which nothing reads it, and whether that is so
        ("optim.z_loss", "model.loss", has_loss),
        ("model.loss_chunk", "model.loss", has_loss),
        ("model.loss", "preference.loss", has_pairs),
        ("optim.z_loss", "preference.loss", has_pairs),
        ("model.loss", "distill.teacher", has_teacher),
        ("optim.z_loss", "distill.teacher", has_teacher),
        ("preference.label_smoothing", "preference.loss", is_orpo),
        ("preference.precompute_ref_log_probs", "preference.loss", is_orpo),
        ("optim.adam_beta1", "optim.optimizer", is_adafactor),
        ("optim.adam_beta2", "optim.optimizer", is_adafactor),
        ("optim.adam_epsilon", "optim.optimizer", is_adafactor),
        ("model.mup_base_hidden_size", "model.parametrization", model.parametrization != "mup"),
        ("model.mup_base_head_dim", "model.parametrization", model.parametrization != "mup"),
        ("optim.muon_momentum", "optim.optimizer", optim.optimizer != "muon"),
        ("optim.learning_rate_pattern", "optim.optimizer", ":" in optim.optimizer),
        ("optim.decay_ratio", "optim.lr_scheduler_type", optim.lr_scheduler_type != "wsd"),
        ("optim.min_lr_ratio", "optim.lr_scheduler_type", optim.lr_scheduler_type == "constant"),
        ("run.eval_steps", "data.eval_path", data.eval_path is None and not data.validation_split),
        ("run.keep_best", "data.eval_path", data.eval_path is None and not data.validation_split),
        ("data.seed", "data.validation_split", not data.validation_split),
        ("data.on_overlong", "data.packing_strategy", data.packing_strategy == "wrapped"),
        ("data.on_overlong", "data.format", all(source.format == "text" for source in sources(data))),
        ("mesh.sequence_parallel", "mesh.tensor", config.mesh.tensor == 1),
        ("run.keep_every", "run.save_steps", not run.save_steps and not run.save_minutes),
    )
    given = dict(flat(config))
    plain = dict(flat(Config(ModelConfig(), DataConfig(), preference=PreferenceConfig())))
    for name, cause, holds in unread:
        if holds and given.get(name) != plain.get(name):
            raise PunaError(
                f"{name} is {given.get(name)!r}, which nothing reads with {cause} = {given.get(cause)!r}: "
                f"leave it out, or change {cause}"
            )


def _positive_lora(lora: LoraConfig) -> dict[str, float]:
    """What of [lora] must be above 0, the values of patterns too."""
    ranks = {f"lora.rank_pattern {pattern!r}": rank for pattern, rank in lora.rank_pattern.items()}
    alphas = {f"lora.alpha_pattern {pattern!r}": alpha for pattern, alpha in lora.alpha_pattern.items()}
    return {"lora.rank": lora.rank, "lora.alpha": lora.alpha, **ranks, **alphas}


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ: dotted name -> (old, new)."""
    before, after = dict(flat(old)), dict(flat(new))
    names = dict.fromkeys([*before, *after])
    return {n: (before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)}


def refuse_changes(old: Config, new: Config) -> None:
    """Check that a run of the config `old` may resume with `new`. Where PLACES lie does not matter here.

    Raises:
        PunaError: naming every setting that differs and may not.
    """
    moved = changes(_without_places(old), _without_places(new))
    refused = [
        f"{name} was {before!r} and is {after!r}"
        for name, (before, after) in changes(old, new).items()
        if not any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)
        and (name not in PLACES or name in moved)
        and not (name == "model.attention" and {before, after} <= {*ATTENTIONS})
    ]
    if refused:
        raise PunaError(
            f"{new.run.output_dir} holds a run with other settings: {'; '.join(refused)}. "
            "Take them back to resume it, or give another run.output_dir"
        )


def _without_places(config: Config) -> Config:
    """The config without where PLACES lie: whether there is a base, how many sources and how each is read."""
    data, listed = config.data, config.data.path
    paths = (
        ()
        if isinstance(listed, str)
        else tuple("" if isinstance(source, str) else replace(source, path="") for source in listed)
    )
    base = None if config.model.path is None else ""
    held_out = None if data.eval_path is None else ""
    distill = None if config.distill is None else replace(config.distill, teacher="")
    return replace(
        config,
        model=replace(config.model, path=base, tokenizer=None),
        data=replace(data, path=paths, eval_path=held_out),
        distill=distill,
        run=replace(config.run, from_checkpoint=None if config.run.from_checkpoint is None else ""),
    )
