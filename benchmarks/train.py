"""Training on the CPU against transformers + torch: tokens a second, peak memory, the loop's own cost, tokenization.

Two shapes in float32, four rows of 256 tokens, AdamW with clipping: C15 (dim 288, 6 layers, 6 heads) and C110 (dim 768,
12 layers, 12 heads), vocabulary 32,000. Sides take turns, each in a process of its own, whose peak resident memory is
its memory. Compilation and the first steps come before the clock. Every process runs with glibc's allocator as it is
("default"), told to keep what it has ("tuned"), and told to ask for huge pages ("huge"; see MALLOC): by default both
sides pay page faults at every step.
Ours runs with `model.remat`, "dots" unless told otherwise: matrix products are kept for the backward pass, what lies
between them is computed again. A third side is XLA's products with weights, each timed alone: how fast a step of ours
could be if everything between them cost nothing.

    python benchmarks/train.py [--rounds 3] [--shapes C15 C110] [--malloc default huge tuned] [--remat dots]

prints tables and writes benchmarks/results/train.json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the root: this folder has names that packages have

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "train.json"
SHAPES = {"C15": (288, 768, 6, 6), "C110": (768, 2048, 12, 12)}
BATCH, LENGTH, VOCAB, WARM = 4, 256, 32_000, 3
STEPS = {"C15": 12, "C110": 5}
MALLOC = {
    "default": "",
    "huge": "glibc.malloc.hugetlb=1",
    "tuned": "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=20000000000:glibc.malloc.trim_threshold=20000000000",
}
CORPUS_BYTES = 6_000_000


def dims(shape: str) -> dict[str, Any]:
    hidden, mlp, layers, heads = SHAPES[shape]
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, **sizes}


def tokens_of() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1))


def timed(step: Any, count: int) -> list[float]:
    """Tokens a second of `count` calls, each of which returns when its work is done."""
    for _ in range(WARM):
        step()
    rates = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        rates.append(BATCH * LENGTH / (time.perf_counter() - start))
    return rates


def run_puna(shape: str, remat: str) -> list[float]:
    import jax
    import jax.numpy as jnp

    from model.config import LlamaConfig
    from train.config import read_config
    from train.optim import make_schedule
    from train.start import mesh_of
    from train.state import abstract_state, base_params, init_state, shardings_of
    from train.step import make_step

    wanted = {"model": dims(shape) | {"remat": remat}, "run": {"batch_size": BATCH}}
    config = read_config({"data": {"path": "unread", "max_length": LENGTH}} | wanted)
    model, mesh = LlamaConfig(**dims(shape)), mesh_of(config)
    abstract = abstract_state(config, model, mesh)
    step = make_step(config, model, mesh, make_schedule(config.optim, 1000), shardings_of(abstract))
    state = init_state(config, model, base_params(config, model, mesh, None), abstract)
    tokens = jnp.asarray(tokens_of(), jnp.int32)
    rows = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segments": jnp.ones_like(tokens[:, 1:])}

    def once() -> None:
        nonlocal state
        state, metrics = step(state, rows)
        jax.block_until_ready((state, metrics))  # the metrics alone are ready before the step has freed its memory

    return timed(once, STEPS[shape])


def run_torch(shape: str) -> list[float]:
    import torch

    transformers = import_module("transformers")  # not for the type checker, which would take 20 s to read it

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dims(shape)))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 0, 1000)
    tokens = torch.tensor(tokens_of())[:, :LENGTH]

    def once() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(once, STEPS[shape])


def run_products(shape: str) -> list[float]:
    """Tokens a second of a step that did nothing but its products with weights, each in a program of its own."""
    import jax
    import jax.numpy as jnp

    hidden, mlp, layers, _ = SHAPES[shape]
    square, wide, narrow = (hidden, hidden), (hidden, mlp), (mlp, hidden)
    chunk, rows = 512, BATCH * LENGTH  # the loss takes its logits in chunks, and sums its gradient as [V, D]
    wanted = {(rows, *square): 4 * layers, (rows, *wide): 2 * layers, (rows, *narrow): layers}
    products: list[tuple[Any, int]] = []

    def add(size: tuple[int, int], other: tuple[int, int], dims: tuple[int, int], count: int) -> None:
        a, b = jnp.ones(size), jnp.ones(other)
        dot = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((dims[0],), (dims[1],)), ((), ()))))
        products.append((lambda: dot(a, b).block_until_ready(), count))

    for (T, K, N), count in (wanted | {(chunk, hidden, VOCAB): rows // chunk}).items():
        add((T, K), (K, N), (1, 0), count)  # y = x w
        add((T, N), (K, N), (1, 1), count)  # dx = dy w'
        add(*((T, N), (T, K)) if N == VOCAB else ((T, K), (T, N)), (0, 0), count)  # dw = x' dy

    def seconds(product: Any) -> float:
        start = time.perf_counter()
        product()
        return time.perf_counter() - start

    sums = [sum(count * seconds(product) for product, count in products) for _ in range(WARM + STEPS[shape])]
    return [rows / each for each in sums[WARM:]]


def run_between(shape: str) -> dict[str, float]:
    """The real loop over 40 steps of a packed data set: the share of the time in which no step was running."""
    import jax

    from train import distributed, loop
    from train.config import load_config

    folder = tempfile.mkdtemp()
    sizes = dims(shape)
    settings = [f"model.{name}={value}" for name, value in sizes.items() if name != "vocab_size"]
    config = load_config(
        ROOT / "configs" / "tiny.toml",
        [*settings, f"run.output_dir={folder}/run", f"data.max_length={LENGTH}", "run.batch_size=4", "run.max_steps=40"]
        + ["run.save_steps=0", "run.eval_steps=0"],
    )
    begun, ended, watchers = [], {}, []
    make_step = loop.make_step

    def watched(*arguments: Any) -> Any:
        step = make_step(*arguments)

        def call(state: Any, rows: Any) -> Any:
            begun.append(time.perf_counter())
            number = len(begun)
            state, metrics = step(state, rows)

            def wait() -> None:
                jax.block_until_ready(metrics)
                ended[number] = time.perf_counter()

            watchers.append(threading.Thread(target=wait))
            watchers[-1].start()
            return state, metrics

        return call

    loop.make_step = watched
    distributed.initialize()
    loop.train(config)
    for watcher in watchers:
        watcher.join()
    steps = range(WARM, len(begun))
    idle = sum(max(0.0, begun[number] - ended[number]) for number in steps)
    return {"steps": len(steps), "seconds": ended[len(begun)] - begun[WARM], "idle_seconds": idle}


def corpus(folder: Path) -> Path:
    """Python's own library as documents, and a byte-level BPE of 4,096 pieces learnt from it."""
    import tokenizers

    documents, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and size < CORPUS_BYTES:
            text = path.read_bytes().decode(errors="ignore")
            documents.append(text)
            size += len(text)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents if text))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents[:200], trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


