"""`infer chat`: a conversation with a model or a server."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer

from cli.files import at_home
from infer.conversation import Conversation, load_conversation
from infer.load import find_model, load_engine, sampling, speculation, start_mesh
from infer.options import (
    ActivationsOption,
    AdapterOption,
    BlockOption,
    DoubleQuantOption,
    DraftOption,
    DtypeOption,
    MeshOption,
    MinPOption,
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
from infer.speaker import LocalModel, choose_template, room, running
from model.errors import PunaError


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
        Path | None,
        typer.Option("--load", parser=at_home, metavar="FILE", help="Go on with a conversation that !!save wrote."),
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
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    mesh: MeshOption = None,
    speculate: SpeculateOption = None,
    draft: DraftOption = None,
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
            "--activations": activations, "--adapter": adapter, "--speculate": speculate, "--draft": draft,
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
            form = quantization(quantize, block, double_quant, activations)
            source = find_model(cast(str, model), tokenizer, adapter or [])
            settings = sampling(source.generation, **options)
            template = choose_template(template or conversation.template, source.tokenizer, conversation.system)
            context, max_new_tokens = room(source.config, context, max_new_tokens)
            devices = start_mesh(mesh)
            proposals = speculation(speculate, draft, devices, dtype)
            engine = load_engine(source, {}, devices, dtype, form, rows=1, length=context, speculate=proposals)
            stack.enter_context(running(engine))
            speaker = LocalModel(engine, source.tokenizer, template, settings, max_new_tokens, source.eos_ids, note)
            conversation = replace(conversation, template=template)
        if sys.stdin.isatty():
            note("!!help lists the commands, Ctrl-D leaves")
            in_terminal(Chat(speaker, conversation, to_terminal if sys.stdout.isatty() else to_pipe))
        elif not in_pipe(Chat(speaker, conversation, to_pipe)):
            raise typer.Exit(1)
