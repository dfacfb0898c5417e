"""Tasks of lm-eval, by their names there (github.com/EleutherAI/lm-evaluation-harness)."""

from importlib import import_module
from pathlib import Path
from typing import Any

from infer.endpoint import one_line
from infer.evaluate.subject import Local, Remote, Subject
from infer.evaluate.task import Scores
from infer.evaluation import for_lm_eval
from model.errors import JobFailed, PunaError


def run(
    subject: Subject,
    task: str,
    shots: int | None = None,
    limit: int | None = None,
    include: Path | None = None,
    cache: Path | None = None,
    tokenizer: str | None = None,
) -> Scores:
    """What lm-eval finds of a model.

    Args:
        subject: the model. An endpoint is asked with lm-eval's own client.
        task: the name of a task or group.
        shots: examples before each question; None as the task says.
        limit: questions of each task, the first ones; None for all.
        include: a folder of further tasks, as YAML files.
        cache: a file that keeps every answer, so that an evaluation that was interrupted asks only for the rest.
        tokenizer: of an endpoint, a folder or Hub id for transformers; None asks the server.

    Raises:
        PunaError: lm-eval is not installed, or no such task.
        JobFailed: the task's data or the endpoint can't be reached.
    """
    lm = for_lm_eval(subject.evaluated) if isinstance(subject, Local) else _client(subject, tokenizer)
    try:  # after ours, whose error says how to install it
        simple_evaluate = import_module("lm_eval").simple_evaluate
        manager = import_module("lm_eval.tasks").TaskManager(include_path=str(include) if include else None)
    except ModuleNotFoundError as error:
        raise PunaError(f"lm-eval is not installed ({error.name} is missing): pip install 'puna[eval]'") from None
    if task not in manager.all_tasks:
        raise PunaError(f"--task {task}: neither one of ours nor one of lm-eval's {len(manager.all_tasks)}")
    in_template = isinstance(subject, Local) and subject.evaluated.template is not None
    try:
        found = simple_evaluate(
            lm,
            tasks=[task],
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            use_cache=None if cache is None else str(cache),
            apply_chat_template=in_template,
            log_samples=False,
        )
    except OSError as error:  # connections included
        raise JobFailed(f"{task}: {' '.join(str(error).split())}") from error
    results: dict[str, dict[str, Any]] = found["results"]
    own = {key: value for key, value in results.get(task, {}).items() if isinstance(value, float | int)}
    overall = {key.removesuffix(",none"): float(value) for key, value in own.items() if "_stderr" not in key}
    metric = next(iter(overall), None)
    groups = {
        name: float(values[key])
        for name, values in results.items()
        for key in values
        if name != task and key.removesuffix(",none") == metric
    }
    counts = found.get("n-samples", {})
    return Scores(overall, groups, sum(one["effective"] for one in counts.values()))


def _client(subject: Subject, tokenizer: str | None) -> Any:
    assert isinstance(subject, Remote)
    try:
        make = import_module("lm_eval.models.openai_completions").LocalCompletionsAPI
    except ModuleNotFoundError as error:
        raise PunaError(f"lm-eval is not installed ({error.name} is missing): pip install 'puna[eval]'") from None
    client = subject.endpoint.client
    own: dict[str, Any] = {}
    with one_line(client):
        lengths = {one.id: getattr(one, "max_model_len", None) for one in client.models.list()}
    if length := lengths.get(subject.endpoint.model):  # vLLM and ours say it; lm-eval takes 2,047 tokens otherwise
        own["max_length"] = length + 1  # it keeps a token for what a request must make
    if tokenizer:  # texts begin as transformers' tokenizer begins them, as they do for a model here
        own |= {"tokenizer": tokenizer, "tokenizer_backend": "huggingface", "add_bos_token": True}
    else:
        own["tokenizer_backend"] = "remote"
    made = make(
        base_url=f"{str(client.base_url).rstrip('/')}/completions",
        model=subject.endpoint.model,
        num_concurrent=subject.parallel,
        auth_token=client.api_key,
        header={"Authorization": f"Bearer {client.api_key}"},
        **own,
    )
    if not tokenizer:
        _begin_texts(made.tokenizer)
    return made


def _begin_texts(tokenizer: Any) -> None:
    """Lets a server's tokenizer put the beginning-of-text token first, which lm-eval asks servers to leave out."""
    encode, name, bos = tokenizer.encode, tokenizer.bos_token, tokenizer.bos_token_id

    def with_bos(text: str) -> list[int]:
        return encode(text) if bos is None or text.startswith(name) else [bos, *encode(text)]

    if tokenizer.tokenizer_info.get("add_bos_token") is False:
        return

    tokenizer.encode = with_bos
