"""A tokenizer of every kind, made once for all tests of this room."""

from __future__ import annotations

import pytest
from small_tokenizers import KINDS, make_tokenizers

from megatron_lite.data.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="session")
def built(sources):
    return {name: build_tokenizer(config) for name, config in sources.items()}


@pytest.fixture(params=KINDS)
def tokenizer(request, built):
    return built[request.param]
