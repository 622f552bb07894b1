"""One side in a process of its own: `serve.py MODULE SETTINGS CASE TEACHER STUDENT`.

Settings and case are JSON, the models folders. Reads names of parts from its standard input, does
them, and answers each with a line of JSON: `seconds` it took, the `value` it returned, the
`peak_bytes` so far, of the device or, where that has no memory of its own, of the process. The
first line is for what importing and loading took.
"""

import importlib
import json
import os
import pathlib
import re
import sys
import time

BEGIN = time.perf_counter()

from cases import Case  # noqa: E402


def main() -> None:
    """Serves until the input ends."""
    module, settings, case, teacher, student = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    folders = {"teacher": teacher, "student": student}
    side = importlib.import_module(module).Side(
        Case(**json.loads(case)), folders, **json.loads(settings)
    )
    start, value = BEGIN, None
    while True:
        seconds = time.perf_counter() - start
        peak = side.device_peak_bytes() or process_peak_bytes()
        answer = {"seconds": seconds, "value": value, "peak_bytes": peak}
        print(json.dumps(answer), file=answers)
        if not (part := sys.stdin.readline().strip()):
            break
        start = time.perf_counter()
        value = getattr(side, part)()


def process_peak_bytes() -> int:
    """The most resident memory of this process. What `getrusage` says has that of the process in
    it which started this one."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


main()
