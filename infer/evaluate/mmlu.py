"""MMLU (Hendrycks et al., arXiv:2009.03300): 57 subjects, four choices each.

The prompts are those of the paper's code. The answer is the likeliest of the four letters as the next token.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from infer.evaluate.subject import Subject
from infer.evaluate.task import Answer, Scores, read_csv, read_records
from model.errors import PunaError

LETTERS = ("A", "B", "C", "D")
COLUMNS = ("question", *LETTERS, "answer")
MOST_SHOTS = 5  # the published examples of a subject

# Subjects by the paper's four categories; what is not named is "other".
STEM = {
    *("abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science"),
    *("college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering"),
    *("elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science"),
    *("high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning"),
}
HUMANITIES = {
    *("formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history"),
    *("international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy"),
    *("prehistory", "professional_law", "world_religions"),
}
SOCIAL_SCIENCES = {
    *("econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics"),
    *("high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology"),
    *("public_relations", "security_studies", "sociology", "us_foreign_policy"),
}


def category(subject: str) -> str:
    """The paper's category of a subject."""
    named = {"STEM": STEM, "humanities": HUMANITIES, "social sciences": SOCIAL_SCIENCES}
    return next((name for name, subjects in named.items() if subject in subjects), "other")


class Mmlu:
    """The questions of a folder or file.

    Args:
        data: the published folder, with `dev`, `val` and `test`, each of files SUBJECT_SPLIT.csv; or a JSON or JSONL
            file whose records have `subject`, `input` (the whole prompt) and `output` (the letter), as QLoRA's.
        shots: examples before each question, from `dev`. As in the paper's code, fewer where the model's context has
            no room for all.
        split: which of the folder's splits to ask; None for its test.

    Raises:
        PunaError: no such files, or `path:line: reason`.
    """

    name = "mmlu"

    def __init__(self, data: Path, shots: int = 5, split: str | None = None):
        self.questions: list[tuple[str, list[str], str]] = []  # subject, prompts with fewer and fewer examples, letter
        if data.is_dir():
            split = split or "test"
            if not 0 <= shots <= MOST_SHOTS:
                raise PunaError(f"--shots is {shots}: MMLU has 0 to {MOST_SHOTS} examples for each subject")
            for path in sorted((data / split).glob(f"*_{split}.csv")):
                self._read_subject(data, path, path.name.removesuffix(f"_{split}.csv"), shots)
        else:
            if split is not None:
                raise PunaError(f"{data} is one file, without splits: leave out --split, or give the folder")
            if shots:
                raise PunaError(
                    f"{data} holds whole prompts and no examples: give --shots 0, or the folder of CSV files"
                )
            for record in read_records(data, {"subject": str, "input": str, "output": str}):
                self.questions.append((record["subject"], [record["input"]], record["output"].strip()))
        if not self.questions:
            raise PunaError(
                f"{data}: no questions; give MMLU's folder with {split or 'test'}/SUBJECT_{split or 'test'}.csv"
            )
        if wrong := next((letter for *_, letter in self.questions if letter not in LETTERS), None):
            raise PunaError(f"{data}: an answer is {wrong!r}, which is none of {', '.join(LETTERS)}")

    def _read_subject(self, data: Path, path: Path, subject: str, shots: int) -> None:
        examples = read_csv(data / "dev" / f"{subject}_dev.csv", COLUMNS, header=False)[:shots] if shots else []
        intro = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        shown = [f"{question(one)} {one['answer']}\n\n" for one in examples]
        for row in read_csv(path, COLUMNS, header=False):
            prompts = [intro + "".join(shown[:count]) + question(row) for count in range(len(shown), -1, -1)]
            self.questions.append((subject, prompts, row["answer"]))

    def __len__(self) -> int:
        return len(self.questions)

    def answer(self, subject: Subject, first: int, last: int) -> list[Answer]:
        """See `Task`."""
        asked = self.questions[first:last]
        prompts = [
            next((one for one in map(subject.prompt, several) if subject.fits(one, 1)), subject.prompt(several[-1]))
            for _, several, _ in asked
        ]
        found = subject.choose(prompts, LETTERS, [": {}"])
        return [
            {"subject": name, "answer": LETTERS[row.argmax()], "right": letter}
            for (name, _, letter), row in zip(asked, found, strict=True)
        ]

    def scores(self, answers: Sequence[Answer]) -> Scores:
        """Accuracy over all questions (the paper's), its mean over subjects (QLoRA's), and by category and subject."""
        right: dict[str, list[bool]] = defaultdict(list)
        for one in answers:
            right[one["subject"]].append(one["answer"] == one["right"])
        everything = [value for values in right.values() for value in values]
        by_category: dict[str, list[bool]] = defaultdict(list)
        for name, values in right.items():
            by_category[category(name)] += values
        subjects = {name: _mean(values) for name, values in sorted(right.items())}
        overall = {"accuracy": _mean(everything), "mean over subjects": sum(subjects.values()) / len(subjects)}
        groups = {name: _mean(values) for name, values in sorted(by_category.items())}
        return Scores(overall, groups | subjects, len(everything))


def question(row: dict[str, str]) -> str:
    """A question as the paper's code writes it, up to where the letter goes."""
    choices = "".join(f"\n{letter}. {row[letter]}" for letter in LETTERS)
    return f"{row['question']}{choices}\nAnswer:"


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
