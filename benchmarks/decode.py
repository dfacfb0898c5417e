"""Greedy decoding on the CPU against transformers.generate: tokens a second at batch 1 and 8, the same tokens.

A LLaMA of 110M parameters with random weights (dim 768, 12 layers, 12 heads, vocabulary 32,000, float32), prompts of
32 tokens, 128 new ones. Both sides include their prefill; compilation comes before the clock. Rounds take turns.

    python benchmarks/decode.py [--rounds 5]

prints a table and writes benchmarks/results/decode.json.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

sys.path[0] = str(Path(__file__).parent.parent)  # the root: this folder has names that packages have

import jax
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from convert import load_model
from infer.generate import generate
from model.layout import per_layer

transformers = import_module("transformers")  # not for the type checker, which would take 20 s to read it
PROMPT, NEW = 32, 128
RESULT = Path(__file__).parent / "results" / "decode.json"


class Row(TypedDict):
    """One batch size: tokens a second of each side in every round, and the ratio of their medians."""

    batch: int
    puna: list[float]
    transformers: list[float]
    ratio: float


def random_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        initializer_range=0.05,  # logits wide enough apart that rounding never decides between two tokens
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def peer(model: Any, prompts: np.ndarray) -> Callable[[], list[list[int]]]:
    ids = torch.from_numpy(prompts)
    settings = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)

    def run() -> list[list[int]]:
        with torch.inference_mode():
            return model.generate(ids, settings, attention_mask=torch.ones_like(ids))[:, PROMPT:].tolist()

    return run


def ours(folder: Path, prompts: np.ndarray) -> Callable[[], list[list[int]]]:
    config, params = load_model(folder)
    params = per_layer(params)

    def run() -> list[list[int]]:
        chunks = list(generate(params, config, prompts.tolist(), NEW))
        return [[token for chunk in chunks for token in chunk[row]] for row in range(len(prompts))]

    return run


def measure(rounds: int) -> list[Row]:
    """Times both sides in turn, after checking that they choose the same tokens."""
    model = random_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        sides = {}
        for batch in (1, 8):
            prompts = np.random.default_rng(batch).integers(3, 32_000, (batch, PROMPT))
            sides[batch] = {"puna": ours(Path(folder), prompts), "transformers": peer(model, prompts)}
    for batch, pair in sides.items():
        assert pair["puna"]() == pair["transformers"](), f"batch {batch}: the two sides chose different tokens"
    speeds: dict[tuple[int, str], list[float]] = {(batch, name): [] for batch in sides for name in sides[batch]}
    for _ in range(rounds):
        for (batch, name), seen in speeds.items():
            start = time.perf_counter()
            sides[batch][name]()
            seen.append(batch * NEW / (time.perf_counter() - start))
    medians = {key: statistics.median(seen) for key, seen in speeds.items()}
    return [
        Row(
            batch=batch,
            puna=[round(speed, 1) for speed in speeds[batch, "puna"]],
            transformers=[round(speed, 1) for speed in speeds[batch, "transformers"]],
            ratio=round(medians[batch, "puna"] / medians[batch, "transformers"], 2),
        )
        for batch in sides
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = measure(arguments.rounds)
    setting = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
        "versions": {module.__name__: module.__version__ for module in (jax, torch, transformers)},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"setting": setting, "tokens_per_second": rows}, indent=2) + "\n")
    table = Table("batch", "puna tok/s", "transformers tok/s", "ratio", title=f"malloc: {setting['malloc']}")
    for row in rows:
        middle = [f"{statistics.median(speeds):.1f}" for speeds in (row["puna"], row["transformers"])]
        table.add_row(str(row["batch"]), *middle, str(row["ratio"]))
    Console().print(table)


if __name__ == "__main__":
    main()