def run_tokenize_puna(folder: Path) -> float:
    from model.tokenizer import load_tokenizer
    from train.data import DataConfig, load_dataset

    config = DataConfig(
        path=str(folder / "text.jsonl"),
        max_length=512,
        packing=True,
        packing_strategy="wrapped",
        cache_dir=str(folder / f"cache-{time.time()}"),
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    start = time.perf_counter()
    (dataset,) = load_dataset(config, tokenizer).train
    return len(dataset) * 512 / (time.perf_counter() - start)


def run_tokenize_datasets(folder: Path) -> float:
    import datasets

    transformers = import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def tokenize(rows: Any) -> Any:
        ids = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[begin, *one, end] for one in ids]}

    def group(rows: Any) -> Any:
        joined = [token for one in rows["input_ids"] for token in one]
        kept = len(joined) // 512 * 512
        return {"input_ids": [joined[i : i + 512] for i in range(0, kept, 512)]}

    datasets.disable_progress_bars()
    start = time.perf_counter()
    text = datasets.load_dataset(
        "json", data_files=str(folder / "text.jsonl"), cache_dir=str(folder / f"hf-{time.time()}"), split="train"
    )
    rows = text.map(tokenize, batched=True, remove_columns=["text"]).map(group, batched=True)
    return len(rows) * 512 / (time.perf_counter() - start)


