"""PromptKD of random small models on generated text: to try a place to run, nothing is downloaded.

It takes a minute or two on a laptop, as a pod of virtual devices too, and teaches nobody anything:
what it shows is that processes, devices, workdir and checkpoints work together. `data` and `fsdp`
may be up to 16 and 128 devices; the 595 tokens of its vocabulary are padded for `tensor`.
"""

from ml_collections import ConfigDict

from promptkd_jax.training.recipes import base_config, method_stage


def get_config() -> ConfigDict:
    """The rehearsal."""
    config = base_config()
    config.title = "Rehearsal"
    config.teacher.path = "synthetic:llama-D256-L4-S0"
    config.student.path = "synthetic:llama-D128-L2-S1"
    config.data.update(
        train="synthetic:train",
        dev="synthetic:dev",
        template="plain",
        max_prompt_length=16,
        max_length=28,
    )
    config.evaluation.update(every=20, batch_size=32)
    config.checkpoint.every = 10
    config.log_every = 5
    config.stages = (method_stage("promptkd", steps=40, batch_size=16, learning_rate=1e-3),)
    return config
