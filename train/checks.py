"""What is refused of settings whose names and types are right: values that no run could use, and what nothing reads."""

import math

from model.errors import PunaError
from model.fp8 import check_matmul
from model.lora import check_saved_modules, target_weights
from model.quantize import quantizer
from train.data.config import DataConfig, sources
from train.data.config import check as check_data
from train.distill import check as check_distill
from train.master import check_master
from train.mup import check as check_mup
from train.preference import PreferenceConfig
from train.preference import check as check_preference
from train.schema import flat
from train.sections import Config, LoraConfig, ModelConfig

OPTIMIZERS = ("adamw", "muon", "adafactor")


def check(config: Config) -> None:
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
