"""Greedy text of llama.cpp from our GGUF files, against ours from the same weights, token for token.

A model is written as F32, F16, Q8_0 and Q4_0. llama.cpp reads each file; we read the same file back and compute in
float32, so that both have the very same weights. Prompts are tokenized by each side for itself.

    python benchmarks/gguf.py MODEL [--tokens 200] [--engine llama_cpp_python]

The engine is what runs llama.cpp: llama-cpp-python, or xllamacpp, which comes as a wheel and needs no compiler. Its
cache is float32 and its flash attention off, which would round to float16. It still rounds activations to float16
before it multiplies F16 weights, and to 8 bits for quantized ones; so the table also gives our margin between the two
tokens where the texts part (beside F16 it is a near tie), and what llama.cpp makes of the same numbers in an F32 file,
where nothing is rounded. Prints the table and writes benchmarks/results/gguf.json.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

sys.path[0] = str(Path(__file__).parent.parent)  # the root: this folder has names that packages have

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from convert.checkpoint import WriteOptions
from convert.formats import open_model
from convert.load import load_model
from convert.save import write_model
from infer.generate import generate
from model.config import LlamaConfig
from model.llama import forward
from model.params import Params
from model.tokenizer import load_tokenizer

RESULT = Path(__file__).parent / "results" / "gguf.json"
TYPES = {
    "float32": WriteOptions(dtype="float32"),
    "float16": WriteOptions(dtype="float16"),
    "q8_0": WriteOptions(quantize="int8"),
    "q4_0": WriteOptions(quantize="int4"),
}
PROMPTS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "The dog and the cat",
    "Tom was sad because",
    'It was a sunny day. Mom said, "',
    "There was a big, red ball",
    "  Two  spaces and\na new line",
    "¿Qué? 羊驼 🦙",
)

Ids = list[list[int]]  # of each prompt
Engine = Callable[[Path, int], tuple[Ids, Ids]]  # tokens of the prompts, and the greedy tokens after each


def llama_cpp_python(path: Path, count: int) -> tuple[Ids, Ids]:
    model = import_module("llama_cpp").Llama(
        str(path), n_ctx=512, n_threads=1, type_k=0, type_v=0, flash_attn=False, verbose=False
    )
    prompts = [model.tokenize(text.encode(), add_bos=True) for text in PROMPTS]
    made = []
    for prompt in prompts:
        model.reset()
        made.append(list(islice(model.generate(prompt, temp=0.0), count)))
    return prompts, made


def serve(path: Path, threads: int = 1) -> Callable[..., dict[str, Any]]:
    """llama.cpp's server on a GGUF file, in this process: call it with a path and the body's fields."""
    library = import_module("xllamacpp")
    settings = library.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(path), 512, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.cache_type_k = settings.cache_type_v = library.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = library.Server(settings)

    def post(call: str, **body: Any) -> dict[str, Any]:
        with urlopen(Request(server.listening_address + call, json.dumps(body).encode())) as answer:
            return json.load(answer)

    return post


def xllamacpp(path: Path, count: int) -> tuple[Ids, Ids]:
    post = serve(path)
    prompts = [post("/tokenize", content=text, add_special=True)["tokens"] for text in PROMPTS]
    greedily = {"n_predict": count, "temperature": 0, "samplers": ["temperature"], "return_tokens": True}
    return prompts, [post("/completion", prompt=prompt, **greedily)["tokens"] for prompt in prompts]


ENGINES: dict[str, Engine] = {"llama_cpp_python": llama_cpp_python, "xllamacpp": xllamacpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--engine", choices=ENGINES, default="llama_cpp_python")
    arguments = parser.parse_args()
    rows = []
    model = open_model(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        for type, options in TYPES.items():
            path, widened = Path(folder) / f"{type}.gguf", Path(folder) / f"{type}_widened.gguf"
            write_model(path, replace(model, format="gguf"), options)
            write_model(widened, replace(open_model(path), folder=model.folder), TYPES["float32"])
            with jax.default_matmul_precision("highest"):
                found = compare(path, widened, arguments.model, arguments.tokens, ENGINES[arguments.engine])
            rows += [{"type": type, **row} for row in found]
    show(rows)
    command = ["python benchmarks/gguf.py", arguments.model.name, *sys.argv[2:]]
    setting = {
        "command": " ".join(command),
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "versions": {
            "jax": jax.__version__,
            arguments.engine: import_module(arguments.engine.removesuffix("_python")).__version__,
        },
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"setting": setting, "continuations": rows}, indent=2, ensure_ascii=False) + "\n")


def compare(path: Path, widened: Path, model: Path, count: int, engine: Engine) -> list[dict[str, Any]]:
    """For every prompt: whether its tokens are the same, how many greedy tokens from the first are (also from
    the file's numbers widened to float32), and by how much our logits prefer our token to theirs where the two part."""
    tokenizer = load_tokenizer(model)
    prompts, theirs = engine(path, count)
    _, exact = engine(widened, count)
    config, params = load_model(path, dtype=jnp.float32)
    all_ours = greedy(params, config, prompts, count)
    rows = []
    for text, prompt, ours, made, wide in zip(PROMPTS, prompts, all_ours, theirs, exact, strict=True):
        same = common(ours, made)
        margin = None
        if same < len(made):
            scores = forward(params, jnp.asarray([prompt + ours[:same]]), config)[0][0, -1]
            margin = float(scores[ours[same]] - scores[made[same]])
        rows.append(
            {
                "prompt": text,
                "same_prompt_tokens": prompt == tokenizer.encode(text, add_bos=True),
                "tokens": len(made),
                "same_tokens": same,
                "same_tokens_widened": common(ours, wide),
                "margin": margin,
                "text": tokenizer.decode(ours),
            }
        )
    return rows


def greedy(params: Params, config: LlamaConfig, prompts: Ids, count: int) -> Ids:
    """Our continuations of `count` tokens."""
    made: Ids = [[] for _ in prompts]
    for chunk in generate(params, config, prompts, count):
        for row, tokens in zip(made, chunk, strict=True):
            row += tokens
    return made


def common(ours: list[int], theirs: list[int]) -> int:
    """How many tokens from the first are the same."""
    return next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))


def show(rows: list[dict[str, Any]]) -> None:
    heads = ("greedy tokens", "same from the first", "margin where they part", "same, numbers in F32")
    table = Table("type", "prompt", "prompt tokens", *heads)
    for row in rows:
        prompt = "same" if row["same_prompt_tokens"] else "DIFFERENT"
        margin = "" if row["margin"] is None else f"{row['margin']:.1e}"
        table.add_row(
            row["type"],
            row["prompt"],
            prompt,
            str(row["tokens"]),
            str(row["same_tokens"]),
            margin,
            str(row["same_tokens_widened"]),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
