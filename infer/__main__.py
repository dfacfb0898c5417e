"""The commands that make text: `python -m infer generate MODEL --prompt TEXT`, `chat MODEL`, `serve MODEL`."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer

from cli.command import main
from infer.conversation import Conversation, load_conversation
from infer.engine import Engine, run_all
from infer.generate import check_room
from infer.load import (
    LONGEST,
    chat_template,
    find_model,
    load_engine,
    named_adapters,
    sampling,
    start_mesh,
)
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
    SeedOption,
    TemperatureOption,
    TokenizerOption,
    TopKOption,
    TopPOption,
    quantization,
)
from infer.request import Request
from infer.speaker import LocalModel, choose_template, room, running
from model.errors import PunaError

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def commands() -> None:
    """Text out of a model."""


@app.command()
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
    engine = load_engine(
        source, {}, devices, dtype, form, rows=min(len(requests), 8), length=longest, queue=len(requests)
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


@app.command()
def chat(
    model: Annotated[str | None, typer.Argument(help="Hub id (org/name[@revision]) or folder.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="URL of a server of OpenAI's API, instead of MODEL.")] = None,
    served: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Which of the endpoint's models; its only one if any.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Of the endpoint; else in the variable OPENAI_API_KEY.")] = None,
    template: Annotated[
        str | None, typer.Option(help="How messages are written; as the model's own chat template says if it has one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    load_from: Annotated[
        Path | None, typer.Option("--load", metavar="FILE", help="Go on with a conversation that !!save wrote.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a reply; 512, or half the context, when not given.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and reply; the model's, 4096 at most, when not given.")
    ] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    tokenizer: TokenizerOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    block: BlockOption = None,
    double_quant: DoubleQuantOption = False,
    int8_activations: Int8ActivationsOption = False,
    adapter: AdapterOption = None,
    mesh: MeshOption = None,
) -> None:
    """Talk with a model, or with a server of OpenAI's API.

    In a terminal, !!help lists the commands. Where stdin is no terminal, each of its lines is a message or a command
    (one that ends with a backslash goes on in the next), and replies alone go to stdout; the exit code is 1 if a line
    could not be done. Where a conversation outgrows the context, its oldest exchanges are left out of what the model
    reads, and a line says so. Sampling settings not given come from the model's generation_config.json, as in
    `generate`, or are the server's.
    """
    # prompt_toolkit and openai take long to import: no other command waits for them.
    from infer.chat import Chat, in_pipe, in_terminal, note, to_pipe, to_terminal

    if (model is None) == (endpoint is None):
        raise PunaError("MODEL and --endpoint each say who replies: give one of them")
    if model is None:
        others = {
            "--template": template, "--context": context, "--tokenizer": tokenizer, "--dtype": dtype, "--mesh": mesh,
            "--quantize": quantize, "--block": block, "--double-quant": double_quant,
            "--int8-activations": int8_activations, "--adapter": adapter,
        }  # fmt: skip
    else:
        others = {"--model": served, "--api-key": api_key}
    if wrong := [flag for flag, value in others.items() if value]:
        raise PunaError(f"{', '.join(wrong)}: of {'MODEL' if model is None else '--endpoint'} alone")
    conversation = Conversation() if load_from is None else load_conversation(load_from)
    conversation = replace(conversation, system=conversation.system if system is None else system)
    options = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    with ExitStack() as stack:
        if endpoint is not None:
            from infer.endpoint import connect

            speaker = stack.enter_context(connect(endpoint, served, api_key, max_new_tokens, options))
        else:
            form = quantization(quantize, block, double_quant, int8_activations)
            source = find_model(cast(str, model), tokenizer, adapter or [])
            settings = sampling(source.generation, **options)
            template = choose_template(template or conversation.template, source.tokenizer, conversation.system)
            context, max_new_tokens = room(source.config, context, max_new_tokens)
            devices = start_mesh(mesh)
            engine = load_engine(source, {}, devices, dtype, form, rows=1, length=context)
            stack.enter_context(running(engine))
            speaker = LocalModel(engine, source.tokenizer, template, settings, max_new_tokens, source.eos_ids, note)
            conversation = replace(conversation, template=template)
        if sys.stdin.isatty():
            note("!!help lists the commands, Ctrl-D leaves")
            in_terminal(Chat(speaker, conversation, to_terminal if sys.stdout.isatty() else to_pipe))
        elif not in_pipe(Chat(speaker, conversation, to_pipe)):
            raise typer.Exit(1)


@app.command()
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; its folder's name if not given.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH of a PEFT adapter, for requests by NAME.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="PUNA_API_KEY", help="Keys of which requests must bring one.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="How conversations are written; the checkpoint's own if any.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, max=1024, help="Requests worked on at once.")] = 8,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of a request; the model's, 4096 at most.")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused with 429.")] = 256,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds that a request may take.")] = None,
    tokenizer: TokenizerOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    block: BlockOption = None,
    double_quant: DoubleQuantOption = False,
    int8_activations: Int8ActivationsOption = False,
    mesh: MeshOption = None,
) -> None:
    """Serve the model over OpenAI's API, with a page to talk to it at /.

    SIGTERM ends it when the requests that it took are answered.
    """
    from infer.serve import engine_host, keep_programs  # only this command needs a web server
    from infer.serve import serve as run_server
    from infer.served import Served

    keep_programs()
    source = find_model(model, tokenizer)
    adapters = named_adapters(adapter or [])
    devices = start_mesh(mesh)
    form = quantization(quantize, block, double_quant, int8_activations)
    if context is not None and context > source.config.max_position_embeddings:
        raise PunaError(
            f"context={context} is more than the model's {source.config.max_position_embeddings}: give less"
        )
    limit = context or min(LONGEST, source.config.max_position_embeddings)

    def make() -> Engine:
        return load_engine(source, adapters, devices, dtype, form, rows=rows, length=limit, queue=queue)

    served = Served(
        name=name or source.name,
        host=engine_host(make),
        tokenizer=source.tokenizer,
        vocab_size=source.config.vocab_size,
        context=limit,
        eos_ids=source.eos_ids,
        generation=source.generation,
        template=chat_template(template, source.tokenizer),
        adapters={name: index for index, name in enumerate(adapters)},
        timeout=timeout,
    )
    run_server(served, host, port, api_key or [])


if __name__ == "__main__":
    main(app)
