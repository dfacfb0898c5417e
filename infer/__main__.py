"""The commands that make text: `python -m infer generate MODEL --prompt TEXT`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.command import main
from infer.generate import check_room, complete
from infer.load import find_model, load, sampling, start_mesh
from model.errors import PunaError
from model.quantize import Format, quantizer

Dtype = Literal["float32", "bfloat16", "float16"]

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


if __name__ == "__main__":
    main(app)
