"""DialogSum (arXiv:2105.06762): summaries of dialogues, by ROUGE against up to three references."""

from collections.abc import Sequence
from pathlib import Path

from infer.evaluate.subject import Subject
from infer.evaluate.task import Answer, Scores, read_records
from model.errors import PunaError

INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
END = "### End"
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class DialogSum:
    """The dialogues of a file.

    Args:
        data: JSONL with `dialogue`, and `summary` or `summary1`, `summary2`, `summary3`.
        max_tokens: of a summary.

    Raises:
        PunaError: no such file, `path:line: reason`, or rouge-score is not installed.
    """

    name = "dialogsum"

    def __init__(self, data: Path, max_tokens: int = 100):
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ModuleNotFoundError as error:
            raise PunaError(f"{error.name} is not installed: pip install 'puna[eval]'") from None
        self._rouge = RougeScorer(list(KINDS), use_stemmer=True)
        self.max_tokens = max_tokens
        self.questions: list[tuple[str, list[str]]] = []
        for number, record in enumerate(read_records(data, {"dialogue": str}), 1):
            references = [value for name, value in record.items() if name.startswith("summary") and value]
            if not references or not all(isinstance(one, str) for one in references):
                raise PunaError(f"{data}:{number}: no summary to compare with")
            self.questions.append((record["dialogue"], references))
        if not self.questions:
            raise PunaError(f"{data}: no dialogues")

    def __len__(self) -> int:
        return len(self.questions)

    def answer(self, subject: Subject, first: int, last: int) -> list[Answer]:
        """See `Task`."""
        asked = self.questions[first:last]
        prompts = [subject.prompt(prompt(dialogue)) for dialogue, _ in asked]
        texts = subject.texts(prompts, self.max_tokens, [END])
        return [self._scored(text.strip(), references) for text, (_, references) in zip(texts, asked, strict=True)]

    def _scored(self, text: str, references: list[str]) -> Answer:
        several = [self._rouge.score(reference, text) for reference in references]
        return {"text": text} | {kind: sum(one[kind].fmeasure for one in several) / len(several) for kind in KINDS}

    def scores(self, answers: Sequence[Answer]) -> Scores:
        """The mean F-measure in percent, of a summary the mean over its references."""
        means = {kind: 100 * sum(one[kind] for one in answers) / len(answers) for kind in KINDS}
        return Scores(means, {}, len(answers))


def prompt(dialogue: str) -> str:
    """The prompt of the QLoRA recipe for DialogSum."""
    return "\n\n".join((f"\n{INTRO}", "### Instruct: Summarize the below conversation.", dialogue, "### Output:\n"))
