"""`python -m convert`: models between formats, and what they hold."""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import typer

from cli.command import main
from cli.files import at_home
from cli.progress import progress
from convert import delta, manifest, merge, surgery, vocab
from convert.checkpoint import WriteOptions
from convert.describe import describe
from convert.formats import DTYPES, check_options, formats_help, open_model, option_help, quantize_help
from convert.peft import Adapter
from convert.save import write_model
from convert.source import find_source
from convert.verify import compare
from model.errors import PunaError

_SHARD_SIZE = option_help("max_shard_size", "bytes of one file (5GB if not given), as in 500MB or 2GiB.")
_SHARDS = option_help("shards", "model-parallel shards.")
_DTYPE = "float32, bfloat16 or float16; by default "
_OVERFLOW = "Let numbers beyond the dtype's range become infinite, where else they are an error."

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True, help=__doc__)
deltas = typer.Typer(no_args_is_help=True, help="What to add to a base model to give a fine-tuned one.")
app.add_typer(deltas, name="delta")
vocabularies = typer.Typer(no_args_is_help=True, help="Tokenizers that grow, and models that grow with them.")
app.add_typer(vocabularies, name="vocab")
operations = typer.Typer(no_args_is_help=True, help="Models made of other models' layers and weights.")
app.add_typer(operations, name="surgery")


@app.command()
def model(
    source: str = typer.Argument(metavar="SRC", help="A model of any format, a Hub id, a training run, or an adapter."),
    destination: Path = typer.Argument(parser=at_home, metavar="DST", help="The folder to write."),
    format: str = typer.Option(..., "--to", help=formats_help()),
    dtype: str | None = typer.Option(None, help=_DTYPE + "as stored."),
    quantize: str | None = typer.Option(None, help=quantize_help()),
    double_quant: bool | None = typer.Option(
        None,
        "--double-quant/--no-double-quant",
        help=option_help("double_quant", "quantize nf4's scales too (default)."),
    ),
    block: int | None = typer.Option(
        None, help=option_help("block", "32, 64 (if not given) or 128 weights to a scale of int4.")
    ),
    allow_overflow: bool = typer.Option(False, "--allow-overflow", help=_OVERFLOW),
    max_shard_size: str | None = typer.Option(None, help=_SHARD_SIZE),
    shards: int = typer.Option(1, min=1, help=_SHARDS),
    overwrite: bool = typer.Option(False, help="Replace DST where it exists."),
) -> None:
    """Convert a model. Memory stays at a few layers, whatever the size."""
    options = WriteOptions(
        dtype=dtype,
        allow_overflow=allow_overflow,
        quantize=quantize,
        block=block,
        double_quant=double_quant,
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
        shards=shards,
        bar=partial(progress, f"writing {destination.name}"),
    )
    check_options(format, options)
    found = find_source(source)
    if found.adapters:
        _merge(found.base or source, [*found.adapters], destination, format, options, overwrite)
        return
    checkpoint = found.checkpoint
    if checkpoint.quantized and quantize is not None:
        print(f"{source} is quantized already: what its numbers stand for is quantized again", file=sys.stderr)
    write_model(destination, replace(checkpoint, format=format), options, overwrite)


@app.command("merge")
def merge_command(
    paths: list[str] = typer.Argument(metavar="BASE ADAPTER... DST", help="Base, adapters (folders or Hub ids), DST."),
    format: str = typer.Option("hf", "--to", help=formats_help()),
    dtype: str | None = typer.Option(None, help=_DTYPE + "the base's."),
    allow_overflow: bool = typer.Option(False, "--allow-overflow", help=_OVERFLOW),
    max_shard_size: str | None = typer.Option(None, help=_SHARD_SIZE),
    shards: int = typer.Option(1, min=1, help=_SHARDS),
    overwrite: bool = typer.Option(False, help="Replace DST where it exists."),
) -> None:
    """Merge one or several PEFT adapters into a model, in order; vocabularies may grow on the way."""
    if len(paths) < 3:
        raise PunaError(f"merge needs BASE, at least one ADAPTER and DST; {len(paths)} given")
    base, *adapters, last = paths
    destination = at_home(last)
    options = WriteOptions(
        dtype=dtype,
        allow_overflow=allow_overflow,
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
        shards=shards,
        bar=partial(progress, f"writing {destination.name}"),
    )
    _merge(base, adapters, destination, format, options, overwrite)


