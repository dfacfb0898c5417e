"""Serving on the CPU beside llama.cpp's server and transformers: tokens a second and time to the first token.

    python benchmarks/serve.py [--parts float32,in process,int8] [--rounds 2]

1, 8 and 32 requests at once, each 32 random tokens continued by 128 greedily, on a LLaMA of 110M parameters (dim 768,
12 layers, 12 heads, vocabulary 32,000) with random weights. Each side runs in a process of its own, alone, and is warm
before the clock starts; sides take turns, `--rounds` times, and figures are medians. The part "in process" measures, in
float32 too, the engine and `generate` without HTTP, transformers' `generate` of the same batch (its first token's time
is that of a batch of one new token), and how fast this machine reads memory. In int8 our side is `--quantize int8
--activations int8`, llama.cpp's file Q8_0. llama.cpp comes as xllamacpp, a wheel.

Prints a table and writes benchmarks/results/serve.json, where a part that is not run stays as it was.
"""

import argparse
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)  # this folder has names that packages have

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

PROMPT, NEW, VOCABULARY = 32, 128, 32_000
LEVELS = {1: 5, 8: 3, 32: 2}  # requests at once, and how often that is measured in a round
RESULT = ROOT / "benchmarks" / "results" / "serve.json"
PARTS = {
    "float32": ("puna", "llama.cpp"),
    "in process": ("puna", "engine", "generate", "transformers", "read"),
    "int8": ("puna", "llama.cpp"),
}
Figures = tuple[float, float]  # tokens a second, and the median seconds to a first token


def make_model(folder: Path) -> None:
    """A Hugging Face folder that never ends a text, and GGUF files of the same weights."""
    from convert import save_model
    from convert.checkpoint import WriteOptions
    from convert.formats import open_model
    from convert.save import write_model
    from model import LlamaConfig, init_params
    from model.tokenizer import load_tokenizer

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=1024, initializer_range=0.05, eos_token_id=(),
    )  # fmt: skip
    words = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    words.trainer_spec.model_type, words.trainer_spec.byte_fallback = 2, True
    words.normalizer_spec.name, words.normalizer_spec.remove_extra_whitespaces = "identity", False
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *[(f"<0x{byte:02X}>", 6) for byte in range(256)]]
    for piece, kind in special + [(f"▁w{i}", 1) for i in range(VOCABULARY - len(special))]:
        words.pieces.add(piece=piece, score=-len(words.pieces) * 1.0, type=kind)
    (folder / "tokenizer.model").write_bytes(words.SerializeToString())
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    save_model(folder / "hf", config, init_params(config, jax.random.key(0)), tokenizer=tokenizer)
    (folder / "hf" / "generation_config.json").write_text('{"eos_token_id": []}')
    checkpoint = replace(open_model(folder / "hf"), format="gguf")
    write_model(folder / "float32.gguf", checkpoint, WriteOptions(dtype="float32"))
    write_model(folder / "int8.gguf", checkpoint, WriteOptions(quantize="int8"))


_seeds = itertools.count()


def prompts(count: int) -> list[list[int]]:
    """Others each time: a server may know again what it has read."""
    return np.random.default_rng(next(_seeds)).integers(300, VOCABULARY, (count, PROMPT)).tolist()


# ----------------------------------------------------------------------------------------------------------- over HTTP


