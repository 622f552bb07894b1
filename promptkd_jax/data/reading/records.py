"""The record: one example as a conversation, whatever the data look like."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}, and what else a template reads


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One example: a conversation, and what is right as its last response.

    Attributes:
      messages: the turns, of the roles system, user, assistant and tool, as chat templates take
        them. Where the last one is an assistant's, it is the gold response. An assistant's turn
        with "weight" 0 is not learned from.
      references: texts that are right as that response, the gold one first; () where no response is
        given, or it is no text.
      extra: what the data say beside, by their names for it.
      place: where it was read, for messages, such as train.jsonl:3.
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = dataclasses.field(default="", compare=False)

    @property
    def is_answered(self) -> bool:
        """Whether the last turn is the gold response."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to the response."""
        return self.messages[:-1] if self.is_answered else self.messages

    def answered(self, text: str) -> "Record":
        """The same prompt with this text as its response."""
        turn = {"role": "assistant", "content": text}
        return dataclasses.replace(self, messages=(*self.prompt, turn), references=(text,))

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


def responses_of(turns: Sequence[Message]) -> Iterator[int]:
    """Yields the places of the turns that a student can learn from: those of the assistant behind
    one of the user, but for those of weight 0."""
    asked = False
    for place, turn in enumerate(turns):
        asked = asked or turn["role"] == "user"
        if asked and turn["role"] == "assistant" and turn.get("weight") != 0:
            yield place


# What a record may have to have, by its name in `reading.read_records`.
NEEDS = {
    "nothing": lambda record: True,
    "response": lambda record: record.is_answered,
    "some response": lambda record: any(True for _ in responses_of(record.messages)),
    "references": lambda record: bool(record.references),
}
NEEDED = {  # in words
    "nothing": "anything",
    "response": "a response as its last turn",
    "some response": "a response in any turn",
    "references": "a response with text",
}
