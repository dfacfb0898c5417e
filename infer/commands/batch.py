"""`infer batch`: every line of a file."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.files import at_home
from infer.batch import Files, fingerprint, parse_shard, run_job, survey
from infer.batch_kinds import Settings, check_settings, choose_template
from infer.engine import Engine
from infer.load import LONGEST, find_model, load_engine, start_mesh
from infer.options import (
    ActivationsOption,
    AdapterOption,
    BlockOption,
    DoubleQuantOption,
    DtypeOption,
    MeshOption,
    MinPOption,
    ModelArgument,
    QuantizeOption,
    RepetitionPenaltyOption,
    TemperatureOption,
    TokenizerOption,
    TopKOption,
    TopPOption,
    quantization,
)
from model.errors import PunaError

KindName = Literal["auto", "openai", "wizardlm", "mt_bench", "vicuna", "prompt"]


def batch(
    model: ModelArgument,
    lines: Annotated[Path, typer.Argument(parser=at_home, metavar="IN.jsonl", help="One request a line.")],
    out: Annotated[
        Path, typer.Argument(parser=at_home, metavar="OUT.jsonl", help="One answer a line, in the order of the input.")
    ],
    kind: Annotated[KindName, typer.Option(help="What lines are; auto: as the first good line's keys say.")] = "auto",
    template: Annotated[str | None, typer.Option(help="How messages are written; the kind's own.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer; the kind's own.")] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: Annotated[int, typer.Option(help="Each line's seed is made of this and its line number.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End answers before this string; may be repeated.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests that are worked on at once.")] = 8,
    context: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt and answer; the model's, 4096 at most.")
    ] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Answer every N-th line alone, from I + 1 on.")] = "0/1",
    rejects: Annotated[
        Path | None,
        typer.Option(parser=at_home, metavar="FILE", help="Where bad lines go; OUT.rejects.jsonl if not given."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, or begin a changed job anew.")] = False,
    tokenizer: TokenizerOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    block: BlockOption = None,
    double_quant: DoubleQuantOption = False,
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    mesh: MeshOption = None,
) -> None:
    """Answer every line of a JSONL file.

    Kinds: OpenAI's batches (openai), WizardLM's test set (wizardlm), FastChat's questions (vicuna, mt_bench), and
    {"prompt": text, ...} (prompt). Each has the template, length and sampling settings of where it comes from; what is
    given here comes first, and what neither says comes from the model's generation_config.json. An answer ends where
    the context does, unless --max-new-tokens is given: then a line for which there is no room is refused.

    Bad lines go to the rejects with the reason, and never stop the job; their number is said at the end, and the exit
    code is 0. A bad body of an OpenAI request is answered with status 400. The same command after an interruption of
    any sort goes on where the job stood, and ends with the same bytes. Shards together hold the lines of the whole:
    `cat` puts them into one file.
    """
    form = quantization(quantize, block, double_quant, activations)
    files = Files(lines, out, rejects, parse_shard(shard))
    files.check()
    found = survey(lines, kind, files.shard)
    told = f", as line {found.told_by} tells" if kind == "auto" else ""
    print(f"{lines}: {found.lines} lines of kind {found.kind.name}{told}", file=sys.stderr)
    source = find_model(model, tokenizer, adapter or [])
    chosen = choose_template(template, found.kind, source.tokenizer)
    most = source.config.max_position_embeddings
    if context is not None and context > most:
        raise PunaError(f"--context is {context} and the model's {most} (max_position_embeddings): give a smaller one")
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    settings = Settings(
        model=Path(model).resolve().name if Path(model).exists() else model,
        tokenizer=source.tokenizer,
        template=chosen,
        eos_ids=source.eos_ids,
        length=context or min(LONGEST, most),
        generation=source.generation,
        given={name: value for name, value in options.items() if value is not None},
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        seed=seed,
    )
    check_settings(found.kind, settings)
    devices = start_mesh(mesh)

    def make_engine() -> Engine:
        return load_engine(source, {}, devices, dtype, form, rows=rows, length=settings.length, queue=2 * rows)

    header = {
        "model": fingerprint(source.checkpoint.file or source.checkpoint.folder),
        "adapters": [fingerprint(one.folder) for one in source.adapters],
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "name": settings.model,
        "template": None if chosen is None else template or chosen.name,
        "max_new_tokens": max_new_tokens,
        "context": settings.length,
        **options,
        "seed": seed,
        "stop": list(settings.stop),
        "dtype": dtype,
        "quantize": [quantize, block, double_quant, activations],
    }
    print(run_job(files, found, settings, header, rows, make_engine, overwrite))
