"""Hub ids, and what they stand for on this machine."""

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from model.errors import PunaError

HUB_ID = r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?"  # the name, and the revision where one is given

_COMPANIONS = ("*.json", "*.model", "*.jinja")


def is_hub_id(text: str) -> bool:
    """Whether `text` is of the form org/name[@revision]."""
    return re.fullmatch(HUB_ID, text) is not None


def download(hub_id: str, weights: Sequence[str] = ()) -> Path:
    """The local folder with the companion files of `hub_id`, and its weights.

    Args:
        hub_id: org/name[@revision].
        weights: patterns of weight files, the favourite first. Of a repository that has several, one is fetched.

    Raises:
        PunaError: the Hub did not give it.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    wanted = [*_COMPANIONS, *_first_there(name, revision or None, weights)]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the Hub's own, or whichever HTTP library's
        reason = " ".join(str(error).split())
        raise PunaError(f"{name} is no local folder, and the Hub did not give it: {reason}") from None


def _first_there(name: str, revision: str | None, patterns: Sequence[str]) -> Sequence[str]:
    """The first of `patterns` that the repository has files of. All where the Hub does not answer, since the cache may
    still hold what it gave before."""
    from huggingface_hub import HfApi

    if not patterns:
        return ()
    try:
        files = [file.rfilename for file in HfApi().model_info(name, revision=revision, timeout=10).siblings or ()]
    except Exception:  # of whichever HTTP library; snapshot_download meets the same, and says it
        return patterns
    return [pattern for pattern in patterns if fnmatch.filter(files, pattern)][:1]
