"""Any teacher into any student on conversations: data of chat `messages`.

`configs/chat.py` is a pass over the data's responses with the teacher's distributions beside them
(word-level KD), then PromptKD, its soft prompt behind gates, on the student's own responses to the
same prompts; `configs/chat.py:method=NAME` ends with another of `recipes.METHODS`, and
`configs/chat.py:run=short` is a first try: 10 steps a stage, of 8 rows of at most 192 tokens. Point
teacher.path, student.path, data.train and data.dev at your own. The hyper-parameters are what is
usual for models of 0.1 to 3 billion parameters, not tuned.
"""

from ml_collections import ConfigDict

from promptkd_jax.training.recipes import (
    METHODS,
    base_config,
    behind_gates,
    method_stage,
    read_arguments,
    sampling_config,
)


def get_config(arg: str = "") -> ConfigDict:
    """The recipe for `method=NAME,run=whole`, or `run=short`."""
    chosen = read_arguments(arg, method=("promptkd", METHODS), run=("whole", ("whole", "short")))
    config = base_config()
    config.teacher.path = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    config.student.path = "HuggingFaceTB/SmolLM2-360M-Instruct"
    config.teacher.update(dtype="bfloat16", param_dtype="bfloat16", remat="auto")
    config.student.update(dtype="bfloat16", remat="auto")
    config.data.train = "HuggingFaceTB/smoltalk:everyday-conversations"
    config.data.update(dev=config.data.train, dev_split="test", dev_rows=200)
    config.data.update(template="chat", max_prompt_length=512, max_length=1024, long_prompts="cut")
    config.evaluation.update(every=100, batch_size=16, sampling=sampling_config(temperature=0.0))
    config.checkpoint.update(every=100, export="best")
    learning = dict(batch_size=16, gradient_accumulation_steps=4, length_buckets=4)
    learning |= dict(epochs=1.0, schedule="cosine")
    config.stages = (
        method_stage("kd", name="warmup", learning_rate=2e-5, **learning),
        method_stage(chosen["method"], learning_rate=5e-6, **learning),
    )
    if chosen["run"] == "short":
        config.data.update(max_prompt_length=128, max_length=192)
        config.checkpoint.update(every=5, export="last")  # of both stages
        config.evaluation.every = 10
        for stage in config.stages:
            stage.update(epochs=0.0, steps=10, batch_size=8)
    return behind_gates(config)
