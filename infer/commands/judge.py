"""`infer judge`: which of two sets of answers a model prefers."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cli.files import at_home, atomic_path, sha256_of, write_json
from cli.picture import picture
from cli.progress import progress
from infer.batch_output import Output, read_answers
from infer.endpoint import Endpoint, connect
from infer.evaluate.judge import (
    Pair,
    Rate,
    position_bias,
    read_pairs,
    tokens_of,
    verdict,
    win_rates,
    winner,
)
from infer.options import PriceOption, prices
from model.errors import JobFailed, PunaError

STEP = 8  # questions between two writes


def judge(
    first: Annotated[Path, typer.Argument(parser=at_home, metavar="A.jsonl", help="Answers, as of infer batch.")],
    second: Annotated[Path, typer.Argument(parser=at_home, metavar="B.jsonl", help="The other answers.")],
    questions: Annotated[
        Path, typer.Option(parser=at_home, metavar="PATH", help="JSONL: Vicuna's questions or MT-bench's.")
    ],
    endpoint: Annotated[str, typer.Option(help="URL of the judge's server, of OpenAI's API.")],
    output: Annotated[
        Path,
        typer.Option(parser=at_home, metavar="DIR", help="Judgments, results and a picture; resumed if there."),
    ],
    served: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Which of the server's models.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Else in the variable OPENAI_API_KEY.")] = None,
    references: Annotated[
        Path | None,
        typer.Option(parser=at_home, metavar="PATH", help="JSONL of correct answers, shown to the judge."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a judgment.")] = 1024,
    price: PriceOption = None,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Requests at once.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Judge again what DIR holds.")] = False,
) -> None:
    """Print how often the answers of A win against those of B, in all and by category.

    The judge sees each pair twice, in both orders: an answer wins where it is preferred in both, else it is a tie. The
    win rate counts a tie as half a win; its 95 % interval is a bootstrap over the questions. Judgments that end
    without a verdict are counted and left out.
    """
    costs = prices(price)
    pairs = read_pairs(questions, first, second, references)
    path = output / "judgments.jsonl"
    header = {
        "first": sha256_of(first), "second": sha256_of(second), "questions": sha256_of(questions),
        "references": references and sha256_of(references), "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    with connect(endpoint, served, api_key, max_new_tokens, {"temperature": 0.0}) as server:
        header["judge"] = server.model
        if path.exists() and not overwrite:
            if _said(output) != header:
                raise PunaError(f"{path} holds judgments of other answers or settings: give another --output")
        else:
            _judge(pairs, server, path, header, parallel, overwrite)
    judged = read_answers(path)
    rates, (read, written) = win_rates(judged), tokens_of(judged)
    unread = sum(one["winner"] is None for one in judged)
    if not rates:
        raise JobFailed(f"{path}: no judgment ends in a verdict: take another judge, or a larger --max-new-tokens")
    results: dict[str, Any] = {
        "setting": header, "first": str(first), "second": str(second),
        "rates": {name: asdict(one) for name, one in rates.items()},
        "without verdict": unread, "position bias": position_bias(judged), "tokens": [read, written],
    }  # fmt: skip
    if costs is not None:
        results["cost"] = (read * costs[0] + written * costs[1]) / 1e6
    with atomic_path(output / "results.json", overwrite=True) as temporary:
        write_json(temporary, results)
    with atomic_path(output / "results.png", overwrite=True) as temporary:
        draw(temporary, first.stem, second.stem, rates)
    console = Console()
    console.print(table(first.stem, second.stem, rates))
    cost = f", cost {results['cost']:.2f}" if costs is not None else ""
    console.print(
        f"{len(judged)} questions, {unread} without a verdict; the same place preferred in both orders: "
        f"{results['position bias']:.0%}; {read:,} tokens read, {written:,} written{cost}"
    )


def _judge(
    pairs: list[Pair], server: Endpoint, path: Path, header: dict[str, Any], parallel: int, overwrite: bool
) -> None:
    def ask(both: tuple[Pair, bool]) -> tuple[str, list[int]]:
        pair, swapped = both
        text, tokens, _ = server.complete(pair.messages(swapped))
        return text, tokens

    with Output(path, path.with_suffix(".rejects.jsonl"), header, overwrite) as out:
        if out.complete:
            return
        done = out.resume(range(1, len(pairs) + 1))
        with progress("judging", len(pairs), "questions") as advance, ThreadPoolExecutor(parallel) as pool:
            advance(done)
            for start in range(done, len(pairs), STEP):
                several = pairs[start : start + STEP]
                found = list(pool.map(ask, [(pair, swapped) for pair in several for swapped in (False, True)]))
                for pair, one, other in zip(several, found[::2], found[1::2], strict=True):
                    verdicts = [verdict(one[0], False), verdict(other[0], True)]
                    out.answer({
                        "question_id": pair.id, "category": pair.category, "winner": winner(verdicts),
                        "verdicts": verdicts, "judgments": [one[0], other[0]],
                        "tokens": [sum(both) for both in zip(one[1], other[1], strict=True)],
                    })  # fmt: skip
                advance(len(several))
        out.finish()


def _said(output: Path) -> Any:
    try:
        return json.loads((output / "results.json").read_text(encoding="utf-8"))["setting"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def table(first: str, second: str, rates: dict[str, Rate]) -> Table:
    """One row for each category."""
    shown = Table(title=f"{first} against {second}", box=box.SIMPLE)
    for name in ("", "questions", "wins", "ties", "losses", "win rate", "95 %"):
        shown.add_column(name, justify="right" if name else "left")
    for name, one in rates.items():
        counts = (one.wins + one.ties + one.losses, one.wins, one.ties, one.losses)
        shown.add_row(name, *map(str, counts), f"{one.rate:.1%}", f"{one.low:.1%} to {one.high:.1%}")
    return shown


def draw(path: Path, first: str, second: str, rates: dict[str, Rate]) -> None:
    """Wins, ties and losses of each category as one bar."""
    with picture(path, 8, 1.5 + 0.35 * len(rates)) as figure:
        axes = figure.subplots()
        start = [0.0] * len(rates)
        for label, field, colour in (
            (f"{first} wins", "wins", "#2a78b5"), ("tie", "ties", "#bbbbbb"), (f"{second} wins", "losses", "#d1682e"),
        ):  # fmt: skip
            shares = [getattr(one, field) / (one.wins + one.ties + one.losses) for one in rates.values()]
            axes.barh(range(len(rates)), shares, left=start, label=label, color=colour)
            start = [a + b for a, b in zip(start, shares, strict=True)]
        axes.set_yticks(range(len(rates)), list(rates))
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of questions")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15 + 0.3 / len(rates)), ncols=3, frameon=False)
