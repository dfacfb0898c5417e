"""Perplexity of text: how likely a model finds it, token by token, in windows that slide over each document."""

import math
from collections.abc import Sequence
from pathlib import Path

from infer.evaluate.subject import Local, Subject
from infer.evaluate.task import Answer, Scores, check_file, read_records
from infer.evaluation import Evaluated
from model.errors import PunaError

Window = tuple[list[int], list[int]]  # what is only read, and what is scored after it


class Perplexity:
    """The documents of a file, cut into windows.

    Each window begins `stride` tokens after the one before it, and scores the tokens that none has scored: all but the
    first window read at least `window - stride` tokens before them. A document begins with the beginning-of-text token.

    Args:
        data: a text file, which is one document; or JSONL, each of whose records has a document under `text`.
        evaluated: the model, for its tokenizer and its room; None, an endpoint, is refused.
        window: tokens of a window; None for as many as the model has room for.
        stride: tokens between two windows; None for half a window.

    Raises:
        PunaError: no such file, `path:line: reason`, no text, a window or stride that can't be, or an endpoint.
    """

    name = "perplexity"

    def __init__(self, data: Path, evaluated: Evaluated | None, window: int | None = None, stride: int | None = None):
        if evaluated is None:
            raise PunaError("perplexity counts the tokens of a model's own tokenizer: give the model, not an endpoint")
        window = evaluated.length if window is None else window
        stride = max(1, window // 2) if stride is None else stride
        if not 2 <= window <= evaluated.length or not 1 <= stride < window:
            raise PunaError(
                f"--window is {window} and --stride {stride}: the model has room for {evaluated.length} tokens, and a "
                "stride is from 1 to less than a window"
            )
        self.windows: list[Window] = []
        self.bytes = 0
        for text in _documents(data):
            self.bytes += len(text.encode())
            self.windows += windows(evaluated.encode(text), evaluated.prefix_id, window, stride)
        if not self.windows:
            raise PunaError(f"{data} holds no text")

    def __len__(self) -> int:
        return len(self.windows)

    def answer(self, subject: Subject, first: int, last: int) -> list[Answer]:
        """See `Task`."""
        assert isinstance(subject, Local)
        asked = self.windows[first:last]
        found = subject.evaluated.scores(asked)
        return [{"logprob": score, "tokens": len(new)} for (_, new), (score, _) in zip(asked, found, strict=True)]

    def scores(self, answers: Sequence[Answer]) -> Scores:
        """Perplexity and loss (nats) per token, and bits per byte of the UTF-8 text."""
        tokens = sum(one["tokens"] for one in answers)
        nats = -math.fsum(one["logprob"] for one in answers)
        loss = nats / tokens
        overall = {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "loss": loss,
            "bits per byte": nats / math.log(2) / self.bytes,
            "tokens": float(tokens),
        }
        return Scores(overall, {}, len(answers))


def windows(ids: Sequence[int], prefix: int, window: int, stride: int) -> list[Window]:
    """The windows of one document, which together score each of its tokens once.

    Args:
        ids: the document's tokens; `prefix` goes before them where they do not begin with it.
        prefix: what the first token is scored after.
        window: tokens of a window.
        stride: tokens between the beginnings of two windows.
    """
    ids = list(ids) if ids and ids[0] == prefix else [prefix, *ids]
    found: list[Window] = []
    done = 1  # tokens that are scored, or need not be
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        if end > done:
            found.append((ids[begin:done], ids[done:end]))
            done = end
        if end == len(ids):
            break
    return found


def _documents(path: Path) -> list[str]:
    if path.suffix in (".jsonl", ".json"):
        return [record["text"] for record in read_records(path, {"text": str}) if record["text"]]
    check_file(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PunaError(f"{path}: {error}: give UTF-8 text, or JSONL") from None
    return [text] if text else []
