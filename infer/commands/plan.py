"""`infer plan`: what decoding will cost on a GPU, before there is one."""

from typing import Annotated

import typer

from infer.options import BlockOption, DoubleQuantOption, DtypeOption, QuantizeOption, quantization


def plan(
    model: Annotated[str, typer.Argument(help="Hub id, folder of any format we read, or a preset, as llama3-8b.")],
    gpu: Annotated[str, typer.Option(help="The GPU to compile for: h100 or h200. None is needed.")],
    batch: Annotated[int, typer.Option(min=1, help="Texts that are made at once.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Positions of each: its prompt and its text.")] = 4096,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    block: BlockOption = None,
    double_quant: DoubleQuantOption = False,
) -> None:
    """Say what decoding and reading prompts cost in memory and time, as the GPU's own compiler lays them out.

    It comes with the extra gpu-plan; no weight is read. Times are a roofline with the assumptions said.
    """
    from infer.plan import plan as report

    print(report(model, gpu, batch, length, dtype, quantization(quantize, block, double_quant, None)))
