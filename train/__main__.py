"""python -m train: run, launch, export, plan, check-mup, preview, settings, plot, prepare."""

from pathlib import Path
from typing import Annotated

import typer

from cli.command import main
from cli.files import at_home
from model.errors import PunaError
from train.config import load_config

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)

ConfigFile = Annotated[
    Path, typer.Argument(parser=at_home, metavar="CONFIG", help="The TOML file of the experiment; see settings.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, in place of what the file says.")]


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    axes: Annotated[
        list[str] | None, typer.Option("--sweep", metavar="KEY=A,B", help="Run all values; several make a grid.")
    ] = None,
    at_once: Annotated[int, typer.Option(metavar="N", help="Runs of --sweep at the same time, sharing the GPUs.")] = 1,
) -> None:
    """Train, or resume what run.output_dir holds."""
    if at_once != 1 and not axes:
        raise PunaError("--at-once is for the runs of --sweep: give --sweep too, or leave it out")
    if axes:
        from rich.console import Console

        from train.sweep import sweep

        table, all_done = sweep(config, overrides or (), axes, at_once)
        Console().print(table)
        raise typer.Exit(0 if all_done else 1)
    from train.loop import run as train

    train(load_config(config, overrides or ()))


@app.command()
def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option("-n", help="How many processes.")] = 1,
    cpu_devices: Annotated[int | None, typer.Option(help="Virtual CPU devices of each, in place of GPUs.")] = None,
    max_restarts: Annotated[int, typer.Option(help="Give up after so many without a new checkpoint.")] = 3,
    hang_minutes: Annotated[float, typer.Option(help="Restart after so long without a sign of life.")] = 30.0,
) -> None:
    """Train in several processes on this host, restarted from the last checkpoint after a death or a freeze."""
    from train.launch import launch as supervise

    run_dir = load_config(config, overrides or ()).run.output_dir
    arguments = [str(config), *(overrides or ())]
    raise typer.Exit(supervise(arguments, run_dir, processes, cpu_devices, max_restarts, hang_minutes))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(parser=at_home, metavar="RUN", help="The output_dir of a run.")],
    destination: Annotated[Path, typer.Argument(parser=at_home, metavar="DST", help="The folder to write.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint; the newest when not given.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a step of a run as its final/ would be: a Hugging Face folder, or a PEFT adapter's."""
    from train.export import export_step

    print(f"step {export_step(run, destination, step, overwrite)}: {destination}")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    devices: Annotated[int | None, typer.Option(help="How many; as few as [mesh] can be laid over by default.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Compile for it, h100 or h200, with the extra gpu-plan.")] = None,
) -> None:
    """Say what a step costs in memory, FLOPs and collectives, and which GPUs it fits, without running it.

    With --gpu the step is compiled by that GPU's compiler, which needs no GPU, and its time is estimated too.
    """
    from train.plan import plan as cost_report
    from train.plan_gpu import plan_for

    read = load_config(config, overrides or ())
    print(cost_report(read, devices) if gpu is None else plan_for(read, gpu, devices))


@app.command()
def check_mup(
    config: ConfigFile,
    overrides: Overrides = None,
    widths: Annotated[str, typer.Option(help="Values of model.hidden_size.")] = "64,128,256",
    steps: Annotated[int, typer.Option(help="How many each model is trained for.")] = 4,
    output: Annotated[
        Path, typer.Option("-o", "--output", parser=at_home, metavar="FILE", help="The picture to write.")
    ] = Path("check_mup.png"),
) -> None:
    """Say how far activations move in some steps of models of several widths; 1 where that depends on the width."""
    from rich.console import Console

    from train.check_mup import check_mup as check
    from train.check_mup import widths_of

    table, is_steady = check(load_config(config, overrides or ()), widths_of(widths), steps, output)
    Console().print(table)
    print(output)
    raise typer.Exit(0 if is_steady else 1)


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
def settings(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A section or a setting; all by default.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All, as docs/settings.md has them.")] = False,
) -> None:
    """Say what a configuration may set: the type, the default, the meaning and the source of every setting."""
    from train.settings import as_markdown, describe

    print(as_markdown() if markdown else describe(name), end="" if markdown else "\n")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(parser=at_home, metavar="RUN...", help="Folders of runs.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", parser=at_home, metavar="FILE", help="The picture to write.")
    ] = Path("training_loss.png"),
) -> None:
    """Draw the training loss of runs."""
    from train.plot import plot as draw

    draw(runs, output)
    print(output)


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Files, folders or Hub data sets, to be merged.")],
    destination: Annotated[
        Path, typer.Argument(parser=at_home, metavar="DESTINATION", help="A .json or .jsonl file to write.")
    ],
    clean: Annotated[bool, typer.Option("--clean", help="ShareGPT HTML to Markdown, whole exchanges only.")] = False,
    dedupe: Annotated[bool, typer.Option("--dedupe", help="Drop equal ids and equal first exchanges.")] = False,
    refusals: Annotated[bool, typer.Option("--without-refusals", help="Drop answers that refuse.")] = False,
    phrases: Annotated[
        Path | None, typer.Option(parser=at_home, metavar="FILE", help="Drop answers with one of this file's lines.")
    ] = None,
    script: Annotated[str | None, typer.Option(help="Keep what is mostly in it: latin, cjk, cyrillic, ...")] = None,
    max_length: Annotated[int | None, typer.Option(help="Split conversations to this many tokens.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(parser=at_home, metavar="FILE", help="Whose tokens --max-length counts.")
    ] = None,
    identity: Annotated[tuple[str, str] | None, typer.Option(help="NAME MAKER: add who the assistant is.")] = None,
    test: Annotated[
        Path | None, typer.Option(parser=at_home, metavar="FILE", help="A file for the held-out part.")
    ] = None,
    test_fraction: Annotated[float, typer.Option(help="How much is held out.")] = 0.05,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Clean, filter, de-duplicate and split conversations, in this order; print what became of them."""
    from train.data.prepare import prepare as prepare_data
    from train.data.prepare_steps import chosen_steps
    from train.data.prepare_steps import identity as identity_records

    steps = chosen_steps(clean, dedupe, refusals, phrases, script, max_length, tokenizer)
    added = list(identity_records(*identity)) if identity else []
    counts = prepare_data(sources, destination, steps, added, test, test_fraction, overwrite)
    for name, count in counts.items():
        print(f"{name}: {count}")


if __name__ == "__main__":
    main(app)
