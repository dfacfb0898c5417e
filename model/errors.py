"""The errors that are meant for people."""


class PunaError(ValueError):
    """A request that cannot be met: its text names the setting, file or tensor, the value, and the remedy."""


class JobFailed(PunaError):
    """The request was right and the work failed: a disk, or numbers that stopped being any. The exit code is 1."""
