"""Standard benchmarks (ARC, GSM8K, …) through lm-eval, the library that published numbers come
from: its tasks, prompts, metrics; our model behind its Python interface.

lm-eval is the extra `lm-eval`, imported where a task is run. Log-likelihoods and greedy texts are
those of its own backend `hf`.

B rows, T columns, R response positions.
"""

import functools
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from promptkd_jax.data.batch import Batch, gather, responses
from promptkd_jax.data.batches import eval_batches
from promptkd_jax.data.reading.records import Record
from promptkd_jax.data.rows import Rows
from promptkd_jax.data.special_tokens import unknown_token
from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.losses.chunked_loss import linear_values
from promptkd_jax.inference.generate import generate_responses, round_up_to_devices
from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import ConfigError, DataError
from promptkd_jax.infra.specs import declared
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.language_model import LazyLogits
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampling_rules import Sampling

MAX_NEW_TOKENS = 256  # where a task does not say, as in lm-eval's `hf`
_LEAST_WIDTH = 32  # columns; widths are powers of 2, each of which is compiled


def find_tasks(names: Sequence[str], folder: str | None) -> Any:
    """Returns lm-eval's manager of tasks, which knows all of `names`.

    Args:
      names: of tasks, groups or tags.
      folder: with YAML files of tasks beside lm-eval's own; None: none.

    Raises:
      ConfigError: lm-eval is not installed, or does not know one of the names.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"--tasks: needs lm-eval ({error}): pip install -e '.[lm-eval]' in a clone, or pip "
            "install 'promptkd_jax[lm-eval]'"
        ) from error
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(
            f"--tasks: lm-eval has no {', '.join(unknown)} (names are those of `lm-eval ls tasks`; "
            "--task-folder names a folder with YAML files of others)"
        )
    return manager


def run_tasks(
    model: Model,
    tasks: Sequence[str],
    manager: Any,
    *,
    batch_size: int,
    max_length: int | None = None,
    num_fewshot: int | None = None,
    chat_template: Mapping[str, Any] | None = None,
    cache: pathlib.Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs tasks of lm-eval.

    Args:
      manager: of `find_tasks`.
      max_length: tokens of a request and its response, the end of longer ones; None: as many as
        the model was trained for.
      num_fewshot: examples in front of each request; None: as the task says.
      chat_template: the arguments of the tokenizer's chat template, which requests are put into;
        None: they are plain text, as is usual for published numbers.
      cache: file for the answers, so that tasks go on where they were stopped; None: none.

    Returns:
      lm-eval's results by task and metric.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of its bootstrap: JAX is not to be forked
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    backend = type("PromptKDModel", (_Backend, TemplateLM), {})  # lm-eval asks for its own class
    length = max_length or model.decoder.config.trained_positions
    found = simple_evaluate(
        backend(model, round_up_to_devices(batch_size), length, chat_template or {}),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        apply_chat_template=chat_template is not None,
        use_cache=None if cache is None else str(cache),
        log_samples=False,
    )
    return json.loads(json.dumps(found["results"], default=str))


class _Backend:
    """What lm-eval's `TemplateLM` leaves to a model; it stands in front of that class.

    The names are lm-eval's, and what is done with texts is what its `hf` does.
    """

    def __init__(
        self, model: Model, batch_size: int, max_length: int, chat_template: Mapping[str, Any]
    ):
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer
        self.batch_size, self.max_length = batch_size, max_length
        self._chat_template = chat_template
        self._vocab_size = model.decoder.config.vocab_size  # as there, padding of it included

    @property
    def eot_token_id(self) -> int:
        return self.model.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else own

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:  # unless the text has a BOS already
            begins = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = not begins
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        if fault := unknown_token(ids, self._vocab_size, self.tokenizer):
            raise DataError(f"{self.model.name}: the text that begins {string[:40]!r}: {fault}")
        return ids

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat_template,
        )

    def _loglikelihood_tokens(self, requests, **_: Any) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding writes it."""
        # The last token is predicted and not read, so that a row may have one more.
        rows = [(a + b)[-(self.max_length + 1) :] for _, a, b in requests]
        starts = [len(row) - len(b) for row, (_, _, b) in zip(rows, requests)]
        found: dict[int, tuple[float, bool]] = {}
        for chosen in self._chunks(rows):
            width = _width(max(len(rows[i]) for i in chosen) - 1) + 1
            capacity = _width(max(len(requests[i][2]) for i in chosen))
            some = _rows([rows[i] for i in chosen], [starts[i] for i in chosen])
            score = _scorer(self.model.decoder, capacity, self._vocab_size)
            ((batch, real),) = eval_batches(some, batch_size=self.batch_size, length=width)
            sums = sharding.to_host(score(self.model.params, sharding.place_rows(batch)))
            for i, value, greedy in zip(chosen, *(x[:real].tolist() for x in sums)):
                found[i] = value, greedy
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, read in windows of `max_length` tokens."""
        from lm_eval import utils

        windows = [
            (number, (None, *utils.make_disjoint_window(window)))
            for number, request in enumerate(requests)
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(*request.args),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)
        values = self._loglikelihood_tokens([window for _, window in windows])
        for (number, _), (value, _) in zip(windows, values):
            totals[number] += value
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to an EOS or the first of the request's `until`."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found: dict[int, str] = {}
        for numbers in groups.values():
            how = requests[numbers[0]].args[1]
            texts = self._generate([requests[n].args[0] for n in numbers], how)
            for number, text in zip(numbers, texts):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [found[number] for number in range(len(requests))]

    def _generate(self, contexts: Sequence[str], how: Mapping[str, Any]) -> list[str]:
        from lm_eval.models import utils

        chosen = dict(utils.normalize_gen_kwargs(dict(how), MAX_NEW_TOKENS))
        eos = self.tokenizer.decode([self.eot_token_id])
        until = utils.handle_stop_sequences(chosen.pop("until"), eos=eos)
        new_tokens = chosen.pop("max_gen_toks")
        sampling = _sampling(chosen, self.model.eos_ids)
        if new_tokens >= self.max_length:
            raise ConfigError(
                f"--tasks: a response of {new_tokens} tokens leaves no room for its request within "
                f"the {self.max_length} tokens of {self.model.name} (--max-length)"
            )
        prompts = [self.tok_encode(text)[-(self.max_length - new_tokens) :] for text in contexts]
        found: dict[int, str] = {}
        for number, chunk in enumerate(self._chunks(prompts)):
            some = [prompts[i] for i in chunk]
            written = generate_responses(
                self.model,
                _rows(some, [len(prompt) for prompt in some]),
                sampling=sampling,
                prompt_capacity=min(_width(max(map(len, some))), self.max_length - new_tokens),
                max_new_tokens=new_tokens,
                batch_size=self.batch_size,
                key=jax.random.key(number),
                vocab_size=self._vocab_size,
            )
            for i, tokens in zip(chunk, written):
                text = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
                found[i] = utils.postprocess_generated_text(text, until, None)
        return [found[i] for i in range(len(contexts))]

    def _chunks(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of rows that are computed together, the longest first, so that what does not fit
        into memory is known at once."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]


def _sampling(chosen: dict[str, Any], eos_ids: tuple[int, ...]) -> Sampling:
    """What a task says of sampling, by transformers' names, which are ours."""
    named = {name: chosen[name] for name in declared(Sampling) if chosen.get(name) is not None}
    if not chosen.pop("do_sample"):
        named |= dict(temperature=0.0)
    if others := set(chosen) - set(declared(Sampling)):
        distributed.warn(f"--tasks: generation without {', '.join(sorted(others))} of the task")
    return Sampling(**named, eos_ids=eos_ids)


