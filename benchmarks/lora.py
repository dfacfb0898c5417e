"""LoRA beside peft on one base, beside our own full fine-tune, and QLoRA's memory line by line, in one run.

    python benchmarks/lora.py             rank 8 on all linears of a 15M LLaMA, batch 4 x 256; needs torch and peft
    python benchmarks/lora.py --smoke     tiny shapes, for a look at the table

Each side takes whole steps (forward, backward, AdamW, float32; ours with the loss and the compiler's options of
`train`, at each `model.remat`) on the same tokens and the same base, in turn; the fastest of each is kept. A step is
set beside peft's, and beside our full step of the same remat. Peak memory is the compiler's account on our side
(arguments and temporaries), and what the process grew by while stepping on peft's.
"""

import argparse
import resource
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the root: this folder has names that packages have

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quantized import best_times, nbytes, temporaries, write_result
from convert import save_model
from model import LlamaConfig, hidden, init_params, make_mesh
from model.cpu import COMPILER_OPTIONS
from model.lora import add, join, split
from model.params import LINEARS, Params
from model.quantize import quantize
from train.loss import IGNORE_INDEX, make_loss

RESULT = Path(__file__).parent / "results" / "lora.json"
C15 = LlamaConfig(
    vocab_size=32000,
    hidden_size=288,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    max_position_embeddings=256,
)
SMOKE = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
RANK = 8
REMAT = ("none", "dots", "full")
PEFT = "peft LoRA, none"  # which recomputes nothing


class OurStep:
    """Training steps on whatever part of the parameters `split` says; `frozen` None trains everything."""

    def __init__(self, config: LlamaConfig, trained: Params, frozen: Params | None, tokens: np.ndarray, remat: str):
        optimizer = optax.adamw(1e-4)
        self.trained, self.frozen = jax.tree.map(jnp.copy, trained), frozen
        self.state = optimizer.init(self.trained)
        batch = jnp.asarray(tokens, jnp.int32)
        labels = jnp.pad(batch[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
        total = make_loss(make_mesh(devices=jax.devices()[:1]))

        def loss(trained: Params, frozen: Params | None) -> jax.Array:
            params = trained if frozen is None else join(trained, frozen)
            x, _ = hidden(params, batch, config, remat=remat)
            return total(x, params["lm_head"], labels) / (labels != IGNORE_INDEX).sum()

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(trained: Params, state: Any, frozen: Params | None) -> tuple[Any, Any, jax.Array]:
            value, gradient = jax.value_and_grad(loss)(trained, frozen)
            updates, state = optimizer.update(gradient, state, trained)
            return optax.apply_updates(trained, updates), state, value

        self.compiled = step.lower(self.trained, self.state, frozen).compile(COMPILER_OPTIONS)

    def __call__(self) -> jax.Array:
        self.trained, self.state, value = self.compiled(self.trained, self.state, self.frozen)
        return value

    def account(self) -> dict[str, float]:
        """MiB of each part of a step's memory."""
        parts = {
            "frozen": nbytes(self.frozen),
            "trained": nbytes(self.trained),
            "optimizer": nbytes(self.state),
            "temporaries": temporaries(self.compiled),
        }
        return {name: size / 2**20 for name, size in (parts | {"sum": sum(parts.values())}).items()}


def peft_step(folder: Path, tokens: np.ndarray) -> Callable[[], Any]:
    """A step of peft on the same base, adapters on every linear, fused AdamW."""
    peft, transformers = import_module("peft"), import_module("transformers")  # the type checker reads them for 20 s
    import torch

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(base, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch = torch.tensor(tokens)

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_mib() -> float:
    """The largest this process has been, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    """Prints the times and the account of memory, and writes them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing in all")
    parser.add_argument("--json", type=Path, default=RESULT, help="where to write the figures (not of --smoke)")
    options = parser.parse_args()
    config, shape, seconds = (SMOKE, (2, 16), 0.5) if options.smoke else (C15, (4, 256), options.seconds)

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    params = init_params(config, jax.random.key(0))
    key = jax.random.key(1)
    layers = {name: quantize(w, "nf4", double=True) if name in LINEARS else w for name, w in params["layers"].items()}
    adapted = split(add(params, config, key, rank=RANK, alpha=16)[1])
    quantized = split(add({**params, "layers": layers}, config, key, rank=RANK, alpha=16)[1])
    parts: dict[str, tuple[Params, Params | None]] = {"full": (params, None), "LoRA": adapted, "QLoRA nf4": quantized}
    ours = {f"{name}, {remat}": OurStep(config, *parts[name], tokens, remat) for remat in REMAT for name in parts}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "base", config, params)
        before = peak_mib()
        theirs = peft_step(Path(folder) / "base", tokens)
        theirs()
        grown = peak_mib() - before
        times = best_times({**ours, PEFT: theirs}, seconds)

    accounts = {name: step.account() for name, step in ours.items()} | {PEFT: {"process grew by": grown}}
    for name, took in times.items():
        account = "  ".join(f"{part} {mib:.1f}" for part, mib in accounts[name].items())
        of_full, of_peft = took / times[f"full, {name.split(', ')[1]}"], took / times[PEFT]
        print(f"{name:<16}{took * 1e3:9.1f} ms  {of_full:.2f} of full  {of_peft:.2f} of peft  MiB: {account}")
    if not options.smoke:
        write_result(options.json, {"seconds": times, "MiB": accounts})


if __name__ == "__main__":
    main()
