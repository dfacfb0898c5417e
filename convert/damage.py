"""Damaged files, told apart from faults of our own."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import PunaError


@contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Raises PunaError, "damaged", for what breaks while the values that `path` holds are interpreted.

    It stands around those lines only: parsing, and the first use of each value. What our own later steps raise is a
    fault of ours, whatever file was read, and keeps its traceback.
    """
    try:
        yield
    except PunaError as error:
        if str(error).startswith(f"{path.name}: "):  # said by what knows the object and not where it lies
            raise PunaError(f"{path.parent / str(error)}") from error
        if str(path.parent) not in str(error):
            raise PunaError(f"{path}: {error}") from error
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, re.error) as error:
        raise PunaError(
            f"{path} is damaged, or says something no such model says ({type(error).__name__}: {error}): fetch it "
            "again; if it is whole, the fault is Puna's"
        ) from error
