"""python -m configs.recipes.beside_torch OUT CONFIG.toml [section.key=value ...]: a run again, by PyTorch.

transformers' LlamaForCausalLM starts from the same first weights, sees the same batches, and is trained by AdamW of
torch.optim with the same schedule and clipping. Printed are both losses along the way; OUT.json has all, OUT.png draws
them. The run must be done, from scratch, in float32, without accumulation. Exit code 1 where the losses of the first
100 steps part by more than 1e-4, or the means of the last 20 by more than 1 %.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from convert import save_model
from model import init_params
from train.config import load_config
from train.data import load_dataset
from train.data.sampler import Sampler
from train.loop import total_steps
from train.optim import make_schedule
from train.start import model_of, tokenizer_of

EQUAL_STEPS, EQUAL, LAST, NEAR = 100, 1e-4, 20, 0.01


def losses_of_torch(config_path: str, overrides: list[str]) -> tuple[list[float], Path]:
    """The training loss of every step by PyTorch, and the folder of the run."""
    config = load_config(config_path, overrides)
    tokenizer = tokenizer_of(config)
    sampler = Sampler(load_dataset(config.data, tokenizer), config.run.batch_size, config.run.seed)
    shape, total = model_of(config, tokenizer), total_steps(config, sampler)
    with tempfile.TemporaryDirectory() as folder:
        save_model(f"{folder}/start", shape, init_params(shape, jax.random.key(config.run.seed)))
        model = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/start", dtype=torch.float32)
    torch.set_num_threads(1)  # its matrices are small: a second thread would mostly wait
    model.train()
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    optim = config.optim
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=1.0, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_epsilon,
    )  # fmt: skip
    rates = make_schedule(optim, total)
    losses = []
    for step in track(range(total), "PyTorch", console=Console(stderr=True)):
        batch = sampler.batch(step)
        tokens, labels = (torch.from_numpy(np.asarray(batch[key]).astype(np.int64)) for key in ("tokens", "labels"))
        for group in adamw.param_groups:
            group["lr"] = float(rates(step))
        logits = model(tokens).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        adamw.step()
        losses.append(loss.item())
    return losses, Path(config.run.output_dir)


def main(out: str, config_path: str, *overrides: str) -> int:
    theirs, run = losses_of_torch(config_path, list(overrides))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in lines if "loss" in line]
    assert len(ours) == len(theirs), f"{run} has {len(ours)} losses, not {len(theirs)}: run.logging_steps must be 1"
    apart = max(abs(a - b) for a, b in zip(ours[:EQUAL_STEPS], theirs[:EQUAL_STEPS], strict=True))
    last = [sum(losses[-LAST:]) / LAST for losses in (ours, theirs)]
    for step in sorted({1, 10, 100, len(ours) // 2, len(ours)}):
        print(f"step {step}: loss {ours[step - 1]:.5f} here, {theirs[step - 1]:.5f} by PyTorch")
    print(f"first {EQUAL_STEPS} steps: {apart:.1e} apart at most; last {LAST} steps: {last[0]:.4f} and {last[1]:.4f}")
    found = {"puna": ours, "torch": theirs, "apart": apart, "last": last}
    Path(f"{out}.json").write_text(json.dumps(found, indent=1) + "\n")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(theirs, linewidth=3, alpha=0.5, label="transformers + PyTorch")
    axes.plot(ours, linewidth=1, label="Puna")
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    figure.savefig(f"{out}.png", dpi=120)
    return int(apart > EQUAL or abs(last[0] / last[1] - 1) > NEAR)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