def _merge(
    base: str,
    adapters: Sequence[str | Adapter],
    destination: Path,
    format: str,
    options: WriteOptions,
    overwrite: bool,
) -> None:
    merged = merge.merge_adapters(base, adapters, destination, format, options, overwrite)
    for name, error in merged.items():
        print(f"{name}: quantized again with a relative error of {error:.2%}", file=sys.stderr)


@app.command()
def inspect(
    path: str = typer.Argument(metavar="PATH", help="A model folder of any format, or a Hub id; or a training run."),
    verify: bool = typer.Option(False, "--verify", help="PATH is a training run: check every file it has saved."),
) -> None:
    """Print a model's config, sizes, dtypes, parameter count, and the SHA-256 of each of its files.

    With --verify, check the checkpoints of a training run; exit 1 where one is damaged.
    """
    if verify:
        _verify_run(str(at_home(path)))
        return
    for key, value in describe(open_model(path)):
        print(f"{key:<23} {value}")


def _verify_run(path: str) -> None:
    damage = manifest.verify(path)
    if not damage:
        raise PunaError(f"{path} holds no checkpoints: give the output_dir of a training run")
    for step, lines in damage.items():
        print(f"step {step}: " + ("; ".join(lines) or "every file is as it was written"))
    if any(damage.values()):
        raise typer.Exit(1)


@app.command()
def verify(
    a: str = typer.Argument(metavar="A"),
    b: str = typer.Argument(metavar="B"),
    tokens: int = typer.Option(32, min=0, help="Length of the text whose logits are compared; 0 compares none."),
    atol: float = typer.Option(
        0.0, min=0.0, help="The largest difference of a tensor that counts as equal; of logits, 1e-4 at least."
    ),
) -> None:
    """Compare two models of any formats: configs, tensors, logits, tokenizers. Exit 1 where they differ."""
    if not compare(a, b, tokens, atol):
        raise typer.Exit(1)


@deltas.command("make")
def make_delta(
    base: str = typer.Argument(metavar="BASE", help="The base model: a folder of any format, or a Hub id."),
    target: str = typer.Argument(metavar="TARGET", help="The fine-tuned model."),
    destination: Path = typer.Argument(parser=at_home, metavar="DST", help="The folder to write."),
    dtype: str | None = typer.Option(None, help="TARGET's by default. Vicuna's are float16, Alpaca's float32."),
    init: str | None = typer.Option(None, help="Rows of new tokens: zero (float16's default) or mean (float32's)."),
    allow_overflow: bool = typer.Option(False, "--allow-overflow", help=_OVERFLOW),
    overwrite: bool = typer.Option(False, help="Replace DST where it exists."),
) -> None:
    """Write TARGET - BASE with TARGET's tokenizer. FastChat and Alpaca's script read it; `apply` recovers every bit."""
    check_dtype(dtype)
    bar = partial(progress, f"writing {destination.name}")
    delta.make(base, target, destination, dtype, init, overwrite, bar, allow_overflow)


@deltas.command("apply")
def apply_delta(
    base: str = typer.Argument(metavar="BASE", help="The base model: a folder of any format, or a Hub id."),
    difference: str = typer.Argument(metavar="DELTA", help="A delta made here, or one published for Vicuna, Alpaca..."),
    destination: Path = typer.Argument(parser=at_home, metavar="DST", help="The folder to write."),
    init: str | None = typer.Option(None, help="Rows of new tokens, where DELTA does not say: zero or mean."),
    total: float | None = typer.Option(None, "--sum", help="What all numbers add up to, as Alpaca's 50637.1836."),
    sums: Path | None = typer.Option(
        None, "--sha256", parser=at_home, metavar="FILE", help="A list as sha256sum writes it, for the files written."
    ),
    allow_overflow: bool = typer.Option(False, "--allow-overflow", help=_OVERFLOW),
    overwrite: bool = typer.Option(False, help="Replace DST where it exists."),
) -> None:
    """Write BASE + DELTA with DELTA's tokenizer and the SHA-256 of every file."""
    bar = partial(progress, f"writing {destination.name}")
    delta.apply(base, difference, destination, init, total, sums, overwrite, bar, allow_overflow)


