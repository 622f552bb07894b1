"""A student made of some of its teacher's layers, to be distilled: `promptkd init --teacher MODEL
--layers 18 --output FOLDER`.

DistilBERT (Sanh et al. 2019, arXiv 1910.01108) starts as every other layer of BERT, DistilGPT2 as
the layers 0, 2, 4, 7, 9 and 11 of GPT-2's 12. With `--data` the teacher responds to a few prompts,
and those layers are left out, one after the other, whose absence moves it least. A run does the
same with `student.layers`; with a folder of their own, several runs, or other tools, start from one
student.
"""

import argparse
import copy
import itertools
import re
from collections.abc import Sequence
from contextlib import nullcontext

import jax

from promptkd_jax.cli import flags
from promptkd_jax.data.reading.record_stream import RecordStream
from promptkd_jax.data.rows import Rows, tokenize, with_responses
from promptkd_jax.data.templates import read_chat_template
from promptkd_jax.evaluation.layer_search import leave_out_layers
from promptkd_jax.evaluation.report import model_card
from promptkd_jax.inference.generate import generate_responses, with_turn_end
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import check_writable
from promptkd_jax.infra.specs import Int
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import RECORDED, load_model
from promptkd_jax.models.model import Model, check_text, chosen_layers, keep_layers
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.training.config.field_specs import DTYPE

