"""Which learning rate is best for models of several widths, in the usual parametrization and in muP: docs/mup.png.

python benchmarks/mup.py            about 10 minutes on two cores

Each is configs/tiny.toml at another hidden_size, trained for its 80 steps and judged by the loss of its held-out data.
The base of muP is the widest: there both parametrizations are the same, and what is asked is whether the best rate of a
narrow model is that of the widest.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)  # this folder has names that packages have

import jax
import numpy as np

from cli.picture import picture
from train.check_mup import at_width
from train.config import load_config
from train.data import Datasets, Sampler, load_dataset
from train.loader import to_devices
from train.loop import held_out_means
from train.optim import make_schedule
from train.sections import Config
from train.start import mesh_of, model_of, prepare, tokenizer_of
from train.state import abstract_batch, abstract_state, base_params, init_state, shardings_of
from train.step import make_evaluation, make_step

WIDTHS = (32, 64, 128)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
KINDS = {"standard": "the usual parametrization", "mup": "muP, of base 128"}
Losses = dict[tuple[str, int, float], float]


def held_out_loss(config: Config, datasets: Datasets, width: int) -> float:
    """The loss that a model of a width comes to."""
    tokenizer = tokenizer_of(config)
    model, mesh = at_width(config, model_of(config, tokenizer), width), mesh_of(config)
    abstract, batch = abstract_state(config, model, mesh), abstract_batch(config, mesh)
    sharding, shape = batch["tokens"].sharding, batch["tokens"].shape
    state = init_state(config, model, base_params(config, model, mesh, None), abstract)
    schedule = make_schedule(config.optim, config.run.max_steps)
    step = make_step(config, model, mesh, schedule, shardings_of(abstract))
    sampler = Sampler(datasets, config.run.batch_size, config.run.seed)
    for number in range(config.run.max_steps):
        state, _ = step(state, to_devices(lambda *part, n=number: sampler.batch(n, *part), sharding, shape))
    return held_out_means(make_evaluation(config, model, mesh), state, datasets, config, sharding)["eval_loss"]


def measure() -> Losses:
    """All of them, each said as it comes."""
    plain = load_config(ROOT / "configs/tiny.toml")
    prepare(plain)
    datasets = load_dataset(plain.data, tokenizer_of(plain))
    found: Losses = {}
    for width in WIDTHS:
        for kind in KINDS:
            for rate in RATES:
                if kind == "mup" and width == max(WIDTHS):  # the base: the same run
                    found[kind, width, rate] = found["standard", width, rate]
                    continue
                model = replace(plain.model, parametrization=kind, mup_base_hidden_size=max(WIDTHS))
                config = replace(plain, model=model, optim=replace(plain.optim, learning_rate=rate))
                found[kind, width, rate] = held_out_loss(config, datasets, width)
                print(f"{kind} {width} {rate:g}: {found[kind, width, rate]:.4f}", file=sys.stderr, flush=True)
                jax.clear_caches()
    return found


def table(found: Losses) -> str:
    """In Markdown, the best of each width in bold."""
    head = ["", "hidden_size", *(f"{rate:g}" for rate in RATES)]
    rows = [head, ["---"] * len(head)]
    for kind, said in KINDS.items():
        for width in WIDTHS:
            losses = [found[kind, width, rate] for rate in RATES]
            shown = [f"**{x:.3f}**" if x == min(losses) else f"{x:.3f}" for x in losses]
            rows.append([said, str(width), *shown])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(found: Losses, path: Path) -> None:
    with picture(path, 9, 3.5) as figure:
        for axes, (kind, said) in zip(np.ravel(figure.subplots(1, 2, sharey=True)), KINDS.items(), strict=True):
            for number, width in enumerate(WIDTHS):
                losses = [found[kind, width, rate] for rate in RATES]
                best = int(np.argmin(losses))
                line = axes.plot(RATES, losses, marker=".", color=f"C{number}", label=f"hidden_size {width}")
                axes.plot(RATES[best], losses[best], marker="o", markersize=9, color=line[0].get_color())
            axes.set(title=said, xlabel="learning rate", xscale="log")
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("held-out loss after 80 steps")
        figure.axes[0].legend()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "mup.png")
    output = parser.parse_args().output
    losses = measure()
    draw(losses, output)
    print(table(losses))
