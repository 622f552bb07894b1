"""Files of examples."""

import json
import pathlib
from typing import Any


def write_lines(file: pathlib.Path, *records: Any) -> str:
    """JSON lines, and bytes as they are; returns the name."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return str(file)
