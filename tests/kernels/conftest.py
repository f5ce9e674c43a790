"""Every kernel test runs on the native code, with each instruction set this processor has where it asks."""

import pytest

from megatron_lite.kernels import extension


@pytest.fixture(scope="session", autouse=True)
def native():
    assert extension.load("cpu"), extension.description("cpu")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request):
    before = extension.instruction_set()
    if not extension.choose_instruction_set(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    extension.choose_instruction_set(before)
