"""Chat templates, small tokenizers that have one, and conversations."""

import re

from helpers.tiny import WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from promptkd_jax.data.reading.records import Record

# As the models of these names have them, with marks around what the assistant says.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|eot_id|>"
    "{% endgeneration %}{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<start_of_turn>model\n{% generation %}"
    "{{ m['content'] | trim }}<end_of_turn>{% endgeneration %}{% else %}<start_of_turn>user\n"
    "{{ m['content'] | trim }}<end_of_turn>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# A thinking model's: earlier thoughts are deleted.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = {
    CHATML: ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    LLAMA_3: ("<|end_of_text|>", "<|begin|>", "<|start_header_id|>", "<|end_header_id|>")
    + ("<|eot_id|>",),
    GEMMA: ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    THINKING: ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
ENDS = {CHATML: "<|im_end|>", LLAMA_3: "<|eot_id|>", GEMMA: "<end_of_turn>"}


def unmarked(template: str) -> str:
    """The template without its generation marks."""
    return re.sub(r"{% (end)?generation %}", "", template)


def chat_tokenizer(
    template: str | None,
    special: tuple[str, ...] = SPECIAL[CHATML],
    *,
    bos: bool = False,
    extra: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """Special tokens first, of which the first is EOS and the second, with `bos`, BOS; then bytes,
    a few words, and `extra` ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, *(f"Ġ{word}" for word in WORDS), *extra]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    named = dict(bos_token=special[1]) if bos else {}
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special[1]} $A", special_tokens=[(special[1], 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0], **named
    )
    made.chat_template = template
    return made


def conversation(*said: str, system: str = "") -> Record:
    """Turns of user and assistant by turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    first = [{"role": "system", "content": system}] if system else []
    return Record((*first, *turns), said[-1:] if len(said) % 2 == 0 else ())
