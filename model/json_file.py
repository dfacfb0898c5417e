"""The one reader of JSON files: an object, or an error that names the file."""

import json
from pathlib import Path
from typing import Any

from model.errors import PunaError

LARGEST = 256 * 2**20  # bytes; the largest of these files are tokenizers, of some 30 MB


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the UTF-8 file `path`.

    Raises:
        PunaError: it is missing, larger than LARGEST, no JSON, or no object.
    """
    if path.is_file() and path.stat().st_size > LARGEST:
        raise PunaError(f"{path} has {path.stat().st_size:,} bytes, more than any such file has: fetch it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PunaError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise PunaError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise PunaError(f"{path} holds no JSON object")
    return value
