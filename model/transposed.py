"""A weight as decoding reads it: one row for each output."""

from flax import struct
from jax import Array


@struct.dataclass
class TransposedArray:
    """A weight [in, out] that lies in memory as [out, in].

    A product of few rows reads it once in this order; the other order is packed anew each time, which on CPU
    takes longer (`benchmarks/quantized.py` times both).

    Attributes:
        rows: [out, in], a row for each output.
    """

    rows: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it stands for: [in, out]."""
        return self.rows.shape[::-1]
