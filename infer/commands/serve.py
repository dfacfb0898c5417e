"""`infer serve`: a model over OpenAI's API."""

from typing import Annotated

import typer

from infer.engine import Engine
from infer.load import LONGEST, chat_template, find_model, load_engine, named_adapters, speculation, start_mesh
from infer.options import (
    ActivationsOption,
    BlockOption,
    DoubleQuantOption,
    DraftOption,
    DtypeOption,
    MeshOption,
    ModelArgument,
    QuantizeOption,
    SpeculateOption,
    TokenizerOption,
    quantization,
)
from model.errors import PunaError


def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; its folder's name if not given.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=PLACE of a PEFT adapter, a folder or a Hub id.")
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
    activations: ActivationsOption = None,
    mesh: MeshOption = None,
    speculate: SpeculateOption = None,
    draft: DraftOption = None,
) -> None:
    """Serve the model over OpenAI's API, with a page to talk to it at /.

    SIGTERM ends it when the requests that it took are answered.
    """
    from infer.serve import engine_host, keep_programs  # only this command needs a web server
    from infer.serve import serve as run_server
    from infer.served import Served

    if not all(key.strip() for key in api_key or []):
        raise PunaError("an --api-key is empty, as of a variable that is not set: give a key, or no --api-key at all")
    keep_programs()
    source = find_model(model, tokenizer)
    adapters = named_adapters(adapter or [])
    devices = start_mesh(mesh)
    form = quantization(quantize, block, double_quant, activations)
    if context is not None and context > source.config.max_position_embeddings:
        raise PunaError(
            f"context={context} is more than the model's {source.config.max_position_embeddings}: give less"
        )
    limit = context or min(LONGEST, source.config.max_position_embeddings)

    def make() -> Engine:
        proposals = speculation(speculate, draft, devices, dtype)
        return load_engine(
            source, adapters, devices, dtype, form, rows=rows, length=limit, queue=queue, speculate=proposals
        )

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