# Flags that are for --data alone, with their defaults.
WITH_DATA = {
    **dict.fromkeys((*RECORDED, "chat_template", "split")),
    "format": "auto",
    "columns": {},
    "rows": 16,
    "max_new_tokens": 64,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model(parser, "--teacher")
    text = "how many, evenly spread (18), or chosen by --data; or which, from 0 (0,2,4,7,9,11)"
    parser.add_argument("--layers", required=True, type=_layers, help=text)
    parser.add_argument("--output", required=True, type=flags.path, help="a new folder")
    parser.add_argument("--dtype", default="float32", choices=DTYPE.options)
    text = "The layers are chosen by how far the teacher is without them (SLEB, arXiv 2402.09025)."
    group = parser.add_argument_group("by data", text)
    text = "file, folder, pattern or hub id with prompts"
    group.add_argument("--data", type=flags.source, help=text)
    group.add_argument("--split", help="of a hub data set (default: train)")
    flags.add_reading(group)
    count = flags.of(Int(low=1))
    text = "as many records, from the first on, have the prompts that the teacher responds to "
    text += "(default: 16)"
    group.add_argument("--rows", type=count, default=WITH_DATA["rows"], help=text)
    text = "tokens of a response (default: 64)"
    default = WITH_DATA["max_new_tokens"]
    group.add_argument("--max-new-tokens", type=count, default=default, help=text)
    flags.add_prompting(group)
    flags.add_mesh(group)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    output, dtype = options.output, options.dtype
    mesh = flags.mesh_of(options) if options.data else None  # else nothing is computed
    with flags.naming("--output", output), jax.set_mesh(mesh) if mesh else nullcontext():
        flags.check_empty(output)
        teacher = load_model(options.teacher, dtype=dtype, param_dtype=dtype, mesh=mesh)
        depth = teacher.decoder.config.num_layers
        kept, chosen = chosen_layers(depth, _layers_or_count(options)), []
        if options.data:
            if len(kept) == depth:
                said = f"--layers {depth}: --data leaves out some of the {depth} layers"
                raise ConfigError(f"{said}; expected at most {depth - 1}")
            kept, chosen = _by_data(options, teacher, len(kept))
        student = keep_layers(teacher, kept)
        check_writable(output)
        facts = [
            ("Teacher", f"{options.teacher} ({depth} layers)"),
            ("Its layers that were kept, counted from 0", ", ".join(map(str, kept))),
            *chosen,
            ("Parameters", f"{sum(x.size for x in jax.tree.leaves(student.params)):,} in {dtype}"),
        ]
        lead = "Some of its teacher's layers, written by promptkd_jax and not trained since."
        card = model_card("A student before distillation", lead, facts)
        save_model(output, student, card=card)
    print(f"student in {output}", *(f"  {name}: {fact}" for name, fact in facts), sep="\n")


def _layers_or_count(options: argparse.Namespace) -> int | tuple[int, ...]:
    """--layers. Raises ConfigError where it, or another flag, does not go with --data."""
    given = [name for name, default in WITH_DATA.items() if getattr(options, name, None) != default]
    if given and not options.data:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{named}: for --data, by which layers are chosen, and there is none")
    if options.data and not isinstance(options.layers, int):
        listed = ",".join(map(str, options.layers))
        raise ConfigError(f"--layers {listed}: --data chooses which; expected how many")
    return options.layers


def _by_data(
    options: argparse.Namespace, teacher: Model, count: int
) -> tuple[tuple[int, ...], list[tuple[str, str]]]:
    """So many of the teacher's layers, those left out before that move it least, and facts about
    how they were chosen."""
    check_text(teacher)
    kept, kl = list(range(teacher.decoder.config.num_layers)), 0.0
    rows, said = _teacher_rows(options, teacher)
    left_out = leave_out_layers(teacher, rows)
    for layer, kl in itertools.islice(left_out, len(kept) - count):
        kept.remove(layer)
        print(f"  without layer {layer:3}: KL {kl:.4f}, {len(kept)} layers left", flush=True)
    return tuple(kept), [("Chosen by", said), ("KL(teacher || student), nats", f"{kl:.4f}")]


def _teacher_rows(options: argparse.Namespace, teacher: Model) -> tuple[Rows, str]:
    """The first prompts of --data with the teacher's greedy responses, and what they are."""
    data, why = flags.data_config(options.teacher, options, lambda: teacher)
    print(f"template {data.template} ({why})", flush=True)
    reading = dict(split=options.split or "train", format=options.format, columns=options.columns)
    if options.chat_template is not None:
        tokenizer = copy.copy(teacher.tokenizer)  # the student keeps its own
        tokenizer.chat_template = read_chat_template(options.chat_template)
        teacher = teacher.replace(tokenizer=tokenizer)
    prompt_format, capacity = data.prompt_format("default"), data.max_prompt_length
    teacher = with_turn_end(teacher, prompt_format)
    rows = tokenize(
        RecordStream(options.data, limit=options.rows, **reading),
        teacher.tokenizer,
        prompt_format,
        max_prompt_length=capacity,
        max_length=capacity + options.max_new_tokens,
        eos_id=teacher.eos_ids[0],
        vocab_size=teacher.vocab_size,
        long_prompts=data.long_prompts,
    )
    check_writable(options.output)  # before what takes time
    responses = generate_responses(
        teacher,
        rows,
        sampling=Sampling(temperature=0.0, eos_ids=teacher.eos_ids),
        prompt_capacity=int(max(rows.prompt_lengths)),
        max_new_tokens=options.max_new_tokens,
        batch_size=16,
        key=jax.random.key(0),  # greedy ones do not depend on it
        vocab_size=teacher.vocab_size,
    )
    rows = with_responses(rows, responses)
    said = f"{rows.num_supervised.sum():,} tokens of its responses to {len(rows.tokens)} prompts"
    said += f" of {options.data}"
    print(f"{said}; {rows.dropped} prompts dropped (over {capacity} tokens)", flush=True)
    return rows, said


def _layers(text: str) -> int | tuple[int, ...]:
    """ "18" as a number, "0,2,4" (and "5,") as a list."""
    if not re.fullmatch(r"\d+( *, *\d+)*( *,)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of layers (18) nor a list of them (0,2,4,7,9,11)"
        )
    if "," not in text:
        return int(text)
    listed = tuple(int(layer) for layer in text.split(",") if layer)
    if twice := sorted({layer for layer in listed if listed.count(layer) > 1}):
        raise argparse.ArgumentTypeError(f"{text!r} has layer {twice[0]} more than once")
    return listed
