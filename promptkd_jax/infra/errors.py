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
    """A GGUF file that cannot be read, or that no model can be written to."""


class HostsError(UserError):
    """Processes that cannot be one run; says which."""


class TrainingError(UserError):
    """A run that cannot go on; says why and what is safe."""


class CheckpointError(UserError):
    """A checkpoint could not be written or cannot be restored; says which one is still good."""


class ComparisonError(UserError):
    """A comparison that cannot go on; says why."""


class Faults:
    """What is wrong with examples: the first ten with their places, of the same fault together, and
    how many there are."""

    SHOWN = 10

    def __init__(self):
        self.count, self._last = 0, ""
        self._first: dict[str, list[str]] = {}  # places by fault

    def add(self, where: str, fault: str) -> None:
        """Notes the fault of an example; a second one of the same example does not count."""
        if where == self._last:
            return
        self._last, self.count = where, self.count + 1
        if self.count <= self.SHOWN:
            self._first.setdefault(fault, []).append(where)

    def raise_any(self, source: str) -> None:
        """Raises DataError with all that is known, if there is any."""
        first = [f"{_listed(places)}: {fault}" for fault, places in self._first.items()]
        if self.count == 1:
            raise DataError(first[0])
        if self.count:
            more = self.count - self.SHOWN
            rest = [f"and {more} more"] if more > 0 else []
            head = f"{source}: {self.count} examples cannot be used:"
            raise DataError("\n  ".join([head, *first, *rest]))


def _listed(places: list[str]) -> str:
    """Lines of one file behind its name: "a.jsonl:3, 7, b.jsonl:1"."""
    listed, last = [], ""
    for place in places:
        file, _, line = place.rpartition(":")
        listed.append(line if file and file == last else place)
        last = file
    return ", ".join(listed)
