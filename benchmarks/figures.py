"""Writes docs/figures.md, docs/scaling.md and a table of docs/finetuning.md from benchmarks/results/*.json; nothing is
measured here.

python benchmarks/figures.py            or `make figures`
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "figures.md"
SCALING = ROOT / "docs" / "scaling.md"
FITS = ROOT / "docs" / "finetuning.md"
CARDS = (24, 40, 80, 141)  # GB

HEAD = """# Figures

Written by `make figures` from `benchmarks/results/*.json`; edit those by running their benchmark, never this page.
All were measured on 2 cores of an AMD EPYC without a GPU: `gguf.py`, `lora.py`, `quantized.py`, `serve.py` and
`speculative.py` on one with AVX-512, the rest on one without it. A ratio "of X" is our figure divided by X's. Times
vary by a few percent from run to run; the two sides of a ratio were measured in turn, in the same run.
"""
CEILINGS = {"read": "the measured read", "bf16": "the measured bfloat16 product", "sheet": "the data sheet"}
MALLOC = {
    "default": "as glibc has it",
    "huge": "with huge pages",
    "tuned": "told to keep memory",
    "glibc.malloc.hugetlb=1": "with huge pages",
}


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head, rows = list(head), [list(row) for row in rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def section(title: str, command: str, setting: dict[str, Any], *parts: str) -> str:
    """A heading, the command that measures, the versions that ran, and then `parts`."""
    versions = setting.get("versions") or {name: setting[name] for name in ("jax", "xllamacpp") if name in setting}
    ran = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n\n".join([f"## {title}", f"`{command}`" + (f", {ran}" if ran else ""), *parts])


def decode(result: dict[str, Any]) -> str:
    rows = [
        [row["batch"], f"{median(row['puna']):.0f}", f"{median(row['transformers']):.0f}", f"{row['ratio']:.2f}"]
        for row in result["tokens_per_second"]
    ]
    return section(
        "Greedy decoding of a 110M LLaMA, float32, beside transformers.generate",
        "python benchmarks/decode.py",
        result["setting"],
        "Tokens a second, medians; both sides choose the same tokens.",
        table(["batch", "puna", "transformers", "ratio"], rows),
    )


def train(result: dict[str, Any]) -> str:
    rows = []
    for row in result["train"]:
        speeds = [row[side]["tokens_per_second"] for side in ("puna", "torch", "products")]
        size = {"C15": "15M", "C110": "110M"}[row["shape"]]
        measured = [f"{row['speed_ratio']:.2f}", f"{row['memory_ratio']:.2f}", f"{speeds[2] / speeds[1]:.2f}"]
        rows.append([size, MALLOC[row["malloc"]], *(f"{speed:.0f}" for speed in speeds[:2]), *measured])
    between, tokenizing = result["between_steps"], result["tokenize_and_pack_tokens_per_second"]
    return section(
        "Training beside transformers + torch, float32",
        result["setting"]["command"],
        result["setting"],
        f'Tokens a second; `remat = "{result["setting"]["remat"]}"`. XLA\'s products are its matrix products with '
        "weights alone: what a step would take if everything between them cost nothing.",
        table(["model", "allocator, both sides", "puna", "torch", "speed", "memory", "XLA's products"], rows),
        f"Between steps the loop takes {between['share']:.2%} of its time. Tokenizing and packing: "
        f"{tokenizing['puna']:,} tokens a second (the `datasets` pipeline: {tokenizing['datasets']:,}).",
    )


def jax_peer(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        speeds = [row[side]["tokens_per_second"] for side in ("puna", "tunix")]
        sizes = [row[side]["peak_mib"] for side in ("puna", "tunix")]
        size = {"C15": "15M", "C110": "110M"}[row["shape"]]
        ratios = f"{speeds[0] / speeds[1]:.2f}", f"{sizes[0] / sizes[1]:.2f}"
        rows.append([size, *(f"{speed:.0f}" for speed in speeds), ratios[0], *sizes, ratios[1]])
    both = [", ".join(f"{loss:.5f}" for loss in losses) for losses in result["rows"][0]["losses"].values()]
    return section(
        "Training beside another LLaMA in JAX, float32",
        result["setting"]["command"],
        result["setting"],
        "tunix's Llama3 (Flax NNX, optax), from the same weights on the same rows; its first losses beside ours: "
        f"{both[0]} and {both[1]}"
        '. Tokens a second, and MiB of the process. Ours has `remat = "dots"`, tunix keeps all it computes; both with '
        "huge pages.",
        table(["model", "puna", "tunix", "speed", "puna, MiB", "tunix, MiB", "memory"], rows),
    )


def lora(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        seconds, memory = result["seconds"], result["MiB"]
        peft, grown = "peft LoRA, none", memory["peft LoRA, none"]["process grew by"]
        for name, took in seconds.items():
            if name == peft:
                continue
            kind, remat = name.split(", ")
            of_peft, of_full = took / seconds[peft], took / seconds[f"full, {remat}"]
            times = [f"{took * 1e3:.0f}", f"{of_peft:.2f}", f"{of_full:.2f}", f"{memory[name]['sum']:.0f}"]
            rows.append([MALLOC[result["setting"]["malloc"]], kind, remat, *times])
        rows.append([MALLOC[result["setting"]["malloc"]], "peft's LoRA", "none", f"{seconds[peft] * 1e3:.0f}", "1.00"])
        rows[-1] += ["", f"{grown:.0f}"]
    return section(
        "A LoRA step, rank 8 on every linear, 15M",
        "` and `".join(result["setting"]["command"] for result in results),
        results[0]["setting"],
        "MiB are the compiler's account on our side, and what the process grew by on peft's.",
        table(["allocator", "step", "remat", "ms", "of peft's time", "of our full step's", "MiB"], rows),
    )


def quantized(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        speed = f"{row['ms']:.2f} ms" if "ms" in row else f"{row['tokens/s']:.0f} tok/s"
        ratios = [f"{row[key]:.2f}" for key in ("of float32's time", "of float32's bytes")]
        rows.append([row["what"], row["format"], speed, *ratios])
    return section(
        "int8, int4 and nf4 weights beside float32",
        result["setting"]["command"],
        result["setting"],
        "float32 is as decoding holds it, transposed; `[in, out]` is as training does. Decoding is of a 110M LLaMA.",
        table(["what", "format", "speed", "of float32's time", "of its bytes"], rows),
    )


def quantized_7b(result: dict[str, Any]) -> str:
    rows = [
        [row["format"], row["tokens/s"], f"{row['GiB']:.1f}" if "GiB" in row else "", "yes" if row["AVX-512"] else "no"]
        for row in result["rows"]
    ]
    return section(
        "Decoding with a 7B-shaped model, batch 1",
        "` / `".join(result["setting"]["command"]),
        result["setting"],
        "llama.cpp reads a Q4_0 file of the same shape.",
        table(["weights", "tokens a second", "GiB of weights", "AVX-512"], rows),
    )


def serve(result: dict[str, Any]) -> str:
    rows, notes = [], []
    for part, measured in result["parts"].items():
        speeds = {(row["side"], row["requests"]): row for row in measured["rows"]}

        def speed(side: str, count: int, speeds: dict[Any, Any] = speeds) -> float:
            return median(speeds[side, count]["tokens_per_second"])

        for (side, count), row in speeds.items():
            if side == "read":
                continue
            others = [f"{speed('puna', count) / speed(side, count):.2f}" if side != "puna" else ""]
            rows.append(
                [part, side, count, f"{speed(side, count):.0f}", *others, f"{median(row['first_token_ms']):.0f}"]
            )
        if ("read", 1) in speeds:  # a part that has the engine and `generate` too
            read = median(speeds["read", 1]["gb_per_second"])
            share = speed("engine", 1) * result["weights_gb"] / read
            notes.append(
                f"At batch 1 the engine makes {speed('engine', 1) / speed('generate', 1):.2f} of `generate`'s tokens a "
                f"second. Its weights are {result['weights_gb']:.2f} GB, read for every token: {share:.0%} of the "
                f"{read:.0f} GB/s that both cores read together in the same run."
            )
    setting = next(iter(result["parts"].values()))["setting"]
    return section(
        "Serving a 110M LLaMA beside llama.cpp's server and transformers",
        setting["command"],
        setting,
        f"Output tokens a second of all requests together, each {setting['prompt']} tokens and {setting['new']} new "
        "ones, and the median milliseconds to a first token. `puna` is `infer serve` over HTTP, `engine` and "
        "`generate` are ours in process. In int8, `puna` is `--quantize int8 --activations int8` and llama.cpp's file "
        "is Q8_0.",
        *notes,
        table(["weights", "side", "requests", "tokens/s", "puna's of its", "first token, ms"], rows),
    )


def speculative(result: dict[str, Any]) -> str:
    rows = [
        [
            row["text"],
            *(f"{median(row[side]):.0f}" for side in ("plain", "lookup")),
            f"{row['ratio']:.2f}",
            row["passes"],
        ]
        for row in result["rows"]
    ]
    return section(
        "Speculative decoding by prompt lookup, 110M, float32, batch 1",
        result["setting"]["command"],
        result["setting"],
        "Tokens a second; both sides make the same tokens. Passes are how often the model ran.",
        table(["text", "plain", "lookup", "ratio", f"passes for {result['tokens']} tokens"], rows),
    )


def gguf(result: dict[str, Any]) -> str:
    rows = []
    for kind in dict.fromkeys(row["type"] for row in result["continuations"]):
        of_kind = [row for row in result["continuations"] if row["type"] == kind]
        whole = [sum(row[key] == row["tokens"] for row in of_kind) for key in ("same_tokens", "same_tokens_widened")]
        margin = max((row["margin"] for row in of_kind if row["margin"] is not None), default=None)
        rows.append([kind, len(of_kind), *whole, "" if margin is None else f"{margin:.4f}"])
    return section(
        "llama-cpp-python on our GGUF files of stories260K",
        result["setting"]["command"],
        result["setting"],
        "How many greedy texts of 200 tokens are ours, token for token: from the file, and from its numbers in a "
        "float32 file. llama.cpp rounds activations to its weights' type, and so parts from us, and from itself, "
        "where two tokens are near; the margin is the largest between ours and theirs where texts part.",
        table(["type", "texts", "same", "same in float32", "largest margin"], rows),
    )


def convert(result: dict[str, Any]) -> str:
    rows = []
    for figures in result["conversions"]["figures"]:
        for way in ("hf to orbax", "orbax to hf", "hf to meta", "meta to hf"):
            rate = [f"{figures[way]['gb_s']:.2f}", f"{figures[way]['of_copy']:.2f}", f"{figures[way]['peak_gib']:.2f}"]
            rows.append([way, figures["layers"], figures["gigabytes"], *rate])
    load, quantize = result["load"]["figures"], result["quantize"]["figures"]
    layout = result["layout"]["figures"]
    apart, stacked = layout["per_layer"], layout["by way of the stack"]
    sizes = [
        [model, kind, f"{row['seconds']:.0f}", f"{row['disk_gib']:.2f}", f"{row['peak_gib']:.2f}"]
        for model, kinds in result["sizes"]["figures"].items()
        for kind, row in kinds.items()
    ]
    return section(
        "Conversion of 7B-shaped bfloat16 folders, beside a plain copy",
        "python benchmarks/convert.py",
        result["setting"],
        table(["way", "layers", "GB", "GB/s", "of a copy's rate", "anonymous memory, GiB"], rows),
        f"`load_model` of {load['gigabytes']} GB takes {load['copies']:.1f} times a plain copy; of "
        f"{quantize['gigabytes']} GB as nf4 it holds {quantize['held_gib']:.2f} GiB, "
        f"{quantize['peak_gib']:.2f} at the peak.",
        f"Eight such layers loaded for decoding keep {apart['kept_gib']:.2f} GiB and take {apart['peak_gib']:.2f} at "
        f"the peak, a table of {apart['largest_gib']:.2f} among it ({stacked['peak_gib']:.2f} by way of the stack).",
        table(["converted", "to", "seconds", "GiB on disk", "anonymous memory, GiB"], sizes),
    )


def checkpoint(result: dict[str, Any]) -> str:
    rows = [
        [
            row["gigabytes"],
            *(f"{row[key]:.1f}" for key in ("save_blocks_s", "save_s", "raw_write_s")),
            f"{row['save_in_raw_writes']:.2f}",
            *(f"{row[key]:.1f}" for key in ("restore_same_mesh_s", "restore_other_mesh_s")),
        ]
        for row in result["checkpoints"]
    ]
    return section(
        "Saving and restoring training state, proved by manifest and fingerprints",
        result["command"],
        result["setting"],
        "Seconds. Training waits only while a save blocks.",
        table(["GB", "blocks", "saved", "raw write", "in raw writes", "restored", "on another mesh"], rows),
    )


def gpu_check(result: dict[str, Any]) -> str:
    rows = [
        [row["what"], f"{row['found']:g}", "" if row["bound"] is None else f"{row['bound']:g}", row["unit"]]
        for row in result["rows"]
    ]
    setting = result["setting"]
    return section(
        "Programs as XLA compiles them for an H100",
        setting["command"],
        setting,
        f"Not measured: read off what the compiler makes, without a GPU and without autotuning, at commit "
        f"{setting['commit']}. Steps are of rows of 4,096 tokens in bfloat16, the 8B ones of one row and with remat "
        "full; weights of the 1B steps are float32. A run fails where a number is above its bound.",
        table(["what", "found", "bound", "unit"], rows),
    )


SCALING_HEAD = """# From one GPU to thousands

