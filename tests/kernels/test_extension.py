"""Which cards the CUDA kernels are for."""

import pytest
import torch

from megatron_lite.errors import KernelError
from megatron_lite.kernels import extension


@pytest.mark.parametrize(("capability", "served"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_card_older_than_the_machine_code_is_refused_with_its_numbers(monkeypatch, capability, served):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(extension, "found", lambda *_: "the library")
    if served:
        assert extension._find("cuda") == "the library"
    else:
        with pytest.raises(KernelError, match=rf"8\.0 or above and a card has {'.'.join(map(str, capability))}"):
            extension._find("cuda")
