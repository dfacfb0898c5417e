"""`infer eval`: how well models do a task."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cli.files import at_home
from infer.batch import fingerprint
from infer.evaluate import harness
from infer.evaluate.ceval import CEval, Decoding
from infer.evaluate.dialogsum import DialogSum
from infer.evaluate.mmlu import Mmlu
from infer.evaluate.perplexity import Perplexity
from infer.evaluate.results import Results, table
from infer.evaluate.subject import Local, Remote, Subject
from infer.evaluate.task import Task
from infer.evaluation import Evaluated
from infer.load import LONGEST, chat_template, find_model, load_engine, start_mesh
from infer.options import (
    ActivationsOption,
    AdapterOption,
    BlockOption,
    DoubleQuantOption,
    DtypeOption,
    MeshOption,
    QuantizeOption,
    TokenizerOption,
    quantization,
)
from model.errors import PunaError

# Our own tasks, and which options each reads; all others are lm-eval's.
READS = {
    "perplexity": ("--data", "--window", "--stride"),
    "mmlu": ("--data", "--shots", "--split"),
    "ceval": ("--data", "--shots", "--split", "--decode"),
    "dialogsum": ("--data", "--max-new-tokens"),
}
HARNESS_READS = ("--shots", "--include")


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Hub ids, folders, or URLs of servers; NAME=MODEL names one."),
    ],
    task: Annotated[str, typer.Option(help=f"{', '.join(READS)}, or the name of a task of lm-eval.")],
    data: Annotated[Path | None, typer.Option(parser=at_home, metavar="PATH", help="Of our own tasks.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=at_home, metavar="DIR", help="Answers, results.json and a picture; resumed if there."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; 5, or as lm-eval's task says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first N questions only.")] = None,
    split: Annotated[str | None, typer.Option(help="mmlu: test if not given; ceval: val.")] = None,
    decode: Annotated[
        Decoding | None, typer.Option(help="ceval: take the likeliest letter, or find it in a text.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="perplexity: tokens of a window; what there is room for.")] = None,
    stride: Annotated[int | None, typer.Option(help="perplexity: tokens between windows; half a window.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="dialogsum: of a summary; 100.")] = None,
    include: Annotated[
        Path | None, typer.Option(parser=at_home, metavar="DIR", help="Further tasks of lm-eval, as YAML files.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Ask in this chat template; chat_template is the checkpoint's own.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of a question; the model's, 4096 at most.")] = None,
    rows: Annotated[int, typer.Option(min=1, max=1024, help="Questions worked on at once.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Evaluate again what DIR holds.")] = False,
    served: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Which of a server's models.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Of servers; else in the variable OPENAI_API_KEY.")] = None,
    tokenizer: TokenizerOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    block: BlockOption = None,
    double_quant: DoubleQuantOption = False,
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    mesh: MeshOption = None,
) -> None:
    """Print how well models do a task: a table, one column for each.

    perplexity: of a text file, or of each `text` of a JSONL file, in sliding windows; bits per byte too. mmlu and
    ceval: of their published folders. dialogsum: ROUGE against all references of its JSONL file. Any other name is a
    task of lm-eval ('puna[eval]'). A URL is asked as OpenAI's API has it, where a task needs no more than that.

    With --output every answer is kept as it comes, the same command goes on after an interruption, and models that the
    folder already holds stand in the table beside the new ones.
    """
    form = quantization(quantize, block, double_quant, activations)
    _check(task, {
        "--data": data, "--shots": shots, "--split": split, "--decode": decode, "--window": window,
        "--stride": stride, "--max-new-tokens": max_new_tokens, "--include": include,
    })  # fmt: skip
    settings = {
        "task": task, "data": str(data) if data else None, "shots": shots, "split": split, "decode": decode,
        "window": window, "stride": stride, "max_new_tokens": max_new_tokens, "limit": limit, "template": template,
    }  # fmt: skip
    results = Results(output, {name: value for name, value in settings.items() if value is not None}, overwrite)
    named = _named(models)
    if not any(map(_is_url, named.values())) and (served or api_key):
        raise PunaError("--model and --api-key are of servers, and no MODEL is the URL of one")
    if task == "perplexity" and template is not None:
        raise PunaError("--task perplexity does not read --template: a text is no conversation")
    if output is not None and output.exists() and not output.is_dir():
        raise PunaError(f"--output {output} is a file: give a folder")
    devices = start_mesh(mesh)

    def questions(evaluated: Evaluated | None) -> Task:
        assert data is not None
        match task:
            case "perplexity":
                return Perplexity(data, evaluated, window, stride)
            case "mmlu":
                return Mmlu(data, 5 if shots is None else shots, split)
            case "ceval":
                chosen = decode or "constrained"
                return CEval(data, 5 if shots is None else shots, split or "val", chosen, template is not None)
            case _:
                return DialogSum(data, max_new_tokens or 100)

    # What is wrong with the data is said before any weight is read. Perplexity's questions are a tokenizer's.
    asked = questions(None) if task in READS and task != "perplexity" else None

    def local(place: str) -> tuple[Subject, dict[str, Any]]:
        source = find_model(place, tokenizer, adapter or [])
        length = min(context or LONGEST, source.config.max_position_embeddings)
        found = None if template is None else chat_template(template, source.tokenizer)
        engine = load_engine(source, {}, devices, dtype, form, rows=rows, length=length)
        evaluated = Evaluated(engine, source.tokenizer, found, source.eos_ids)
        header = {
            "model": fingerprint(source.checkpoint.file or source.checkpoint.folder),
            "adapters": [fingerprint(one.folder) for one in source.adapters],
            "tokenizer": None if tokenizer is None else str(tokenizer),
            "context": length,
            "dtype": dtype,
            "quantize": [quantize, block, double_quant, activations],
        }
        return Local(evaluated, devices), header

    for name, place in named.items():
        with ExitStack() as stack:
            if _is_url(place):
                from infer.endpoint import connect

                endpoint = stack.enter_context(connect(place, served, api_key, None, {}))
                subject, header = Remote(endpoint), {"endpoint": place, "model": endpoint.model}
            else:
                subject, header = local(place)
            if task in READS:
                own = asked or questions(subject.evaluated if isinstance(subject, Local) else None)
                scores = own.scores(results.answers(own, limit, subject, name, header))
            else:
                cache = None if output is None else output / f"{name}.cache"
                place = None if tokenizer is None else str(tokenizer)
                scores = harness.run(subject, task, shots, limit, include, cache, place)
            results.add(name, header, scores)
    Console().print(table(task, results.scores))


def _check(task: str, given: dict[str, Any]) -> None:
    """Refuses what is given and the task does not read."""
    reads = READS.get(task, HARNESS_READS)
    if wrong := [flag for flag, value in given.items() if value is not None and flag not in reads]:
        raise PunaError(f"--task {task} does not read {', '.join(wrong)}")
    if task in READS and given["--data"] is None:
        raise PunaError(f"--task {task} needs --data: see --help")


def _named(models: list[str]) -> dict[str, str]:
    """The models by what to call them: NAME of NAME=MODEL, else the last part of a path, of `final` the one before."""
    found: dict[str, str] = {}
    for text in models:
        name, equals, place = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            place = text
            path = Path(text.rstrip("/")) if _is_url(text) else Path(text).expanduser().resolve()
            name = path.parent.name if path.name == "final" else path.name
        if not name or not place:
            raise PunaError(f"{text}: give a model, or NAME=MODEL")
        if name in found:
            raise PunaError(f"{text}: a second model named {name!r}: name it, as other={place}")
        found[name] = place
    return found


def _is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))
