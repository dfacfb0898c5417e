"""The commands that make text: `python -m infer generate MODEL --prompt TEXT`, and chat, serve, batch, eval,
judge, plan and synthesize."""

import typer

from cli.command import main
from infer.commands.batch import batch
from infer.commands.chat import chat
from infer.commands.eval import evaluate
from infer.commands.generate import generate
from infer.commands.judge import judge
from infer.commands.plan import plan
from infer.commands.serve import serve
from infer.commands.synthesize import synthesize

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def commands() -> None:
    """Text out of a model."""


for command in (generate, chat, serve, batch, judge, plan):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(synthesize, name="synthesize")


if __name__ == "__main__":
    main(app)
