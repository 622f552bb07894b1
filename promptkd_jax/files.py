"""Files that are whole or absent, whenever a run is stopped."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any


def write_text(file: pathlib.Path, text: str) -> None:
    """Writes a file so that whoever looks sees the old one or the new one, whole."""
    unfinished = file.with_name(file.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(file)


def write_json(file: pathlib.Path, content: Any) -> None:
    """As `write_text`, indented."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def once(file: pathlib.Path, compute: Callable[[], Any]) -> Any:
    """What the JSON file holds, computed and written where it is absent."""
    if not file.exists():
        write_json(file, compute())
    return json.loads(file.read_text("utf-8"))