@vocabularies.command("merge")
def merge_vocabularies(
    base: Path = typer.Argument(parser=at_home, metavar="BASE.model", help="The SentencePiece model whose ids stay."),
    extra: Path = typer.Argument(parser=at_home, metavar="EXTRA.model", help="The one whose new pieces are appended."),
    destination: Path = typer.Argument(parser=at_home, metavar="DST.model", help="The file to write."),
    special: list[str] = typer.Option([], help="A piece to append at the end, as [PAD]; may be repeated."),
    overwrite: bool = typer.Option(False, help="Replace DST where it exists."),
) -> None:
    """Append a tokenizer's new pieces to another's, as Chinese-LLaMA-Alpaca did; print counts and SHA-256."""
    merged = vocab.merge_vocabularies(base, extra, destination, special, overwrite)
    print(f"{merged.base} + {merged.extra} pieces, {merged.added} of them new: {merged.total}")
    print(f"sha256 {merged.sha256}")


@vocabularies.command("resize")
def resize_vocabulary(
    source: str = typer.Argument(metavar="MODEL", help="A model of any format, or a Hub id."),
    destination: Path = typer.Argument(parser=at_home, metavar="DST", help="The folder to write, in MODEL's format."),
    tokenizer: Path = typer.Option(
        ..., parser=at_home, metavar="PATH", help="The tokenizer (file or folder) that the embeddings are to hold."
    ),
    init: str = typer.Option("mean", help="New rows: mean (of the old ones) or zero."),
    multiple: int = typer.Option(1, help="Pad the number of rows to a multiple of this."),
    overwrite: bool = typer.Option(False, help="Replace DST where it exists."),
) -> None:
    """Give a model's embeddings a row for every token of a larger tokenizer, and the tokenizer's files."""
    bar = partial(progress, f"writing {destination.name}")
    written = vocab.resize(source, destination, tokenizer, init, multiple, overwrite, bar)
    print(f"vocab_size {written.config.vocab_size}")


@operations.command("layers")
def keep_layers(
    source: str = typer.Argument(metavar="MODEL", help="A model of any format, or a Hub id."),
    destination: Path = typer.Argument(parser=at_home, metavar="DST", help="The folder to write, in MODEL's format."),
    keep: str = typer.Option(..., metavar="LAYERS", help="Its layers from first to last, as 0-11,20-31 or 0-15,8-23."),
    overwrite: bool = typer.Option(False, help="Replace DST where it exists."),
) -> None:
    """Drop, repeat or reorder a model's layers."""
    checkpoint = open_model(source)
    chosen = surgery.parse_layers(keep, checkpoint.config.num_hidden_layers)
    options = WriteOptions(bar=partial(progress, f"writing {destination.name}"))
    write_model(destination, surgery.with_layers(checkpoint, chosen), options, overwrite)
    print(f"num_hidden_layers {len(chosen)}")


@operations.command("average")
def average_models(
    paths: list[str] = typer.Argument(metavar="MODEL... DST", help="Models of one shape, and the folder to write."),
    method: str = typer.Option("linear", help=f"As mergekit defines it: {', '.join(surgery.METHODS)}."),
    base: str | None = typer.Option(None, help="What the models were trained from: for ties and dare."),
    weight: list[float] = typer.Option(
        [], help="Once for each model, 1 if not given; of slerp, the way to the second."
    ),
    density: float = typer.Option(1.0, help="The part of each model's differences from BASE that ties and dare keep."),
    seed: int = typer.Option(0, help="Chooses what dare keeps."),
    format: str = typer.Option("hf", "--to", help=formats_help()),
    overwrite: bool = typer.Option(False, help="Replace DST where it exists."),
) -> None:
    """Average the weights of models: model soups, SLERP, TIES, DARE."""
    *models, last = paths
    if len(models) < 1 + (base is None):
        raise PunaError(f"average needs two MODELs or more, or one and --base, and DST; {len(paths)} given")
    destination = at_home(last)
    default = (0.5,) if method == "slerp" else (1.0,) * len(models)
    how = surgery.Average(method, tuple(weight) or default, density, seed)
    options = WriteOptions(bar=partial(progress, f"writing {destination.name}"))
    surgery.average(models, destination, how, base, format, options, overwrite)


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise PunaError(f"--dtype {dtype} is not known; choose {', '.join(DTYPES)}")


def parse_size(text: str) -> int:
    """Bytes in "500MB" or "2GiB". Raises PunaError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise PunaError(f"--max-shard-size {text!r} is no size; write one as 500MB, 5GB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


if __name__ == "__main__":
    main(app)
