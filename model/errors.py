"""The error that is meant for people."""


class PunaError(ValueError):
    """A request that cannot be met: its text names the setting, file or tensor, the value, and the remedy."""
