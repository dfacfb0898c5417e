"""Speculative decoding on the CPU at batch 1: tokens a second with prompt lookup beside plain steps, in one run.

    python benchmarks/speculative.py [--rounds 5]

A LLaMA of 110M parameters (dim 768, 12 layers, 12 heads, vocabulary 32,000, float32) with random weights continues 96
tokens by 128 in an engine of one row. Weights decide how the text goes: with small ones it soon repeats itself, with
larger ones no token comes twice, so that lookup finds nothing. The third text is the worst for lookup: tokens are drawn
from the same 32, so that something is found at nearly every step and is nearly always wrong. Both sides make the same
tokens, which is checked, and include their prefill; compilation comes before the clock. Rounds take turns.

Prints a table and writes benchmarks/results/speculative.json.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the root: this folder has names that packages have

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import infer.engine
from benchmarks.quantized import write_result
from infer.engine import Engine, Request, run_all
from infer.proposals import PromptLookup
from infer.sample import Sampling
from model import LlamaConfig, init_params
from model.layout import per_layer

PROMPT, NEW = 96, 128
RESULT = Path(__file__).parent / "results" / "speculative.json"
C110 = LlamaConfig(
    vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    max_position_embeddings=1024, eos_token_id=(),
)  # fmt: skip
FEW = Sampling(temperature=10.0, logit_bias=tuple((token, 1000.0) for token in range(100, 132)))
TEXTS = {"repeats itself": (0.02, Sampling()), "nothing found": (0.05, Sampling()), "nearly all wrong": (0.05, FEW)}


def passes(engine: Engine, request: Request) -> int:
    """How often the model runs to make the text."""
    count = 0
    steps = {name: getattr(infer.engine, name) for name in ("decode", "verify")}

    def counted(name: str) -> Any:
        def step(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            return steps[name](*arguments)

        return step

    for name in steps:
        setattr(infer.engine, name, counted(name))
    list(run_all(engine, [request]))
    for name, step in steps.items():
        setattr(infer.engine, name, step)
    return count


def measure(text: str, rounds: int) -> dict[str, Any]:
    """Both sides in turn, after checking that they make the same tokens."""
    size, sampling = TEXTS[text]
    params = per_layer(init_params(replace(C110, initializer_range=size), jax.random.key(0)))
    request = Request(np.random.default_rng(0).integers(3, 32_000, PROMPT).tolist(), NEW, sampling)
    settings: dict[str, Any] = {"rows": 1, "length": 256, "least_window": 256, "chunk": 128}
    sides = {
        "plain": Engine(params, C110, **settings),
        "lookup": Engine(params, C110, **settings, speculate=PromptLookup()),
    }
    for engine in sides.values():
        engine.warm_up()
    made = {name: list(run_all(engine, [request]))[-1][0].tokens for name, engine in sides.items()}
    assert made["plain"] == made["lookup"], f"{text}: the two sides made different tokens"
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, engine in sides.items():
            start = time.perf_counter()
            list(run_all(engine, [request]))
            speeds[name].append(round(NEW / (time.perf_counter() - start), 1))
    ratio = statistics.median(speeds["lookup"]) / statistics.median(speeds["plain"])
    return {"text": text, **speeds, "ratio": round(ratio, 2), "passes": passes(sides["lookup"], request)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = [measure(text, arguments.rounds) for text in TEXTS]
    write_result(RESULT, {"tokens": NEW, "rows": rows})
    table = Table("text", "plain tok/s", "lookup tok/s", "ratio", f"passes for {NEW} tokens")
    for row in rows:
        middle = [f"{statistics.median(row[name]):.1f}" for name in ("plain", "lookup")]
        table.add_row(row["text"], *middle, f"{row['ratio']:.2f}", str(row["passes"]))
    Console().print(table)


if __name__ == "__main__":
    main()
