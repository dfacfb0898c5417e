"""What an evaluation leaves: every answer, results.json, a picture, and the table on stdout."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cli.files import atomic_path, write_json
from cli.picture import picture
from cli.progress import progress
from infer.batch_output import Output, read_answers
from infer.evaluate.subject import Subject
from infer.evaluate.task import Answer, Scores, Task
from model.errors import PunaError
from model.json_file import read_json

STEP = 32  # questions between two writes
RESULTS, PICTURE = "results.json", "results.png"
BARS = 60  # more parts of a task than a picture can name


class Results:
    """The folder of a task's results: of each model its answers, and of all of them one results.json and one picture.

    Args:
        folder: made when the first answer is there; None keeps nothing.
        task: the task and its settings, the same for all models of a folder.
        overwrite: drop what the folder holds of a model that is evaluated again.

    Raises:
        PunaError: the folder holds results of another task, or of the same with other settings.
    """

    def __init__(self, folder: Path | None, task: Mapping[str, Any], overwrite: bool = False):
        self.folder, self._overwrite = folder, overwrite
        self._task = dict(task)
        self._models: dict[str, Any] = {}
        file = folder and folder / RESULTS
        if file and file.exists():
            earlier = read_json(file)
            if earlier.get("task") != self._task:
                raise PunaError(
                    f"{file} holds results of {json.dumps(earlier.get('task'))}, and asked for is "
                    f"{json.dumps(self._task)}: give another folder"
                )
            self._models = earlier["models"]

    @property
    def scores(self) -> dict[str, Scores]:
        """What is known of each model, earlier ones included."""
        return {name: Scores(one["scores"], one["groups"], one["questions"]) for name, one in self._models.items()}

    def answers(self, task: Task, limit: int | None, subject: Subject, name: str, header: Any) -> list[Answer]:
        """A model's answers, with progress on stderr: those that a folder holds are not asked for again.

        Args:
            task: the questions.
            limit: how many of them, the first ones; None for all.
            subject: who answers.
            name: what to call it.
            header: what it is: answers of another are never taken for its own.

        Raises:
            PunaError: the folder holds answers of something else under this name; or as the task.
        """
        count = len(task) if limit is None else min(limit, len(task))
        with progress(f"{task.name}: {name}", count, "questions") as advance:

            def ask(first: int) -> list[Answer]:
                found = list(task.answer(subject, first, min(first + STEP, count)))
                advance(len(found))
                return found

            if self.folder is None:
                return [one for first in range(0, count, STEP) for one in ask(first)]
            return self._kept(ask, count, name, header, advance)

    def _kept(
        self, ask: Callable[[int], list[Answer]], count: int, name: str, header: Any, advance: Callable[[int], None]
    ) -> list[Answer]:
        assert self.folder is not None
        path = self.folder / f"{name}.jsonl"
        known = self._models.get(name)
        if known is not None and path.exists() and not self._overwrite:
            if known["model"] != header:
                raise PunaError(
                    f"{path} holds the answers of another model, or of the same with other settings: give another "
                    "folder, or overwrite=True to replace them"
                )
            advance(count)
            return read_answers(path)
        said = {"task": self._task, "model": header}
        with Output(path, path.with_suffix(".rejects.jsonl"), said, self._overwrite) as output:
            if not output.complete:
                done = output.resume(range(1, count + 1))
                advance(done)
                for first in range(done, count, STEP):
                    for one in ask(first):
                        output.answer(one)
                output.finish()
        return read_answers(path)

    def add(self, name: str, header: Any, scores: Scores) -> None:
        """Writes a model's scores into results.json, the picture, and the files that the task's publishers ask for."""
        self._models[name] = {
            "model": header,
            "questions": scores.count,
            "scores": scores.overall,
            "groups": scores.groups,
        }
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, value in scores.files.items():
            own = self.folder / name
            own.mkdir(exist_ok=True)
            with atomic_path(own / file, overwrite=True) as path:
                write_json(path, value)
        with atomic_path(self.folder / RESULTS, overwrite=True) as path:
            write_json(path, {"task": self._task, "models": self._models})
        with atomic_path(self.folder / PICTURE, overwrite=True) as path:
            draw(path, self._task["task"], self.scores)


def table(task: str, found: Mapping[str, Scores]) -> Table:
    """One column for each model, one row for each score and each part of the task."""
    shown = Table(title=task, box=box.SIMPLE)
    shown.add_column("")
    for name in found:
        shown.add_column(name, justify="right")
    for values in (
        {name: scores.overall for name, scores in found.items()},
        {name: scores.groups for name, scores in found.items()},
        {name: {"questions": float(scores.count)} for name, scores in found.items()},
    ):
        for row in dict.fromkeys(row for scores in values.values() for row in scores):
            shown.add_row(row, *(_number(scores.get(row)) for scores in values.values()))
        shown.add_section()
    return shown


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.4f}"


def draw(path: Path, task: str, found: Mapping[str, Scores]) -> None:
    """A picture of the parts of a task, or of its first score where it has none: one bar for each model."""
    first = next(iter(next(iter(found.values())).overall), "")
    rows = list(dict.fromkeys(row for scores in found.values() for row in scores.groups))[:BARS]
    values = [
        [scores.groups.get(row, 0.0) for row in rows] if rows else [scores.overall.get(first, 0.0)]
        for scores in found.values()
    ]
    names = rows or [first]
    with picture(path, 8, 1.5 + 0.22 * len(names) * (1 + len(found))) as figure:
        axes = figure.subplots()
        width = 0.8 / len(found)
        for number, (name, own) in enumerate(zip(found, values, strict=True)):
            places = [row + (number - (len(found) - 1) / 2) * width for row in range(len(names))]
            axes.barh(places, own, height=width, label=name)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(f"{task}: {first}")
        axes.legend()
