"""What an engine keeps on its device, the rows of one cache, and the programs that change them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from infer.request import Request
from infer.sample import Sampling, stack_sampling
from infer.slots import STOPS, Made, Slots, admit, copy_row, decode, empty_slots, extend
from infer.speculative import verify
from model.cache import init_cache
from model.config import LlamaConfig
from model.params import Params
from model.sharding import relaxed_sharding

PROGRAMS = (decode, extend, copy_row, admit, verify)


class Step(NamedTuple):
    """What a step computes.

    Attributes:
        kept: bool [N]; a row that is not has ended.
        first: the first of the rows that are computed.
        rows: how many they are.
        window: how many positions attention reads.
        scored: whether log-probabilities are wanted.
    """

    kept: np.ndarray
    first: int
    rows: int
    window: int
    scored: bool


class Device:
    """The rows of a cache on one device, or on those of a mesh.

    Args:
        params: as `Engine` takes them.
        config: the shape of the model.
        rows: N.
        length: positions that each row has room for.
        known: tokens from this one on are never chosen.
        mesh: the mesh that the parameters live on, if any.
        cache_dtype: of keys and values.
    """

    def __init__(
        self, params: Params, config: LlamaConfig, rows: int, length: int, known: int, mesh: Mesh | None = None,
        cache_dtype: Any = np.float32,
    ):  # fmt: skip
        self._params, self._config, self._mesh = params, config, mesh
        self._rows, self._length, self._cache_dtype = rows, length, cache_dtype
        words = np.packbits(np.arange(-(-config.vocab_size // 32) * 32) < known, bitorder="little").view(np.uint32)
        self._words = np.tile(words, (rows, 1))
        self._allowed = self._unconstrained = self._put(self._words)
        self.reset()

    def reset(self) -> None:
        """Empties all rows."""
        # Everything is committed where the programs will return it, so that each compiles once.
        cache = init_cache(self._config, self._rows, self._length, self._cache_dtype, self._mesh, layout="per_layer")
        slots = empty_slots(cache, stack_sampling([Sampling()] * self._rows), self._config.vocab_size)
        if self._mesh is None:
            self.slots: Slots = self._put(slots)
            return
        rest = jax.tree.map(self._put, slots._replace(cache=None))
        self.slots = rest._replace(
            cache=cache.replace(lengths=self._put(cache.lengths)),
            in_prompt=self._put(rest.in_prompt, "vocab"),
            counts=self._put(rest.counts, "vocab"),
        )

    def _put(self, x: Any, *axes: str) -> Any:
        """`x` [N, *axes] on the device or devices."""
        if self._mesh is None:
            return jax.device_put(x, jax.local_devices()[0])
        names = (None, *axes, *[None] * (x.ndim - 1 - len(axes)))
        return jax.device_put(x, relaxed_sharding(self._mesh, names, x.shape))

    def read(
        self, row: int, adapter: int, piece: Sequence[int], first: int, following: Sequence[int], width: int,
        window: int, scored: bool,
    ) -> tuple[Made | None, jax.Array]:  # fmt: skip
        """Writes a piece of a prompt into a row, padded to `width`; see `extend`.

        Args:
            first: where the piece's first token stands.
            following: what is scored: the token after each of the piece.
        """
        tokens, after = np.zeros((1, width), np.int32), np.zeros(width, np.int32)
        positions = np.full((1, width), self._length, np.int32)
        tokens[0, : len(piece)], positions[0, : len(piece)] = piece, range(first, first + len(piece))
        after[: len(following)] = following
        numbers = (np.int32(max(len(piece), 1)), np.int32(row), np.int32(adapter))
        self.slots, made, state = extend(
            self._params, self.slots, tokens, positions, after, *numbers, self._config, window, scored
        )
        return made, state

    def copy(self, source: int, target: int) -> None:
        """Copies what is cached in one row to another."""
        self.slots = copy_row(self.slots, np.int32(source), np.int32(target))

    def admit(self, row: int, request: Request) -> None:
        """Lets a row whose prompt is written make tokens."""
        last = len(request.prompt) - 1
        stops = np.full(STOPS, -1, np.int32)
        stops[: len(request.stop_ids)] = request.stop_ids
        in_prompt = np.zeros(self._config.vocab_size, bool)
        in_prompt[list(request.prompt)] = True
        numbers = (np.int32(number) for number in (row, request.prompt[-1], last, last + request.max_new_tokens))
        own = stack_sampling([request.sampling])
        self.slots = admit(self.slots, *numbers, stops, np.int32(request.adapter), in_prompt, own)

    def allow(self, words: Mapping[int, np.ndarray]) -> None:
        """Says what rows may choose in the next step.

        Args:
            words: of each row that is constrained, a bit for each token; see `decode`.
        """
        if not words:
            self._allowed = self._unconstrained
            return
        allowed = self._words.copy()
        for row, own in words.items():
            allowed[row] &= own
        self._allowed = self._put(allowed)

    def decode(self, step: Step) -> Made:
        """Starts one token for each live row; see `infer.slots.decode`."""
        settings = (self._allowed, np.int32(step.first), self._config, step.rows, step.window, step.scored)
        self.slots, made = decode(self._params, self.slots, step.kept, *settings)
        return made

    def verify(self, step: Step, proposals: Any) -> Made:
        """Starts as many tokens as are right of those proposed, and one more; see `infer.speculative.verify`."""
        settings = (self._allowed, np.int32(step.first), self._config, step.rows, step.window, step.scored)
        self.slots, made = verify(self._params, self.slots, step.kept, proposals, *settings)
        return made


def compiled(*programs: Any) -> int:
    """How often jitted functions were compiled in this process."""
    return sum(program._cache_size() for program in programs)