def child(side: str, argument: str, remat: str) -> None:
    """What a process started by `measure` does: one side of one measurement, as JSON on stdout."""
    if side == "between":
        print(json.dumps(run_between(argument)))
    elif side in ("tokenize-puna", "tokenize-datasets"):
        rate = (run_tokenize_puna if side == "tokenize-puna" else run_tokenize_datasets)(Path(argument))
        print(json.dumps({"tokens_per_second": rate}))
    else:
        sides = {"puna": lambda: run_puna(argument, remat), "torch": lambda: run_torch(argument)}
        rates = (sides | {"products": lambda: run_products(argument)})[side]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps({"tokens_per_second": rates, "peak_mib": peak}))


def start(malloc: str, side: str, argument: str, remat: str) -> dict[str, Any]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    env["GLIBC_TUNABLES"] = MALLOC[malloc]
    command = [sys.executable, str(Path(__file__)), "--child", side, argument, remat]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = [(malloc, shape, side) for malloc in arguments.malloc for shape in arguments.shapes for side in SIDES]
    seen: dict[Any, list[dict[str, Any]]] = {key: [] for key in keys}
    for _ in range(arguments.rounds):
        for malloc, shape, side in keys:
            seen[malloc, shape, side].append(start(malloc, side, shape, arguments.remat))
    rows = []
    for malloc in arguments.malloc:
        for shape in arguments.shapes:
            row: dict[str, Any] = {"malloc": malloc, "shape": shape}
            for side in SIDES:
                runs = seen[malloc, shape, side]
                rates = [rate for run in runs for rate in run["tokens_per_second"]]
                row[side] = {
                    "tokens_per_second": round(statistics.median(rates), 1),
                    "rounds": [round(statistics.median(run["tokens_per_second"]), 1) for run in runs],
                    "peak_mib": round(max(run["peak_mib"] for run in runs)),
                }
            row["speed_ratio"] = round(row["puna"]["tokens_per_second"] / row["torch"]["tokens_per_second"], 2)
            row["memory_ratio"] = round(row["puna"]["peak_mib"] / row["torch"]["peak_mib"], 2)
            rows.append(row)
    between = start("tuned", "between", arguments.shapes[0], arguments.remat)
    between["share"] = round(between["idle_seconds"] / between["seconds"], 5)
    with tempfile.TemporaryDirectory() as folder:
        corpus(Path(folder))
        rates = {side: [] for side in ("puna", "datasets")}
        for _ in range(arguments.rounds):
            for side in rates:
                rates[side].append(start("default", f"tokenize-{side}", folder, arguments.remat)["tokens_per_second"])
    tokenize = {side: round(statistics.median(values)) for side, values in rates.items()}
    return {"train": rows, "between_steps": between, "tokenize_and_pack_tokens_per_second": tokenize}


SIDES = ("puna", "torch", "products")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--malloc", nargs="+", choices=MALLOC, default=list(MALLOC))
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    results = measure(arguments)
    import jax
    import torch

    transformers = import_module("transformers")  # not for the type checker, which would take 20 s to read it

    setting = {
        "command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "remat": arguments.remat,
        "GLIBC_TUNABLES": {name: MALLOC[name] for name in arguments.malloc},
        "versions": {module.__name__: module.__version__ for module in (jax, torch, transformers)},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"setting": setting, **results}, indent=2) + "\n")
    heads = ("puna tok/s", "torch tok/s", "ratio", "products alone tok/s", "puna MiB", "torch MiB", "ratio")
    table = Table("malloc", "shape", *heads)
    for row in results["train"]:
        ours, theirs = row["puna"], row["torch"]
        bound = row["products"]["tokens_per_second"]
        rates = ours["tokens_per_second"], theirs["tokens_per_second"], row["speed_ratio"], bound
        sizes = ours["peak_mib"], theirs["peak_mib"], row["memory_ratio"]
        table.add_row(row["malloc"], row["shape"], *map(str, (*rates, *sizes)))
    console = Console()
    console.print(table)
    console.print(f"between steps: {results['between_steps']['share']:.2%} of the loop's time")
    tokenize = results["tokenize_and_pack_tokens_per_second"]
    console.print(f"tokenize and pack: {tokenize['puna']:,} tok/s, datasets.map {tokenize['datasets']:,} tok/s")


if __name__ == "__main__":
    main()
