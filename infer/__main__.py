"""The commands that make text: `python -m infer generate MODEL --prompt TEXT`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.command import main
from infer.batch import Files, fingerprint, parse_shard, run_job, survey
from infer.batch_kinds import Settings, check_settings, choose_template
from infer.engine import Engine
from infer.generate import cache_dtype, check_room, complete
from infer.load import find_model, load, sampling, start_mesh
from infer.options import (
    AdapterOption,
    BlockOption,
    DoubleQuantOption,
    DtypeOption,
    Int8ActivationsOption,
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
from model.quantize import Format, quantizer

Dtype = Literal["float32", "bfloat16", "float16"]
KindName = Literal["auto", "openai", "wizardlm", "mt_bench", "vicuna", "prompt"]

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def commands() -> None:
    """Text out of a model."""


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Hub id (org/name[@revision]) or folder, of any format we read.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; give several for a batch.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this fraction as likely as the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes tokens seen less likely.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Where the model's folder has no tokenizer.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="What to compute in; as stored when not given.")] = None,
    quantize: Annotated[Format | None, typer.Option(help="What to quantize the linear weights to.")] = None,
    block: Annotated[int | None, typer.Option(help="int4: 32, 64 (if not given) or 128 weights to a scale.")] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf4: quantize its scales too.")] = False,
    int8_activations: Annotated[bool, typer.Option("--int8-activations", help="int8: round activations too.")] = False,
    adapter: Annotated[list[str] | None, typer.Option(help="PEFT adapter folder; several apply in order.")] = None,
    mesh: Annotated[str | None, typer.Option(help="Devices to split the model over, as tensor=2.")] = None,
) -> None:
    """Print each prompt and its continuation, and nothing else.

    One prompt is printed as its text comes. The texts of several follow each other in order, with a line that holds
    one form feed between two. Settings not given come from the model's generation_config.json; without `do_sample` in
    it, and without --temperature, --top-k, --top-p or --min-p, the likeliest token is taken each time.
    """
    if quantize is None and (block is not None or double_quant or int8_activations):
        raise PunaError("--block, --double-quant and --int8-activations are of --quantize: give it too")
    activations = "int8" if int8_activations else "float"
    form = None if quantize is None else quantizer(quantize, block or 64, double_quant, activations)
    source = find_model(model, tokenizer, adapter or [])
    settings = sampling(
        source.generation,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    for number, text in enumerate(prompt, 1):
        ids = source.tokenizer.encode(text, add_bos=source.tokenizer.bos_id is not None)
        check_room(f"prompt {number}", ids, max_new_tokens, source.config)
    devices = start_mesh(mesh)
    config, params = load(source, devices, dtype, form)
    pieces = complete(
        params,
        config,
        source.tokenizer,
        prompt,
        max_new_tokens,
        [settings] * len(prompt),
        source.eos_ids,
        stop or [],
        devices,
    )
    if len(prompt) == 1:
        print(prompt[0], end="", flush=True)
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        texts = ["".join(parts) for parts in zip(prompt, *pieces, strict=True)]
        print("\n\f\n".join(texts))


@app.command()
def batch(
    model: ModelArgument,
    lines: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One request a line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="One answer a line, in the order of the input.")],
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
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt and answer: memory; the context, at most 4096.")
    ] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Answer every N-th line alone, from I + 1 on.")] = "0/1",
    rejects: Annotated[Path | None, typer.Option(help="Where bad lines go; OUT.rejects.jsonl if not given.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, or begin a changed job anew.")] = False,
    tokenizer: TokenizerOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    block: BlockOption = None,
    double_quant: DoubleQuantOption = False,
    int8_activations: Int8ActivationsOption = False,
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
    form = quantization(quantize, block, double_quant, int8_activations)
    files = Files(lines, out, rejects, parse_shard(shard))
    files.check()
    found = survey(lines, kind, files.shard)
    told = f", as line {found.told_by} tells" if kind == "auto" else ""
    print(f"{lines}: {found.lines} lines of kind {found.kind.name}{told}", file=sys.stderr)
    source = find_model(model, tokenizer, adapter or [])
    chosen = choose_template(template, found.kind, source.tokenizer)
    context = source.config.max_position_embeddings
    if max_length is not None and max_length > context:
        raise PunaError(f"max_length is {max_length} and the model's context {context}: give a smaller --max-length")
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
        length=max_length or min(4096, context),
        generation=source.generation,
        given={name: value for name, value in options.items() if value is not None},
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        seed=seed,
    )
    check_settings(found.kind, settings)
    devices = start_mesh(mesh)

    def make_engine() -> Engine:
        config, params = load(source, devices, dtype, form)
        kept = cache_dtype(params)
        length = settings.length
        return Engine(
            params, config, source.tokenizer, rows=rows, length=length, queue=2 * rows, mesh=devices, cache_dtype=kept
        )

    header = {
        "model": fingerprint(source.checkpoint.file or source.checkpoint.folder),
        "adapters": [fingerprint(one.folder) for one in source.adapters],
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "name": settings.model,
        "template": None if chosen is None else template or chosen.name,
        "max_new_tokens": max_new_tokens,
        "max_length": settings.length,
        **options,
        "seed": seed,
        "stop": list(settings.stop),
        "dtype": dtype,
        "quantize": [quantize, block, double_quant, int8_activations],
    }
    print(run_job(files, found, settings, header, rows, make_engine, overwrite))


if __name__ == "__main__":
    main(app)
