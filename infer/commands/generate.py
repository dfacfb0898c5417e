"""`infer generate`: texts go on."""

import sys
from collections import deque
from collections.abc import Iterator
from typing import Annotated

import typer

from infer.engine import run_all
from infer.generate import check_room
from infer.load import ModelSource, find_model, load_engine, sampling, speculation, start_mesh
from infer.options import (
    ActivationsOption,
    AdapterOption,
    BlockOption,
    DoubleQuantOption,
    DraftOption,
    DtypeOption,
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
from infer.sample import Sampling
from infer.speaker import choose_template, stripped
from model.chat import encode_prompt, get_template, stop_ids
from model.errors import PunaError


def generate(
    model: ModelArgument,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; give several for a batch.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages: answer under the template.")
    ] = False,
    template: Annotated[
        str | None, typer.Option(help="With --chat, in place of the model's own: a name, or a .jinja file.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="With --chat, a system message before the prompt.")] = None,
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
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    mesh: MeshOption = None,
    speculate: SpeculateOption = None,
    draft: DraftOption = None,
) -> None:
    """Print each prompt and its continuation, and nothing else; with --chat, each answer.

    One prompt is printed as its text comes. The texts of several follow each other in order, with a line that holds
    one form feed between two. Settings not given come from the model's generation_config.json; without `do_sample` in
    it, and without --temperature, --top-k, --top-p or --min-p, the likeliest token is taken each time.
    """
    form = quantization(quantize, block, double_quant, activations)
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
    if not chat and (template is not None or system is not None):
        raise PunaError("--template and --system are of --chat: give it too")
    requests = []
    for number, text in enumerate(prompt, 1):
        new = (max_new_tokens, settings, tuple(stop or ()))
        request = _asking(source, text, template, system, *new) if chat else _continuing(source, text, *new)
        check_room(f"prompt {number}", request.prompt, max_new_tokens, source.config)
        requests.append(request)
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
    shown, texts = 0, [""] * len(requests)

    def pieces() -> Iterator[str]:
        nonlocal shown, texts
        for progress in run_all(engine, requests):
            texts = [one.text for one in progress]
            yield texts[0][shown:]
            shown = len(texts[0])

    if len(requests) == 1:
        print("" if chat else prompt[0], end="", flush=True)
        for piece in stripped(pieces()) if chat else pieces():
            print(piece, end="", flush=True)
        print()
        return
    deque(pieces(), maxlen=0)
    whole = [text.strip() for text in texts] if chat else map("".join, zip(prompt, texts, strict=True))
    print("\n\f\n".join(whole))


def _continuing(source: ModelSource, text: str, new: int, settings: Sampling, stop: tuple[str, ...]) -> Request:
    """The request to go on with a text."""
    tokenizer = source.tokenizer
    if named := [token for token in tokenizer.special_tokens if len(token) > 3 and token in text]:
        print(
            f"the prompt holds {' and '.join(named[:3])} as text, not as the special token of that name: --chat writes "
            "a message under the model's template",
            file=sys.stderr,
        )
    ids = tokenizer.encode(text, add_bos=tokenizer.adds_bos)
    return Request(ids, new, settings, source.eos_ids, stop)


def _asking(
    source: ModelSource,
    text: str,
    template: str | None,
    system: str | None,
    new: int,
    settings: Sampling,
    stop: tuple[str, ...],
) -> Request:
    """The request to answer a user's message."""
    tokenizer = source.tokenizer
    chosen = get_template(choose_template(template, tokenizer, system), tokenizer)
    first = [] if system is None else [{"role": "system", "content": system}]
    ids = encode_prompt([*first, {"role": "user", "content": text}], chosen, tokenizer)
    ends = dict.fromkeys((*stop_ids(chosen, tokenizer), *source.eos_ids))
    return Request(ids, new, settings, tuple(ends), (*stop, *chosen.stop))
