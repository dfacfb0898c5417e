"""python -m train: run, launch, plan, preview, plot, prepare."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from convert.command import main
from train.config import load_config

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)

ConfigFile = Annotated[Path, typer.Argument(help="The TOML file of the experiment.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, in place of what the file says.")]


@app.command()
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train, or resume what run.output_dir holds."""
    from train.loop import run as train
    from train.record import NonFinite

    try:
        train(load_config(config, overrides or ()))
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(help="How many examples to show.")] = 3,
) -> None:
    """Show the examples as the model sees them, what is trained on in colour."""
    from train.preview import preview as show

    show(load_config(config, overrides or ()), examples)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture to write.")] = Path("training_loss.png"),
) -> None:
    """Draw the training loss of runs."""
    from train.metrics import plot as draw

    draw(runs, output)
    print(output)


if __name__ == "__main__":
    main(app)
