"""Errors that are the user's to mend. No more is imported here, so that the core can raise them."""


class ConfigError(ValueError):
    """The message lists every mistake, one per line, each with its path."""
