"""The record: one example as a conversation, whatever the data look like."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}, and what else a template reads


class Record(NamedTuple):
    """One example: a conversation, and what is right as its last response.

    Attributes:
      messages: the turns, of the roles system, user, assistant and tool, as chat templates take
        them. Where the last one is an assistant's, it is the gold response.
      references: texts that are right as that response, the gold one first; () where no response is
        given.
      extra: what the data say beside, by their names for it.
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    extra: Mapping[str, Any] = {}

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to the response."""
        answered = self.messages and self.messages[-1]["role"] == "assistant"
        return self.messages[:-1] if answered else self.messages

    def answered(self, text: str) -> "Record":
        """The same prompt with this text as its response."""
        turn = {"role": "assistant", "content": text}
        return self._replace(messages=(*self.prompt, turn), references=(text,))

    @property
    def prompt_text(self) -> str:
        """The prompt for people: the text of a single turn as it is, else each turn by its role."""
        if len(self.prompt) == 1:
            return self.prompt[0]["content"]
        return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in self.prompt)


def user_record(text: str, references: tuple[str, ...] = (), **extra: Any) -> Record:
    """Returns the record of a single turn, answered by the first of the references, if any."""
    turns = ({"role": "user", "content": text},)
    gold = tuple({"role": "assistant", "content": text} for text in references[:1])
    return Record(turns + gold, references, extra)