def _rows(tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Rows:
    arrays = [np.array(row, np.int32) for row in tokens]
    return Rows(arrays, np.array(starts, np.int32), [Record(())] * len(arrays), dropped=0)


def _width(columns: int) -> int:
    """The least power of 2 that holds so many."""
    return max(_LEAST_WIDTH, 1 << (columns - 1).bit_length())


def _is_likeliest(labels: jax.Array, learner: jax.Array) -> jax.Array:
    """1 where a label's logit is the largest."""
    chosen = jnp.take_along_axis(learner, labels[..., None], axis=-1)[..., 0]
    return (chosen == jnp.max(learner, axis=-1)).astype(jnp.float32)


@functools.lru_cache(maxsize=64)
def _scorer(decoder: Decoder, capacity: int, vocab_size: int):
    @jax.jit
    def score(params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        where = responses(batch, capacity)
        hidden = gather(decoder.hidden_states(params, batch.tokens[:, :-1], None), where)
        head = decoder.output_head(params)[:vocab_size]
        learner = LazyLogits(hidden, head, decoder.logit_soft_cap)
        functions = losses.cross_entropy, _is_likeliest
        values, likeliest = linear_values(functions, learner, (where.labels, where.labels))
        missed = jnp.sum((1 - likeliest) * where.mask, axis=1)
        return -jnp.sum(values * where.mask, axis=1), missed == 0

    return score
