"""What a person is told once, however often the same file is read."""

import sys

_SAID: set[str] = set()


def say_once(text: str) -> None:
    """Print a line on stderr, unless this process has printed it before.

    Args:
        text: the line, which names the file that it is about.
    """
    if text not in _SAID:
        _SAID.add(text)
        print(text, file=sys.stderr, flush=True)
