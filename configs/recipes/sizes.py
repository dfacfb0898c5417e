"""python -m configs.recipes.sizes: sizes of Chinese-LLaMA-Alpaca's models (49,954 tokens), ours and as published.

Ours are counted without memory: weights of layers quantized, embeddings, head and norms in 16 bits; the published ones
are those of llama.cpp's files of May 2023.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from model import init_params
from model.config import PRESETS
from train.sections import QuantizeConfig
from train.state import quantize_linears

VOCAB = 49_954
PUBLISHED = {  # GB: 16-bit, 8-bit, 4-bit
    "llama-7b": (13.0, 7.8, 3.9),
    "llama-13b": (24.0, 14.9, 7.8),
    "llama-33b": (60.0, 32.4, 17.2),
    "llama-65b": (120.0, 60.0, 38.5),
}
KINDS = (None, QuantizeConfig("int8"), QuantizeConfig("nf4", double_quant=True))


def gibibytes(preset: str, kind: QuantizeConfig | None) -> float:
    """What the weights of a preset take in a kind, in GiB."""
    config = replace(PRESETS[preset], vocab_size=VOCAB)
    params = jax.eval_shape(partial(init_params, config, dtype=jnp.bfloat16), jax.random.key(0))
    kept = jax.eval_shape(lambda params: quantize_linears(params, kind), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)) / 2**30


def main() -> None:
    table = Table(
        "model", *(f"{kind} {side}" for kind in ("16-bit", "8-bit", "4-bit") for side in ("ours", "published"))
    )
    for preset, published in PUBLISHED.items():
        cells = []
        for kind, theirs in zip(KINDS, published, strict=True):
            cells += [f"{gibibytes(preset, kind):.2f}", f"{theirs:g}"]
        table.add_row(preset, *cells)
    Console(width=100).print(table)
    print("GiB; the published table says GB, which its numbers of 16 bits fit as GiB")


if __name__ == "__main__":
    main()
