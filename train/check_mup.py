"""`train check-mup`: whether activations of wide models move as far in some steps as those of narrow ones.

That they do is what muP is for (the coordinate check of Tensor Programs V, arXiv:2203.03466, appendix D.1). In the
usual parametrization the logits of a model twice as wide move about twice as far at the same learning rate.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich import box
from rich.table import Table

from cli.files import atomic_path
from cli.picture import picture
from model.capture import captured
from model.config import LlamaConfig
from model.errors import PunaError
from model.llama import logits
from model.params import Params
from train.data import Sampler, load_dataset
from train.loader import to_devices
from train.objective import Batch, make_block
from train.optim import make_schedule
from train.sections import Config
from train.start import mesh_of, model_of, prepare, tokenizer_of
from train.state import abstract_batch, abstract_state, base_params, init_state, shardings_of
from train.step import make_step

STEADY = 0.3  # a change that grows as width to this power, or less, does not grow
KINDS = {
    "embed": "embedding",
    "layers.*.attention": "attention",
    "layers.*.mlp": "MLP",
    "layers.*": "residual stream",
    "logits": "logits",
}
Changes = dict[str, list[float]]  # of each kind, after each step


def check_mup(config: Config, widths: Sequence[int], steps: int, destination: Path) -> tuple[Table, bool]:
    """Trains a model of each width for some steps at optim.learning_rate, and compares how far activations move.

    Args:
        config: of the run; the other dims grow with hidden_size, in heads, or in their width where mup_base_head_dim is
            given.
        widths: values of hidden_size, two or more.
        steps: how many.
        destination: the picture to write.

    Returns:
        A table of how far each kind of activation has moved after the last step, by width; and whether none moves
        farther the wider the model is, or less far.

    Raises:
        PunaError: a width that the other dims cannot follow, a run that is not from scratch, or see `model_of`.
    """
    if len(set(widths)) < 2 or steps < 1:
        raise PunaError("check-mup compares widths: give two or more to --widths, and a step or more to --steps")
    if config.model.path is not None or config.lora is not None:
        raise PunaError("check-mup makes models of several widths: leave out model.path and [lora]")
    prepare(config)
    tokenizer = tokenizer_of(config)
    model = model_of(config, tokenizer)
    sampler = Sampler(load_dataset(config.data, tokenizer), config.run.batch_size, config.run.seed)
    found = {width: changes(config, at_width(config, model, width), sampler, steps) for width in sorted(set(widths))}
    growths = {kind: growth({width: moved[kind][-1] for width, moved in found.items()}) for kind in KINDS}
    with atomic_path(destination, overwrite=True) as temporary:
        _draw(found, temporary)
    return _table(found, growths), all(abs(power) <= STEADY for power in growths.values())


def widths_of(text: str) -> list[int]:
    """The widths of `--widths 64,128`. Raises PunaError where one is no whole number above 0."""
    parts = [part.strip() for part in text.split(",")]
    wrong = next((part for part in parts if not part.isdecimal() or int(part) < 1), None)
    if wrong is not None:
        raise PunaError(f"--widths {text}: {wrong!r} is no width; write numbers, as 64,128,256")
    return [int(part) for part in parts]


def at_width(config: Config, model: LlamaConfig, width: int) -> LlamaConfig:
    """The model with another hidden_size, and its other dims in proportion.

    Raises:
        PunaError: one of them would be no whole number.
    """
    grown = ["intermediate_size"]
    grown += (
        ["head_dim"] if config.model.mup_base_head_dim is not None else ["num_attention_heads", "num_key_value_heads"]
    )
    sizes: dict[str, Any] = {name: Fraction(getattr(model, name) * width, model.hidden_size) for name in grown}
    for name, size in sizes.items():
        if size.denominator > 1 or size < 1:
            raise PunaError(
                f"--widths {width}: {name} is {getattr(model, name)} at model.hidden_size {model.hidden_size}, and "
                f"would be {float(size):g}: choose a width that it can follow"
            )
    return replace(model, hidden_size=width, **{name: int(size) for name, size in sizes.items()})


def changes(config: Config, model: LlamaConfig, sampler: Sampler, steps: int) -> Changes:
    """The root mean square of how far the activations of the first batch have moved since the start."""
    run = replace(config.optim, lr_scheduler_type="constant", warmup_ratio=0.0, warmup_steps=0)
    config = replace(config, optim=run)
    mesh = mesh_of(config)
    abstract, batch = abstract_state(config, model, mesh), abstract_batch(config, mesh)
    state = init_state(config, model, base_params(config, model, mesh, None), abstract)
    step = make_step(config, model, mesh, make_schedule(run, steps), shardings_of(abstract))
    block = make_block(config, model, mesh)

    @jax.jit
    def activations(params: Params, rows: Batch) -> dict[str, Array]:
        names = tuple(name for name in KINDS if name != "logits")
        keywords: dict[str, Any] = {"segments": rows["segments"], "dtype": config.model.dtype, "block": block}
        x, _, found = captured(params, rows["tokens"], model, names, **keywords)
        return found | {"logits": logits(params, x, model)}

    @jax.jit
    def distance(now: dict[str, Array], before: dict[str, Array], segments: Array) -> dict[str, Array]:
        def one(a: Array, b: Array) -> Array:
            moved = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))
            return jnp.sqrt(jnp.mean(moved, where=(segments != 0)[..., None]))

        return jax.tree.map(one, now, before)

    def rows(number: int) -> Batch:
        return to_devices(lambda *part: sampler.batch(number, *part), batch["tokens"].sharding, batch["tokens"].shape)

    first = rows(0)
    start = activations(state.params, first)
    found: Changes = {kind: [] for kind in KINDS}
    for number in range(steps):
        state, _ = step(state, rows(number))
        moved = jax.device_get(distance(activations(state.params, first), start, first["segments"]))
        for kind, value in moved.items():
            found[kind].append(float(value))
    return found


def growth(values: dict[int, float]) -> float:
    """The power of the width with which values grow: the slope of a line through their logarithms."""
    if not all(value > 0 and math.isfinite(value) for value in values.values()):
        return math.inf
    return float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0])


def _table(found: dict[int, Changes], growths: dict[str, float]) -> Table:
    steps = len(next(iter(found.values()))["logits"])
    table = Table(title=f"how far activations moved in {steps} steps, by hidden_size", box=box.SIMPLE)
    table.add_column("")
    for width in found:
        table.add_column(str(width), justify="right")
    table.add_column("grows as width to", justify="right")
    table.add_column("")
    for kind, said in KINDS.items():
        values = (f"{moved[kind][-1]:.3g}" for moved in found.values())
        verdict = "steady" if abs(growths[kind]) <= STEADY else "grows" if growths[kind] > 0 else "shrinks"
        table.add_row(said, *values, f"{growths[kind]:.2f}", verdict)
    return table


def _draw(found: dict[int, Changes], path: Path) -> None:
    with picture(path, 3 * len(KINDS), 3) as figure:
        for axes, (kind, said) in zip(np.ravel(figure.subplots(1, len(KINDS))), KINDS.items(), strict=True):
            steps = len(next(iter(found.values()))[kind])
            for number in range(steps):
                shade = 0.25 + 0.75 * (number + 1) / steps
                values = [moved[kind][number] for moved in found.values()]
                axes.plot(list(found), values, marker="o", color=(0.1, 0.2, 0.5, shade), label=f"step {number + 1}")
            axes.set(title=said, xlabel="hidden_size", xscale="log", yscale="log")
            axes.set_xticks(list(found), [str(width) for width in found], minor=False)
            axes.minorticks_off()
        figure.axes[0].legend(fontsize="small")
        figure.axes[0].set_ylabel("change, root mean square")
