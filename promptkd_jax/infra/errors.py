"""Errors that the user can mend. A command prints their message alone, see `cli.main`."""


class UserError(ValueError):
    """The message says what was found, where, and what would be right."""


class ConfigError(UserError):
    """A config or a command line with mistakes: all of them, one per line, each with its path."""


class DataError(UserError):
    """Data that cannot be used as it is."""


class ModelError(UserError):
    """A model that cannot be used."""


class GGUFError(ModelError):
    """A file that cannot be read as a Llama."""


class HostsError(UserError):
    """Processes that cannot be one run; says which."""


class TrainingError(UserError):
    """A run that cannot go on; says why and what is safe."""


class CheckpointError(UserError):
    """A checkpoint could not be written or cannot be restored; says which one is still good."""


class ComparisonError(UserError):
    """A comparison that cannot go on; says why."""
