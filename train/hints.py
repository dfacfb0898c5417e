"""What a setting that does not exist was meant to be: one of another section, another tool's name, or a misspelling."""

import difflib
from collections.abc import Sequence

# The names of transformers, TRL, peft, axolotl, torchtune, MaxText and others, and what is said here in their place.
ELSEWHERE = {
    "accumulation_steps": "run.gradient_accumulation_steps",
    "activation_checkpointing": 'model.remat = "full"',
    "adam_eps": "optim.adam_epsilon",
    "adapter": "lora",
    "attn_implementation": "model.attention",
    "base_model": "model.path",
    "batch": "run.batch_size",
    "beta1": "optim.adam_beta1",
    "beta2": "optim.adam_beta2",
    "betas": "optim.adam_beta1 and optim.adam_beta2",
    "bf16": 'model.dtype = "bfloat16"',
    "block_size": "data.max_length",
    "bnb_4bit_compute_dtype": "model.dtype",
    "bnb_4bit_quant_type": "quantize.method",
    "bnb_4bit_use_double_quant": "quantize.double_quant",
    "chat_template": "data.template",
    "checkpoint_every": "run.save_steps",
    "clip_grad_norm": "optim.max_grad_norm",
    "context_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "data_parallel": "mesh.data",
    "dataset": "data.path",
    "dataset_format": "data.format",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "decay": "optim.weight_decay",
    "dim": "model.hidden_size",
    "distillation": "distill",
    "do_eval": "data.eval_path",
    "dpo": "preference",
    "ema_decay": "run.ema",
    "epochs": "run.num_train_epochs",
    "eps": "optim.adam_epsilon",
    "epsilon": "optim.adam_epsilon",
    "eval_dataset": "data.eval_path",
    "eval_file": "data.eval_path",
    "eval_interval": "run.eval_steps",
    "eval_strategy": "run.eval_steps",
    "evaluation_strategy": "run.eval_steps",
    "excess_length_strategy": "data.on_overlong",
    "ffn_dim": "model.intermediate_size",
    "flash_attention": 'model.attention = "cudnn"',
    "flash_attn": 'model.attention = "cudnn"',
    "fp16": 'model.dtype = "bfloat16"',
    "global_batch_size": "run.batch_size",
    "grad_accum": "run.gradient_accumulation_steps",
    "grad_clip": "optim.max_grad_norm",
    "gradient_accumulation": "run.gradient_accumulation_steps",
    "gradient_checkpointing": 'model.remat = "full"',
    "gradient_clipping": "optim.max_grad_norm",
    "init_std": "model.initializer_range",
    "load_in_4bit": 'quantize.method = "nf4"',
    "load_in_8bit": 'quantize.method = "int8"',
    "log_every": "run.logging_steps",
    "logging_dir": "run.output_dir",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_target_modules": "lora.targets",
    "loss_type": "preference.loss",
    "lr": "optim.learning_rate",
    "lr_scheduler": "optim.lr_scheduler_type",
    "max_epochs": "run.num_train_epochs",
    "max_iters": "run.max_steps",
    "max_len": "data.max_length",
    "max_lr": "optim.learning_rate",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_sequence_length": "data.max_length",
    "min_lr": "optim.min_lr_ratio",
    "mixed_precision": "model.dtype",
    "model_max_length": "data.max_length",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "momentum": "optim.adam_beta1",
    "n_heads": "model.num_attention_heads",
    "n_kv_heads": "model.num_key_value_heads",
    "n_layers": "model.num_hidden_layers",
    "norm_eps": "model.rms_norm_eps",
    "num_epochs": "run.num_train_epochs",
    "num_heads": "model.num_attention_heads",
    "num_layers": "model.num_hidden_layers",
    "optim": "optim.optimizer",
    "optimizer": "optim",
    "orpo": "preference",
    "out_dir": "run.output_dir",
    "output": "run.output_dir",
    "pack": "data.packing",
    "parallel": "mesh",
    "parallelism": "mesh",
    "peft": "lora",
    "per_device_batch_size": "run.batch_size",
    "per_device_train_batch_size": "run.batch_size",
    "precision": "model.dtype",
    "pretrained_model_name_or_path": "model.path",
    "prompt_template": "data.template",
    "quantization": "quantize",
    "quantization_config": "quantize",
    "r": "lora.rank",
    "random_seed": "run.seed",
    "ref_model": "preference.precompute_ref_log_probs",
    "resume_from_checkpoint": "run.from_checkpoint",
    "sample_packing": "data.packing",
    "save_every": "run.save_steps",
    "save_interval": "run.save_steps",
    "save_total_limit": "run.keep_last",
    "schedule": "optim.lr_scheduler_type",
    "scheduler": "optim.lr_scheduler_type",
    "seq_len": "data.max_length",
    "seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "sequence_length": "data.max_length",
    "target_modules": "lora.targets",
    "teacher_model": "distill.teacher",
    "teacher_model_name_or_path": "distill.teacher",
    "tensor_parallel": "mesh.tensor",
    "tensor_parallel_size": "mesh.tensor",
    "tie_embeddings": "model.tie_word_embeddings",
    "torch_dtype": "model.dtype",
    "total_steps": "run.max_steps",
    "tp": "mesh.tensor",
    "train_batch_size": "run.batch_size",
    "train_data": "data.path",
    "train_dataset": "data.path",
    "train_file": "data.path",
    "train_steps": "run.max_steps",
    "trainer": "run",
    "training": "run",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "val_fraction": "data.validation_split",
    "val_set_size": "data.validation_split",
    "val_size": "data.validation_split",
    "wandb": 'run.report_to = ["wandb"]',
    "warmup": "optim.warmup_steps",
    "warmup_iters": "optim.warmup_steps",
    "wd": "optim.weight_decay",
}


def meant(name: str, known: Sequence[str]) -> str | None:
    """What is likeliest meant by the name of no setting; None where nothing is near.

    Args:
        name: as it was written, with its section, as "lora.r".
        known: the dotted names of all sections and settings.
    """
    section, _, key = name.rpartition(".")
    key = key.lstrip("-").replace("-", "_").lower()
    inside = [each for each in known if each.rpartition(".")[0] == section]
    same = [each for each in known if each.rpartition(".")[2] == key]
    if same:
        return next((each for each in same if each in inside), same[0])
    other = ELSEWHERE.get(key) or ELSEWHERE.get(f"{section}_{key}")
    if found := _near(key, inside, 0.85) or other or _elsewhere(key, 0.9):
        return found
    return _near(key, inside, 0.6) or _near(key, known, 0.75) or _elsewhere(key, 0.8)


def _elsewhere(key: str, cutoff: float) -> str | None:
    """What stands here for the other tools' name most like `key`."""
    close = difflib.get_close_matches(key, ELSEWHERE, n=1, cutoff=cutoff)
    return ELSEWHERE[close[0]] if close else None


def _near(key: str, names: Sequence[str], cutoff: float) -> str | None:
    """The name whose last part is most like `key`."""
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    close = difflib.get_close_matches(key, last, n=1, cutoff=cutoff)
    return last[close[0]] if close else None
