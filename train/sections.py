"""The sections of a run's settings, as frozen records: what can be set, what it means, and what it is by default.

The keys carry the ecosystem's names. The presence of [lora] or [quantize] is the switch that turns them on.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from train.data.config import DataConfig
from train.distill import DistillConfig
from train.preference import PreferenceConfig
from train.schema import PathText


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