What a training step costs on H100s of 80 GB, before there is one. Written by `make figures` from
`benchmarks/results/scaling.json`, which `python benchmarks/scaling.py` makes: it compiles the real step of
`train run` with XLA's own compiler for that GPU, as `python -m train plan CONFIG --gpu h100 --devices N` does for a
config of yours. **Nothing here was measured.** Memory and bytes are what the compiler has laid out; times are an
estimate from it.

What is assumed:

- {assumed}. The data sheet: 989 TFLOP/s in bfloat16, 3.35 TB/s, 450 GB/s of NVLink to the other GPUs of a host.
- Between hosts, eight adapters of 400 Gb/s a host carry each byte into the host once: 400 GB/s. No latency, no
  contention, no slow host. A cluster that shares its network, or rings of thousands of GPUs, are slower than this.
- bfloat16 arithmetic, cuDNN's attention, `remat = "full"`; AdamW in float32 on float32 weights for full training,
  bfloat16 or nf4 base weights under adapters of rank 16. All weights are sharded over `fsdp`, copies of that over
  `data`; no tensor or pipeline parallelism.
- Kernels are not autotuned.

"Published" is what another system reports of the same model, length and number of GPUs; its batch, remat and
parallelism differ from ours. It says whether the assumptions are of the right size, not which system is faster.
"""


def scaling(result: dict[str, Any]) -> str:
    """The text of docs/scaling.md."""
    costs, published = [], []
    for row in result["rows"]:
        what = [row["model"], row["method"], f"{row['devices']:,}"]
        mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1) or "-"
        speed = f"{row['tokens_per_second']:,.0f}"
        memory = [f"{row['state_gib']:.1f}", f"{row['total_gib']:.1f}", "yes" if row["fits"] else "no"]
        moved = [f"{row['gathered_gb']:.1f}", f"{row['reduced_gb']:.1f}", f"{row['waited_ms']:.0f}"]
        times = [f"{row['step_ms']:,.0f}", speed, f"{row['of_peak']:.0%}"]
        costs.append([*what, mesh, f"{row['rows']} x {row['length']}", *memory, *moved, *times])
        if row["published"]:
            ratio = f"{row['published'] / row['tokens_per_second']:.2f}"
            published.append([*what, row["length"], speed, f"{row['published']:,}", ratio, row["source"]])
    head = ["model", "method", "GPUs", "mesh", "rows of a GPU", "state, GiB", "all, GiB", "fits"]
    head += ["gathered, GB", "reduced, GB", "waited, ms", "step, ms", "tokens/s/GPU", "MFU"]
    versions = ", ".join(f"{name} {version}" for name, version in result["setting"]["versions"].items())
    return (
        "\n\n".join(
            [
                SCALING_HEAD.format(assumed=result["setting"]["assumed"]).strip(),
                f"`{result['setting']['command']}`, {versions}",
                table(head, costs),
                "Memory is of one GPU; `fits` leaves 8 % of it to the driver. Gathered and reduced are the bytes that "
                "each GPU takes part in, a step; waited is what runs beside nothing else. MFU is 6 N + 6 L H D S FLOP "
                "a token (4 N for frozen weights) of the bfloat16 peak.",
                "## Beside what others measured",
                table(
                    ["model", "method", "GPUs", "tokens", "estimate", "published", "of the estimate", "source"],
                    published,
                ),
            ]
        )
        + "\n"
    )


def gpu_dry_run(result: dict[str, Any]) -> str:
    compiled = [row for row in result["rows"] if "roofline_ms" in row]
    tiny = {row["name"]: row for row in result["rows"] if "ms" in row or "skipped" in row}
    rows = [
        [
            row["name"],
            f"{row['gib']:.2f}",
            f"{row['temporaries_gib']:.2f}",
            f"{row['roofline_ms']:.2f}",
            f"{row['predicted']:.2f} of {CEILINGS[row['of']]}",
            "no, for GPUs alone" if "skipped" in tiny.get(row["name"], {}) else "yes",
        ]
        for row in compiled
    ]
    return section(
        "The programs that benchmarks/gpu.py measures, compiled for an H100",
        result["setting"]["command"],
        result["setting"],
        "No GPU ran them. The time is a roofline of the compiled program; what part of a ceiling it should reach was "
        "written down before. Every program runs on CPU too, in tiny shapes, but where it is one for GPUs alone.",
        table(["program", "GiB", "of them temporaries", "roofline, ms", "predicted", "ran in tiny shapes"], rows),
    )


def with_fits(page: str, result: dict[str, Any]) -> str:
    """The text of docs/finetuning.md with the table of what fits as the result has it."""
    columns = [("full", 1), ("full", 8), ("LoRA", 1), ("QLoRA nf4", 1)]
    rows: dict[str, dict[tuple[str, int], str]] = {}
    for row in result["fits"]:
        card = next((f"{size} GB" for size in CARDS if row["total_gib"] <= 0.92 * size * 1e9 / 2**30), "none")
        cell = f"{row['state_gib']:.1f}, {row['total_gib']:.1f}: **{card}**"
        rows.setdefault(row["model"], {})[row["method"], row["devices"]] = cell
    head = ["model", *(f"{method}, {count} GPU{'s' * (count > 1)}" for method, count in columns)]
    made = table(head, [[model, *(cells[column] for column in columns)] for model, cells in rows.items()])
    before, after = page.index("| model | full"), page.index("\n\nA total")
    return page[:before] + made + page[after:]


def page() -> str:
    """The text of docs/figures.md."""
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json") if path.stem != "scaling"}
    parts = [
        decode(results["decode"]),
        train(results["train"]),
        jax_peer(results["jax_peer"]),
        lora([results["lora"], results["lora_huge"]]),
        quantized(results["quantized"]),
        quantized_7b(results["quantized_7b"]),
        serve(results["serve"]),
        *(speculative(results[name]) for name in ("speculative",) if name in results),  # may not have been run yet
        gguf(results["gguf"]),
        convert(results["convert"]),
        checkpoint(results["checkpoint"]),
        gpu_check(results["gpu_check"]),
        gpu_dry_run(results["gpu_dry_run"]),
    ]
    return "\n\n".join([HEAD.strip(), *parts]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    compiled = json.loads((RESULTS / "scaling.json").read_text())
    SCALING.write_text(scaling(compiled))
    FITS.write_text(with_fits(FITS.read_text(), compiled))