def over_http(url: str, path: str, body: Callable[[list[int]], dict[str, Any]], made: Callable[[Any], int]) -> Any:
    """A function of how many requests are sent at once. `made` says of a streamed object how many tokens it reports."""
    address = urlsplit(url)

    def one(prompt: list[int], first: list[float], start: float) -> None:
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=600)
        connection.request("POST", path, json.dumps(body(prompt)), {"Content-Type": "application/json"})
        answer, came, tokens = connection.getresponse(), 0.0, 0
        for line in answer:
            if line.startswith(b"data: {"):
                came = came or time.perf_counter()
                tokens = max(tokens, made(json.loads(line[6:])))
        assert answer.status == 200 and tokens == NEW, (answer.status, tokens)
        first.append(came - start)

    def run(count: int) -> Figures:
        first: list[float] = []
        start = time.perf_counter()
        threads = [threading.Thread(target=one, args=(prompt, first, start)) for prompt in prompts(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(first) == count
        return count * NEW / (time.perf_counter() - start), statistics.median(first)

    return run


@contextmanager
def puna(folder: Path, part: str) -> Iterator[Callable[[int], Figures]]:
    """`infer serve`."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    flags = ["--port", port, "--rows", str(max(LEVELS)), "--context", str(PROMPT + NEW)]
    flags += ["--quantize", "int8", "--activations", "int8"] if part == "int8" else []
    command = [sys.executable, "-m", "infer", "serve", str(folder / "hf"), *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        ready = next((line for line in server.stderr if line.startswith("Ready: ")), None)
        assert ready is not None, "infer serve did not start"

        def body(prompt: list[int]) -> dict[str, Any]:
            usage = {"stream": True, "stream_options": {"include_usage": True}}
            return {"model": "hf", "prompt": prompt, "max_tokens": NEW, "temperature": 0, **usage}

        yield over_http(
            ready.split()[1],
            "/v1/completions",
            body,
            lambda part: (part.get("usage") or {}).get("completion_tokens", 0),
        )
        server.terminate()


@contextmanager
def llama_cpp(folder: Path, part: str) -> Iterator[Callable[[int], Figures]]:
    """llama.cpp's server, as it is set by default but for the rows."""
    library = import_module("xllamacpp")
    settings = library.CommonParams()
    settings.model.path, settings.n_parallel = str(folder / f"{part}.gguf"), max(LEVELS)
    settings.n_ctx = max(LEVELS) * 256
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = library.Server(settings)

    def body(prompt: list[int]) -> dict[str, Any]:
        greedy = {"temperature": 0, "samplers": ["temperature"], "ignore_eos": True, "cache_prompt": False}
        return {"prompt": prompt, "n_predict": NEW, "stream": True, **greedy}

    yield over_http(server.listening_address, "/completion", body, lambda part: part.get("tokens_predicted", 0))


# -------------------------------------------------------------------------------------------------------- in a process


@contextmanager
def engine(folder: Path, part: str) -> Iterator[Callable[[int], Figures]]:
    """Our engine, all requests submitted at once."""
    from infer.load import find_model, load_engine
    from infer.request import Progress, Request
    from infer.serve import keep_programs

    keep_programs()  # as `infer serve` does
    made = load_engine(find_model(str(folder / "hf")), {}, rows=max(LEVELS), length=PROMPT + NEW)
    made.warm_up()

    def run(count: int) -> Figures:
        first: dict[int, float] = {}

        def changed(progress: Progress) -> None:
            first.setdefault(id(progress), time.perf_counter() - start)

        start = time.perf_counter()
        progress = [made.submit(Request(prompt, NEW), changed) for prompt in prompts(count)]
        while made.busy:
            made.step()
        assert all(len(one.tokens) == NEW for one in progress)
        return count * NEW / (time.perf_counter() - start), statistics.median(first.values())

    yield run


@contextmanager
def generated(folder: Path, part: str) -> Iterator[Callable[[int], Figures]]:
    """Our `generate`, one batch."""
    from convert import load_model
    from infer.generate import generate

    config, params = load_model(folder / "hf", layout="per_layer")

    def run(count: int) -> Figures:
        start, first = time.perf_counter(), 0.0
        for _ in generate(params, config, prompts(count), NEW):
            first = first or time.perf_counter() - start
        return count * NEW / (time.perf_counter() - start), first

    yield run


@contextmanager
def transformers(folder: Path, part: str) -> Iterator[Callable[[int], Figures]]:
    """transformers' `generate`, one batch."""
    torch, library = import_module("torch"), import_module("transformers")
    model = library.LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()

    def seconds(count: int, new: int) -> float:
        ids = torch.tensor(prompts(count))
        settings = library.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(ids, settings, attention_mask=torch.ones_like(ids))
        assert made.shape == (count, PROMPT + new)
        return time.perf_counter() - start

    yield lambda count: (count * NEW / seconds(count, NEW), seconds(count, 1))


def read_gb_per_second() -> float:
    """How fast all cores read 1 GiB together, the best of ten times."""
    parts = np.ones((os.cpu_count() or 1, 2**28 // (os.cpu_count() or 1)), np.float32)
    best = 0.0
    for _ in range(10):
        threads = [threading.Thread(target=np.dot, args=(part, part)) for part in parts]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, parts.nbytes / (time.perf_counter() - start) / 1e9)
    return best


SIDES: dict[str, Any] = {
    "puna": puna, "llama.cpp": llama_cpp, "transformers": transformers, "engine": engine, "generate": generated,
}  # fmt: skip


def side(name: str, part: str, folder: Path) -> list[dict[str, Any]]:
    """One side's figures at every level, in this process."""
    if name == "read":
        return [{"side": name, "requests": 1, "gb_per_second": read_gb_per_second()}]
    rows = []
    with SIDES[name](folder, part) as run:
        for count, repeats in LEVELS.items():
            run(count)  # compiles, or fills caches
            for speed, first in (run(count) for _ in range(repeats)):
                row = {"side": name, "requests": count, "tokens_per_second": round(speed, 1)}
                rows.append(row | {"first_token_ms": round(first * 1e3, 1)})
    return rows


def measure(part: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """All sides of a part in turn: the medians of each."""
    seen: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for name in PARTS[part]:
            command = [sys.executable, __file__, "--side", name, "--parts", part, "--folder", str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            for row in json.loads(done.stdout.splitlines()[-1]):
                seen.setdefault((name, row["requests"]), []).append(row)
                print(row, file=sys.stderr, flush=True)
    keys = ("tokens_per_second", "first_token_ms", "gb_per_second")
    return [
        {"side": name, "requests": count} | {key: [row[key] for row in rows] for key in keys if key in rows[0]}
        for (name, count), rows in seen.items()
    ]


def setting(rounds: int) -> dict[str, Any]:
    versions = {"jax": jax.__version__}
    for name in ("transformers", "torch", "xllamacpp"):
        versions[name] = import_module("importlib.metadata").version(name)
    command = f"python benchmarks/serve.py --rounds {rounds}"
    return {"command": command, "cores": os.cpu_count(), "versions": versions, "prompt": PROMPT, "new": NEW}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="of float32, in process and int8")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.side:
        print(json.dumps(side(options.side, options.parts, options.folder)))
        return
    from convert.formats import open_model

    results: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"parts": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        if not (folder / "hf").exists():
            make_model(folder)
        for part in options.parts.split(","):
            tensors = open_model(folder / "hf").tensors
            results["weights_gb"] = sum(tensor.nbytes for name, tensor in tensors.items() if name != "embed") / 1e9
            results["parts"][part] = {"setting": setting(options.rounds), "rows": measure(part, options.rounds, folder)}
            RESULT.write_text(json.dumps(results, indent=2) + "\n")
    table = Table("part", "side", "requests", "tokens/s", "first token, ms")
    for part, result in results["parts"].items():
        for row in result["rows"]:
            figures = [f"{statistics.median(row[key]):.1f}" for key in row if key not in ("side", "requests")]
            table.add_row(part, row["side"], str(row["requests"]), *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
