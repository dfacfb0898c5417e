"""What a model folder holds, as lines for a person or a script."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields

from convert.checkpoint import Checkpoint
from convert.command import progress
from model.params import param_count


def describe(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Pairs of a key and its value: format, config, counts, sizes, then one pair per file with its bytes and hash."""
    config, tensors = checkpoint.config, checkpoint.tensors.values()
    yield "format", checkpoint.format
    for field in fields(config):
        yield field.name, str(getattr(config, field.name))
    yield "parameters", f"{param_count(config):,}"
    yield "bytes", f"{checkpoint.nbytes:,}"
    counts = Counter(tensor.dtype.name for tensor in tensors)
    yield "dtypes", ", ".join(f"{name} ({count} tensors)" for name, count in counts.most_common())
    files = sorted(path for path in checkpoint.folder.rglob("*") if path.is_file())
    with progress("hashing", sum(path.stat().st_size for path in files)) as advance:
        for path in files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = path.stat().st_size
            advance(size)
            yield str(path.relative_to(checkpoint.folder)), f"{size:,} sha256 {digest}"
