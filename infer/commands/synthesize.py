"""`infer synthesize`: training data that a model makes up."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.files import at_home, atomic_path, sha256_of
from cli.picture import picture
from cli.progress import progress
from infer.endpoint import connect
from infer.options import PriceOption, prices
from infer.synthesize import requests
from infer.synthesize.evol_instruct import EvolInstruct
from infer.synthesize.requests import Reply
from infer.synthesize.self_instruct import SelfInstruct, reasons

synthesize = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

OutArgument = Annotated[Path, typer.Argument(parser=at_home, metavar="OUT.jsonl", help="What is made.")]
EndpointOption = Annotated[str, typer.Option(help="URL of a server of OpenAI's API, infer serve included.")]
SeedsOption = Annotated[Path, typer.Option(parser=at_home, metavar="PATH", help="Tasks to begin with, JSON or JSONL.")]
ServedOption = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Which of the server's models.")]
KeyOption = Annotated[str | None, typer.Option(help="Else in the variable OPENAI_API_KEY.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Of a reply.")]
SeedOption = Annotated[int, typer.Option(help="Of every choice; requests have seeds of their own that follow from it.")]
ParallelOption = Annotated[int, typer.Option(min=1, max=256, help="Requests at once.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUT, or begin a changed job anew.")]


@synthesize.callback()
def commands() -> None:
    """Make up training data with a model behind OpenAI's API."""


@synthesize.command("self-instruct")
def self_instruct(
    out: OutArgument,
    endpoint: EndpointOption,
    seeds: SeedsOption,
    count: Annotated[int, typer.Option(min=1, help="Tasks to make.")],
    per_request: Annotated[int, typer.Option(min=4, max=100, help="Tasks of a list, three shown ones included.")] = 20,
    temperature: Annotated[float, typer.Option(help="Of the replies.")] = 1.0,
    max_new_tokens: TokensOption = 3072,
    seed: SeedOption = 0,
    served: ServedOption = None,
    api_key: KeyOption = None,
    price: PriceOption = None,
    parallel: ParallelOption = 4,
    overwrite: OverwriteOption = False,
) -> None:
    """Write tasks with inputs and outputs, as Alpaca made its data: the model continues lists of three seeds.

    Left out are tasks that text cannot do, that are too short or long, or too like one that is there (ROUGE-L above
    0.7); they go to OUT.rejects.jsonl with the reason. OUT.requests.jsonl keeps every reply, and the same command goes
    on after an interruption. OUT.png shows the verbs and objects.
    """
    settings = {"temperature": temperature, "seed": seed}
    with connect(endpoint, served, api_key, max_new_tokens, settings) as server:
        maker = SelfInstruct(server, seeds, count, per_request, seed)
        header = {"kind": "self-instruct", "model": server.model, "seeds": sha256_of(seeds), "per_request": per_request}
        _make(maker, out, header | settings | {"max_new_tokens": max_new_tokens}, count, parallel, overwrite, price)


@synthesize.command("evol-instruct")
def evol_instruct(
    out: OutArgument,
    endpoint: EndpointOption,
    seeds: SeedsOption,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every instruction is evolved.")] = 4,
    temperature: Annotated[float, typer.Option(help="Of the replies.")] = 1.0,
    max_new_tokens: TokensOption = 2048,
    seed: SeedOption = 0,
    served: ServedOption = None,
    api_key: KeyOption = None,
    price: PriceOption = None,
    parallel: ParallelOption = 4,
    overwrite: OverwriteOption = False,
) -> None:
    """Write harder instructions with answers, as WizardLM made its data: in each round, one of five ways for each.

    Evolutions that fail, the same instruction, one that speaks of itself, or one that gets no answer, go to
    OUT.rejects.jsonl with the reason. OUT.requests.jsonl keeps every reply, and the same command goes on after an
    interruption. OUT.png shows the verbs and objects.
    """
    settings = {"temperature": temperature, "seed": seed}
    with connect(endpoint, served, api_key, max_new_tokens, settings) as server:
        maker = EvolInstruct(server, seeds, rounds, seed)
        header = {"kind": "evol-instruct", "model": server.model, "seeds": sha256_of(seeds), "rounds": rounds}
        whole = header | settings | {"max_new_tokens": max_new_tokens}
        _make(maker, out, whole, maker.count, parallel, overwrite, price)


def _make(
    maker: SelfInstruct | EvolInstruct,
    out: Path,
    header: dict[str, Any],
    total: int,
    parallel: int,
    overwrite: bool,
    price: str | None,
) -> None:
    costs, kept = prices(price), out.with_suffix(".requests.jsonl")
    requests.check_free(out, kept, overwrite)
    tokens = [0, 0]
    with progress(header["kind"], total, "made") as advance:
        shown = 0

        def count(reply: Reply) -> None:
            nonlocal shown
            tokens[0] += reply["tokens"][0]
            tokens[1] += reply["tokens"][1]
            advance(len(maker.made) - shown)
            shown = len(maker.made)

        requests.run(maker, kept, header, lambda: _write(maker, out), parallel, overwrite, count)
    print(f"{out}: {len(maker.made):,} made, {len(maker.rejected):,} left out")
    for reason, times in reasons(maker.rejected).most_common():
        print(f"  {times:,} {reason}")
    cost = "" if costs is None else f", cost {(tokens[0] * costs[0] + tokens[1] * costs[1]) / 1e6:.2f}"
    print(f"{tokens[0]:,} tokens read, {tokens[1]:,} written{cost}")


def _write(maker: SelfInstruct | EvolInstruct, out: Path) -> None:
    for path, rows in ((out, maker.made), (out.with_suffix(".rejects.jsonl"), maker.rejected)):
        with atomic_path(path, overwrite=True) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with atomic_path(out.with_suffix(".png"), overwrite=True) as temporary:
        draw(temporary, [row["instruction"] for row in maker.made])


SKIPPED = set(
    "a an the this that these those following given your my me in of for to with on from and some any".split()
)


def verb_and_object(instruction: str) -> tuple[str, str]:
    """The first word of an instruction, and the first after it that may be what it is about: no grammar is read."""
    words = [word.strip(".,:;!?\"'()").lower() for word in instruction.split()]
    words = [word for word in words if word]
    rest = [word for word in words[1:] if word not in SKIPPED]
    return (words[0] if words else ""), (rest[0] if rest else "")


def draw(path: Path, instructions: Sequence[str], verbs: int = 20, objects: int = 4) -> None:
    """The most frequent first words of instructions, and within each its most frequent objects, as two rings."""
    pairs = Counter(map(verb_and_object, instructions))
    first = Counter[str]()
    for (verb, _), times in pairs.items():
        first[verb] += times
    inner = first.most_common(verbs)
    outer: list[tuple[str, int]] = []
    for verb, times in inner:
        own = Counter({object_: n for (other, object_), n in pairs.items() if other == verb}).most_common(objects)
        outer += [*own, ("", times - sum(n for _, n in own))]
    with picture(path, 8, 8) as figure:
        axes = figure.subplots()
        ring = {"wedgeprops": {"width": 0.35, "edgecolor": "white"}, "rotatelabels": True, "textprops": {"fontsize": 7}}
        axes.pie([n for _, n in outer], labels=[name for name, _ in outer], radius=1.0, labeldistance=1.02, **ring)
        axes.pie([n for _, n in inner], labels=[name for name, _ in inner], radius=0.65, labeldistance=0.55, **ring)
        axes.set_title(
            f"{len(instructions):,} instructions: the {len(inner)} most frequent first words and their objects"
        )
