"""Cross-entropy of logits, the sum over tokens and its gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Setting, applied, compiled, peer

from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.vocab import VocabularyPart, vocab_parallel_cross_entropy


def losses(setting: Setting) -> Iterator[Case]:
    """Logits [2048, 32768], four times as many tokens of Llama 3's vocabulary on a GPU; rows x hidden do not matter.

    Forward reads them; forward and backward read them twice and write as much. Those that can write the gradient over
    the logits do.
    """
    on_gpu = setting.device.type == "cuda"
    tokens, vocabulary = (8192, 128256) if on_gpu else (2048, 32768)
    part = VocabularyPart.of(vocabulary, 1, ProcessMesh(MeshShape(), 0))
    labels = torch.randint(0, vocabulary, (tokens,), device=setting.device)
    logits = setting.drawn(tokens, vocabulary)
    liger = peer("liger_kernel.transformers.functional", "liger_cross_entropy") if on_gpu else None
    quack = peer("quack", "cross_entropy") if on_gpu else None

    def ours(logits):
        return vocab_parallel_cross_entropy(logits, labels, part, None).sum()

    def by_torch(logits):
        return F.cross_entropy(logits, labels, reduction="sum")

    everyone = {
        "ours": ours,
        "torch": by_torch,
        "torch compiled": compiled(setting, by_torch),
        "liger": liger and (lambda logits: liger(logits, labels, reduction="sum")),
        "quack": quack and (lambda logits: quack(logits, labels, reduction="sum", inplace_backward=True)),
    }

    def with_gradient(function):
        leaf = logits.clone().requires_grad_()
        # What is written over must not be a leaf; from the second round on it is the gradient of the round before.
        return lambda: torch.autograd.grad(function(leaf.view_as(leaf)), leaf)

    forward = {who: applied(function, logits) for who, function in everyone.items()}
    with torch.no_grad():
        yield setting.case_of("cross_entropy", logits.shape, logits.nbytes, forward)
    both = {who: with_gradient(function) for who, function in everyone.items() if function}
    yield setting.case_of("cross_entropy_and_gradient", logits.shape, 3 * logits.nbytes, both)
