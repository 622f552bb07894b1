"""Records as files of instruction, input and output make them."""

from promptkd_jax.data.reading.records import Record, user_record


def example(instruction: str, given: str = "", outputs: tuple[str, ...] = ()) -> Record:
    text = f"{instruction}\n{given}" if given else instruction
    return user_record(text, outputs, instruction=instruction, input=given)
