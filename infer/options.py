"""Options that several commands of `infer` have: each is declared once here, with its help."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.files import at_home
from infer.load import Quantization
from model.errors import PunaError
from model.quantize import Activations, Format, quantizer

Dtype = Literal["float32", "bfloat16", "float16"]

# --- which model, and how its weights lie

ModelArgument = Annotated[str, typer.Argument(help="Hub id (org/name[@revision]) or folder, of any format we read.")]
TokenizerOption = Annotated[
    Path | None, typer.Option(parser=at_home, metavar="PATH", help="Where the model's folder has no tokenizer.")
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="What to compute in; as stored when not given.")]
QuantizeOption = Annotated[Format | None, typer.Option(help="What to quantize the linear weights to.")]
BlockOption = Annotated[int | None, typer.Option(help="int4: 32, 64 (if not given) or 128 weights to a scale.")]
DoubleQuantOption = Annotated[bool, typer.Option("--double-quant", help="nf4: quantize its scales too.")]
ActivationsOption = Annotated[
    Activations | None, typer.Option(help="What int8 and int4 weights are multiplied with; int8 rounds, and is faster.")
]
AdapterOption = Annotated[
    list[str] | None, typer.Option(help="PEFT adapter, folder or Hub id; several apply in order.")
]
MeshOption = Annotated[str | None, typer.Option(help="Devices to split the model over, as tensor=2.")]
SpeculateOption = Annotated[
    Literal["lookup"] | None,
    typer.Option(help="lookup: check several tokens at once where the text repeats itself; the same text, sooner."),
]
DraftOption = Annotated[
    str | None, typer.Option(help="A smaller model of the same tokenizer that proposes tokens; the same text, sooner.")
]

# --- what a server costs

PriceOption = Annotated[
    str | None, typer.Option(metavar="IN,OUT", help="Of a million tokens read and written, to say the cost.")
]

# --- how tokens are chosen

TemperatureOption = Annotated[float | None, typer.Option(help="0 takes the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")]
TopPOption = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")]
MinPOption = Annotated[float | None, typer.Option(help="Keep tokens this fraction as likely as the likeliest.")]
RepetitionPenaltyOption = Annotated[float | None, typer.Option(help="Above 1 makes tokens seen less likely.")]
SeedOption = Annotated[int | None, typer.Option(help="The same seed gives the same text; 0 when not given.")]


def quantization(
    quantize: Format | None, block: int | None, double_quant: bool, activations: Activations | None
) -> Quantization:
    """What the options of quantization ask `load` to do with the weights.

    Raises:
        PunaError: settings of a quantization without one, or not of this one.
    """
    if quantize is None and (block is not None or double_quant):
        raise PunaError("--block and --double-quant are of --quantize: give it too")
    if quantize == "nf4" and activations == "int8":
        raise PunaError("--activations int8: the codes of nf4 are no integers; give --quantize int8 or int4")
    make = None if quantize is None else quantizer(quantize, block or 64, double_quant)
    return Quantization(make, activations or "float")


def prices(text: str | None) -> tuple[float, float] | None:
    """What `--price` says a million tokens cost, read and written; None where it is not given.

    Raises:
        PunaError: it is not two numbers.
    """
    if text is None:
        return None
    try:
        read, written = map(float, text.split(","))
        if not (0 <= read < 1e9 and 0 <= written < 1e9):
            raise ValueError
        return read, written
    except ValueError:
        raise PunaError(f"--price {text}: give two numbers, as 2.5,10") from None
