"""Training on the CPU beside another LLaMA in JAX: tunix's Llama3 (Flax NNX), tokens a second and peak memory.

The shapes, rows and optimizer of train.py in float32, from the same weights: the losses of the first steps must agree,
or nothing is written. Sides take turns, each in a process of its own. Ours keeps matrix products for the backward pass
(`remat = "dots"`), tunix all it computes, as it comes. tunix 0.1.7 rotates by a theta of 1,000,000 whatever its config
says; both sides do here.

    python benchmarks/jax_peer.py [--rounds 3] [--shapes C15 C110]

prints a table and writes benchmarks/results/jax_peer.json. `make bench` installs tunix into build/peers; its packages
come last on the path, so that both sides run on the same JAX.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)  # the root: this folder has names that packages have
sys.path.append(str(ROOT / "build" / "peers"))

from benchmarks.train import BATCH, LENGTH, MALLOC, SHAPES, STEPS, dims, timed, tokens_of

RESULT = ROOT / "benchmarks" / "results" / "jax_peer.json"
SIDES = ("puna", "tunix")
THETA, RATE, SEEN = 1_000_000, 2e-5, 3  # SEEN: steps whose losses are compared


def weights(shape: str) -> tuple[Any, Any]:
    """Our config, and the parameters that both sides begin with."""
    import jax

    from model.config import LlamaConfig
    from model.params import init_params

    config = LlamaConfig(**dims(shape), rope_theta=float(THETA), rms_norm_eps=1e-5)
    return config, init_params(config, jax.random.key(0))


def batch() -> tuple[Any, Any]:
    """Tokens and labels [B, T]."""
    import jax.numpy as jnp

    tokens = jnp.asarray(tokens_of(), jnp.int32)
    return tokens[:, :-1], tokens[:, 1:]


def puna(shape: str) -> Callable[[], float]:
    """A step of ours, which gives its loss."""
    import jax
    import jax.numpy as jnp

    from train.config import read_config
    from train.optim import make_schedule
    from train.start import mesh_of
    from train.state import abstract_state, init_state, shardings_of
    from train.step import make_step

    model, params = weights(shape)
    sizes = dims(shape) | {"rope_theta": float(THETA), "rms_norm_eps": 1e-5, "remat": "dots"}
    optim = {"learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    config = read_config(
        {"model": sizes, "optim": optim, "run": {"batch_size": BATCH}, "data": {"path": "unread", "max_length": LENGTH}}
    )
    mesh = mesh_of(config)
    abstract = abstract_state(config, model, mesh)
    step = make_step(config, model, mesh, make_schedule(config.optim, 1000), shardings_of(abstract))
    state = init_state(config, model, params, abstract)
    tokens, labels = batch()
    rows = {"tokens": tokens, "labels": labels, "segments": jnp.ones_like(tokens)}

    def once() -> float:
        nonlocal state
        state, metrics = step(state, rows)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return once


def tunix(shape: str) -> Callable[[], float]:
    """A step of tunix's model under optax, which gives its loss."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    theirs = import_module("tunix.models.llama3.model")
    ours, params = weights(shape)
    heads, width = ours.num_attention_heads, ours.head_dim
    config = theirs.ModelConfig(
        num_layers=ours.num_hidden_layers, vocab_size=ours.vocab_size, embed_dim=ours.hidden_size,
        hidden_dim=ours.intermediate_size, num_heads=heads, head_dim=width, num_kv_heads=heads, rope_theta=THETA,
        norm_eps=ours.rms_norm_eps,
    )  # fmt: skip
    graph, state = nnx.split(nnx.eval_shape(lambda: theirs.Llama3(config, rngs=nnx.Rngs(0))))
    flat, layers = dict(nnx.to_flat_state(state)), params["layers"]
    found: dict[tuple[Any, ...], Any] = {
        ("embedder", "input_embedding"): params["embed"],
        ("final_norm", "w"): params["final_norm"],
        ("lm_head", "w"): params["lm_head"],
    }
    for i in range(ours.num_hidden_layers):
        for name, key in (("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv")):
            found["layers", i, "attn", name, "w"] = layers[key][i].reshape(-1, heads, width)
        found["layers", i, "attn", "o_proj", "w"] = layers["wo"][i].reshape(heads, width, -1)
        for name, key in (("gate_proj", "w_gate"), ("up_proj", "w_up"), ("down_proj", "w_down")):
            found["layers", i, "mlp", name, "kernel"] = layers[key][i]
        found["layers", i, "input_layernorm", "w"] = layers["attn_norm"][i]
        found["layers", i, "post_attention_layernorm", "w"] = layers["mlp_norm"][i]
    assert found.keys() == flat.keys(), found.keys() ^ flat.keys()
    state = nnx.from_flat_state({key: leaf.replace(found[key]) for key, leaf in flat.items()})
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=0.0))
    moments = optimizer.init(state)
    tokens, labels = batch()
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH))

    def loss_of(state: Any) -> Any:
        logits, _ = nnx.merge(graph, state)(tokens, positions, None, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()

    def step(state: Any, moments: Any) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(state)
        updates, moments = optimizer.update(gradients, moments, state)
        return optax.apply_updates(state, updates), moments, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))

    def once() -> float:
        nonlocal state, moments
        state, moments, loss = jitted(state, moments)
        jax.block_until_ready(state)
        return float(loss)

    return once


def child(side: str, shape: str) -> dict[str, Any]:
    """One side's losses, speed and memory."""
    once = {"puna": puna, "tunix": tunix}[side](shape)
    losses = [once() for _ in range(SEEN)]
    rates = timed(once, STEPS[shape])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"losses": losses, "tokens_per_second": rates, "peak_mib": peak}


def run(side: str, shape: str, malloc: str) -> dict[str, Any]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": MALLOC[malloc]}
    command = [sys.executable, __file__, "--child", side, shape]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    rows = []
    for shape in arguments.shapes:
        seen: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                seen[side].append(run(side, shape, "huge"))
        first, other = (seen[side][0]["losses"] for side in SIDES)
        if max(abs(a - b) for a, b in zip(first, other, strict=True)) > 1e-4:
            sys.exit(f"{shape}: the sides do not do the same work: their losses are {first} and {other}")
        row: dict[str, Any] = {"shape": shape, "losses": dict(zip(SIDES, (first, other), strict=True))}
        for side, runs in seen.items():
            rates = [rate for each in runs for rate in each["tokens_per_second"]]
            row[side] = {
                "tokens_per_second": round(statistics.median(rates), 1),
                "peak_mib": round(max(each["peak_mib"] for each in runs)),
            }
        rows.append(row)
        ours, theirs = row["puna"], row["tunix"]
        print(
            f"{shape}: puna {ours['tokens_per_second']} tok/s, {ours['peak_mib']} MiB; "
            f"tunix {theirs['tokens_per_second']} tok/s, {theirs['peak_mib']} MiB"
        )
    from importlib.metadata import version

    setting = {
        "command": " ".join(["python", "benchmarks/jax_peer.py", *sys.argv[1:]]),
        "cores": os.cpu_count(),
        "GLIBC_TUNABLES": MALLOC["huge"],
        "versions": {name: version(name) for name in ("jax", "flax", "google-tunix")},
    }
    RESULT.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
