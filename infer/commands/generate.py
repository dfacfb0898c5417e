"""`infer generate`: texts go on."""

from typing import Annotated

import typer

from infer.engine import run_all
from infer.generate import check_room
from infer.load import find_model, load_engine, sampling, speculation, start_mesh
from infer.options import (
    AdapterOption,
    BlockOption,
    DoubleQuantOption,
    DraftOption,
    DtypeOption,
    Int8ActivationsOption,
    MeshOption,
    MinPOption,
    ModelArgument,
    QuantizeOption,
    RepetitionPenaltyOption,
    SeedOption,
    SpeculateOption,
    TemperatureOption,
    TokenizerOption,
    TopKOption,
    TopPOption,
    quantization,
)
from infer.request import Request


def generate(
    model: ModelArgument,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; give several for a batch.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")] = None,
    tokenizer: TokenizerOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    block: BlockOption = None,
    double_quant: DoubleQuantOption = False,
    int8_activations: Int8ActivationsOption = False,
    adapter: AdapterOption = None,
    mesh: MeshOption = None,
    speculate: SpeculateOption = None,
    draft: DraftOption = None,
) -> None:
    """Print each prompt and its continuation, and nothing else.

    One prompt is printed as its text comes. The texts of several follow each other in order, with a line that holds
    one form feed between two. Settings not given come from the model's generation_config.json; without `do_sample` in
    it, and without --temperature, --top-k, --top-p or --min-p, the likeliest token is taken each time.
    """
    form = quantization(quantize, block, double_quant, int8_activations)
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
    requests = []
    for number, text in enumerate(prompt, 1):
        ids = source.tokenizer.encode(text, add_bos=source.tokenizer.bos_id is not None)
        check_room(f"prompt {number}", ids, max_new_tokens, source.config)
        requests.append(Request(ids, max_new_tokens, settings, source.eos_ids, tuple(stop or ())))
    devices = start_mesh(mesh)
    longest = max(len(request.prompt) for request in requests) + max_new_tokens
    proposals = speculation(speculate, draft, devices, dtype)
    engine = load_engine(
        source,
        {},
        devices,
        dtype,
        form,
        rows=min(len(requests), 8),
        length=longest,
        queue=len(requests),
        speculate=proposals,
    )
    alone = len(requests) == 1
    if alone:
        print(prompt[0], end="", flush=True)
    shown, texts = 0, [""] * len(requests)
    for progress in run_all(engine, requests):
        texts = [one.text for one in progress]
        if alone:
            print(texts[0][shown:], end="", flush=True)
            shown = len(texts[0])
    print() if alone else print("\n\f\n".join(map("".join, zip(prompt, texts, strict=True))))
