"""Seeds as arithmetic, and torch's dropouts obeying them."""

import itertools

import torch
import torch.nn.functional as F

from megatron_lite.parallel.random import dropout, micro_batch_seed, mix, seed_device

CPU = torch.device("cpu")


def test_seeds_are_the_same_for_ever():
    # A resumed run continues with the masks of the version that began it.
    assert mix() == 0x9E3779B97F4A7C15
    assert mix(1, 2, 3) == micro_batch_seed(1, 2, 3) == 0x48CF5028B6DF10DB


def test_seeds_differ_in_the_bits_the_cpu_generator_takes():
    seeds = {micro_batch_seed(s, t, m) & 0xFFFFFFFF for s, t, m in itertools.product(range(3), range(50), range(50))}
    assert len(seeds) >= 7500 - 2
    ones = sum(bin(micro_batch_seed(0, 0, m) ^ micro_batch_seed(0, 0, m + 1)).count("1") for m in range(1000))
    assert abs(ones / 1000 - 32) < 1


def test_dropout_is_a_function_of_its_seed():
    values = torch.ones(1000)
    first, other = dropout(values, 0.3, 5), dropout(values, 0.3, 6)
    torch.rand(7)
    assert torch.equal(dropout(values, 0.3, 5), first) and not torch.equal(first, other)
    assert 0.25 < (first == 0).float().mean() < 0.35
    assert torch.allclose(first[first != 0], torch.tensor(1 / 0.7))
    assert dropout(values, 0.3, None) is values and dropout(values, 0.0, 5) is values


def test_attention_dropout_obeys_the_seed():
    heads = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(0))

    def attend(seed):
        seed_device(CPU, seed)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True, dropout_p=0.5)

    assert torch.equal(attend(1), attend(1)) and not torch.equal(attend(1), attend(2))
