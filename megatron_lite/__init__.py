"""Pretraining of large language models, from a laptop without a GPU to many nodes."""

__version__ = "0.1.0"
