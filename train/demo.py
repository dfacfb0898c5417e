"""python -m train.demo [section.key=value ...]: a LLaMA from scratch on tasks whose answers can be checked.

Trains configs/demo.toml and prints how many of the held-out answers are right to the last letter, before and after.
"""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import typer
from jax import Array

from cli.command import main
from convert.load import load_model
from model.config import LlamaConfig
from model.llama import forward
from model.params import Params, init_params
from train.config import load_config
from train.data import PackedDataset, in_order, load_dataset
from train.loop import run
from train.loss import IGNORE_INDEX
from train.objective import BATCH_KEYS
from train.start import tokenizer_of

CONFIG = Path(__file__).parent.parent / "configs" / "demo.toml"

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def exact_match(model: LlamaConfig, params: Params, dataset: PackedDataset, batch_size: int = 64) -> float:
    """The fraction of examples that greedy decoding would answer exactly.

    That is where, given the right letters before, the likeliest token is right at every place that counts: decoding
    then never leaves the right letters.

    Args:
        model: the shape of `params`.
        params: stacked.
        dataset: one example a row.
        batch_size: rows computed at a time.
    """

    @jax.jit
    def right(params: Params, tokens: Array, labels: Array, segments: Array) -> Array:
        logits, _ = forward(params, tokens, model, segments=segments)
        return jnp.all((logits.argmax(-1) == labels) | (labels == IGNORE_INDEX), axis=1)

    answers = []
    for batch in in_order(dataset, batch_size):
        answers += right(params, *(batch[key] for key in BATCH_KEYS))[batch["rows"] >= 0].tolist()
    return sum(answers) / len(answers)


@app.command(help=__doc__)
def demo(overrides: list[str] = typer.Argument(None, help="section.key=value, in place of the file's.")) -> None:
    """Train, and print the exact matches among the held-out examples."""
    config = load_config(CONFIG, overrides or ())
    run(config)
    model, trained = load_model(Path(config.run.output_dir) / "final")
    held_out = load_dataset(replace(config.data, packing=False), tokenizer_of(config)).evaluation
    assert held_out is not None
    untrained = init_params(model, jax.random.key(config.run.seed))
    print(f"held-out answers right before training: {exact_match(model, untrained, held_out):.1%}")
    print(f"held-out answers right after training:  {exact_match(model, trained, held_out):.1%}")
    print(f"the loss picture: {config.run.output_dir}/training_loss.png, the model: {config.run.output_dir}/final")


if __name__ == "__main__":
    sys.exit(main(app))
