"""A model as lm-eval measures it (github.com/EleutherAI/lm-evaluation-harness), over the engine.

Numbers are those of lm-eval's `hf` backend on the same checkpoint, so what happens to text is what happens there: text
that spells a special token is that token, and a context that is too long loses its beginning. The ids of plain text
are those of our tokenizer, though: SentencePiece's own where transformers' conversion of it differs, after special
tokens and in leading spaces. lm-eval is imported by `for_lm_eval` alone.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from infer.engine import Engine
from infer.request import Progress, Request
from infer.sample import Sampling
from model.chat import Template, special_ids
from model.errors import JobFailed, PunaError
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

DEFAULT_TOKENS = 256  # of a text whose task does not say, as in lm-eval's backends
SAMPLED = ("temperature", "top_k", "top_p", "min_p")


class Evaluated:
    """Scores and texts from an engine that this object alone steps.

    Args:
        engine: the model.
        tokenizer: the model's.
        template: how conversations are written; None where tasks are asked for without one.
        eos_ids: the tokens that end a text; None for the tokenizer's own.
        add_bos: whether texts begin with the beginning-of-text token; None for the tokenizer's own rule.
        seed: of texts that a task samples; each request adds its number.

    Raises:
        PunaError: the tokenizer has no token to begin a text with, and none to end it.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template | None = None,
        eos_ids: Sequence[int] | None = None,
        add_bos: bool | None = None,
        seed: int = 0,
    ):
        prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if prefix is None:
            raise PunaError(
                "the tokenizer has neither a bos_token nor an eos_token, and lm-eval scores a text after one of them: "
                "name one in tokenizer_config.json"
            )
        self.engine, self.tokenizer, self.template, self.prefix_id = engine, tokenizer, template, prefix
        own_end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self._eos_ids = own_end if eos_ids is None else tuple(eos_ids)
        self._add_bos = tokenizer.adds_bos if add_bos is None else add_bos
        self._seed = seed
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._names = {id: name for name, id in tokenizer.special_tokens.items()}

    @property
    def length(self) -> int:
        """Tokens that the model reads at most."""
        return self.engine.length

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The token ids of a text, names of special tokens being those tokens.

        Args:
            text: what to encode.
            add_bos: whether to put the beginning-of-text token first; None does as the constructor says, but never
                before a text that names that token itself.
        """
        if add_bos is None:
            add_bos = self._add_bos and not text.startswith(self._names[self.prefix_id])
        ids, start = self.tokenizer.encode("", add_bos), 0
        for match in self._special.finditer(text):
            if match.start() > start:
                ids += self.tokenizer.encode(text[start : match.start()])
            ids.append(self.tokenizer.special_tokens[match[0]])
            start = match.end()
        return ids + self.tokenizer.encode(text[start:]) if start < len(text) else ids

    def scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context.

        Args:
            pairs: token ids of a context, at least one, and of its continuation, at least one and at most `length`.
                A context that is too long loses its beginning.

        Returns:
            The sum of the continuation's log-probabilities, and whether each of its tokens is the likeliest.

        Raises:
            PunaError: a context or a continuation is empty, or a continuation longer than `length`.
        """
        requests = []
        for context, continuation in pairs:
            if not context or not 0 < len(continuation) <= self.length:
                raise PunaError(
                    f"a context has {len(context)} tokens and its continuation {len(continuation)}: each needs one, "
                    f"and a continuation may have {self.length}, which the engine has room for"
                )
            whole = [*context, *continuation][-(self.length + 1) :]
            requests.append(Request(whole, 0, score_prompt=True, logprobs=1))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)

        def keep(number: int, progress: Progress) -> None:
            scores = progress.prompt_logprobs[-len(pairs[number][1]) :]
            if not all(one.top and math.isfinite(one.logprob) for one in scores):
                raise JobFailed("the model's logits are not finite: see what `convert inspect` and `verify` say of it")
            found[number] = sum(one.logprob for one in scores), all(one.token == one.top[0][0] for one in scores)

        self._run(requests, keep)
        return found

    def texts(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What follows each context.

        Args:
            asked: contexts with their settings: `max_gen_toks`, `until` (strings or names of special tokens that end
                the text), `do_sample`, and fields of `Sampling`, of which a text that is not sampled uses the
                penalties. A context that leaves no room for `max_gen_toks` loses its beginning.

        Returns:
            The texts, without what ended them.

        Raises:
            PunaError: a setting is not known, or out of its range.
        """
        requests, found = [], [""] * len(asked)
        for number, (context, settings) in enumerate(asked):
            given = dict(settings)
            count = given.pop("max_gen_toks", DEFAULT_TOKENS)
            if not 0 < count < self.length:
                raise PunaError(
                    f"max_gen_toks is {count}: give a number from 1 to {self.length - 1}, with room for text"
                )
            until = [text for text in given.pop("until", ()) if text]
            specials = self.tokenizer.special_tokens
            ends = (*self._eos_ids, *(specials[text] for text in until if text in specials))
            prompt = self.encode(context)[-(self.length - count) :] or [self.prefix_id]
            sampling = self._sampling(given, number)
            requests.append(Request(prompt, count, sampling, tuple(dict.fromkeys(ends)), tuple(until)))

        def keep(number: int, progress: Progress) -> None:
            # Decoded anew, without the space that SentencePiece puts before a text.
            text = self.tokenizer.decode(progress.tokens)
            found[number] = min((text.split(stop)[0] for stop in progress.request.stop), key=len, default=text)

        self._run(requests, keep)
        return found

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text, which `encode` reads as the template meant it.

        Args:
            messages: its turns.
            add_generation_prompt: whether a reply is to follow; else the last turn goes on, and what would end it is
                left out, as transformers' `continue_final_message` does.

        Raises:
            PunaError: there is no template, or it has no place for these turns, or it changes the text of the last.
        """
        if self.template is None:
            raise PunaError("conversations are asked for and the model has no chat template: name one with --template")
        pieces = self.template.render([dict(message) for message in messages], add_generation_prompt)
        text = "".join(self._name(piece.text) if piece.special else piece.text for piece in pieces)
        if add_generation_prompt:
            return text
        last = messages[-1]["content"].lstrip()
        start = text.rfind(last.rstrip())
        if start < 0:
            raise PunaError(
                "the chat template changes the last turn, which is to go on: evaluate without its beginning"
            )
        return text[: start + len(last if text.startswith(last, start) else last.rstrip())]

    def _name(self, special: str) -> str:
        return "".join(self._names[id] for id in special_ids(special, self.tokenizer))

    def _sampling(self, given: dict[str, Any], number: int) -> Sampling:
        if not given.pop("do_sample", given.get("temperature", 0) > 0):
            given = {name: value for name, value in given.items() if name not in SAMPLED}
        given = {name: value for name, value in given.items() if value is not None}
        seed = (given.pop("seed", self._seed) + number) % 2**63
        try:
            return Sampling(**given, seed=seed)
        except TypeError:
            unknown = ", ".join(sorted(given.keys() - Sampling.__dataclass_fields__.keys()))
            raise PunaError(
                f"a task asks for {unknown}, which is not supported: leave it out of generation_kwargs"
            ) from None

    def _run(self, requests: Sequence[Request], keep: Callable[[int, Progress], None]) -> None:
        """Runs all requests; `keep` is called with the number and the progress of each that has ended."""
        waiting = deque(enumerate(requests))

        def changed(number: int) -> Callable[[Progress], None]:
            return lambda progress: keep(number, progress) if progress.finish is not None else None

        while waiting or self.engine.busy:
            while waiting and self.engine.waiting < self.engine.queue:
                number, request = waiting.popleft()
                self.engine.submit(request, changed(number))
            self.engine.step()


def for_lm_eval(evaluated: Evaluated) -> "TemplateLM":
    """The model that lm-eval's `simple_evaluate` and `evaluate` take.

    Raises:
        PunaError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import normalize_gen_kwargs
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ModuleNotFoundError as error:
        raise PunaError(f"lm-eval is not installed ({error.name} is missing): pip install 'puna[eval]'") from None

    class EvaluatedLM(TemplateLM):
        """See `Evaluated`."""

        tokenizer = evaluated.tokenizer

        @property
        def eot_token_id(self) -> int:
            return evaluated.prefix_id if evaluated.tokenizer.eos_id is None else evaluated.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return evaluated.prefix_id

        @property
        def tokenizer_name(self) -> str:
            return "puna"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return evaluated.encode(string, add_special_tokens)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return evaluated.render(chat_history, add_generation_prompt)

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            found = evaluated.scores([(context, continuation) for _, context, continuation in requests])
            for (texts, _, _), one in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, one)
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            windows = [
                list(map(make_disjoint_window, get_rolling_token_windows(
                    self.tok_encode(request.args[0]), evaluated.prefix_id, evaluated.length, context_len=1
                )))
                for request in requests
            ]  # fmt: skip
            scores = iter(evaluated.scores([window for own in windows for window in own]))
            found = [sum(next(scores)[0] for _ in own) for own in windows]
            for request, one in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, one)
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            asked = [(context, normalize_gen_kwargs(given)) for context, given in (one.args for one in requests)]
            found = evaluated.texts(asked)
            for request, one in zip(requests, found, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, one)
            return found

    return EvaluatedLM()
