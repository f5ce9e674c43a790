"""Learning-rate curves against closed forms and the schedulers of torch's users."""

import math

import pytest

from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.optim.schedule import Schedule, schedule


def curve(steps: int = 120, total: int = 100, **fields) -> list[float]:
    config = OptimizerConfig(lr=0.5, **fields)
    made = schedule(config, total_iterations=total, total_samples=8 * total, hidden_size=64)
    return [made.learning_rate(step, 8 * step) for step in range(steps)]


@pytest.mark.parametrize(
    ("style", "name"),
    [
        ("cosine", "get_cosine_schedule_with_warmup"),
        ("linear", "get_linear_schedule_with_warmup"),
        ("constant", "get_constant_schedule_with_warmup"),
        ("inverse-square-root", "get_inverse_sqrt_schedule"),
    ],
)
@pytest.mark.parametrize("unit", ["iters", "samples"])
def test_without_a_floor_it_is_the_schedule_of_transformers(style, name, unit):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    lengths = {"num_warmup_steps": 10}
    if style in ("cosine", "linear"):
        lengths["num_training_steps"] = 100
    reference = getattr(transformers, name)(optimizer, **lengths)
    expected = []
    for _ in range(100):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    warmup = {"lr_warmup_iters": 10} if unit == "iters" else {"lr_warmup_samples": 80}
    ours = curve(100, lr_decay_style=style, **warmup)
    if style == "inverse-square-root" and unit == "samples":
        # Relative to the warm-up, so counting in samples changes nothing either.
        assert ours[1:] == pytest.approx(expected[1:], rel=1e-12)
    else:
        assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_decay_goes_from_peak_to_floor_and_stays(style):
    rates = curve(lr_decay_style=style, min_lr=0.1, lr_warmup_iters=20, lr_decay_iters=80, lr_warmup_init=0.05)
    assert rates[0] == 0.05 and rates[10] == pytest.approx(0.275) and rates[20] == 0.5
    assert rates[50] == pytest.approx(0.3)  # half way both are half way
    assert rates[80] == pytest.approx(0.1) and set(rates[81:]) == {0.1}
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_cosine_is_the_closed_form():
    rates = curve(lr_decay_style="cosine", min_lr=0.1)
    assert rates[25] == pytest.approx(0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_inverse_square_root_has_a_floor():
    rates = curve(lr_decay_style="inverse-square-root", lr_warmup_iters=16, min_lr=0.3)
    assert rates[25] == pytest.approx(0.5 * 4 / 5) and rates[64] == 0.3 and min(rates[16:]) == 0.3


def test_vaswani_is_the_formula_of_the_paper():
    rates = curve(lr_decay_style="vaswani", lr_warmup_iters=16)
    for done, rate in enumerate(rates):
        step = done + 1
        assert rate == pytest.approx(0.5 * 64**-0.5 * min(step**-0.5, step * 16**-1.5), rel=1e-12)
    assert min(curve(lr_decay_style="vaswani", lr_warmup_iters=16, min_lr=0.01)[15:]) == 0.01


def test_a_warm_up_fraction_is_one_of_the_decay():
    assert curve(lr_warmup_fraction=0.1) == curve(lr_warmup_iters=10)
    assert curve(lr_warmup_fraction=0.1, lr_decay_samples=400) == curve(lr_warmup_samples=40, lr_decay_samples=400)


def test_samples_count_where_the_batch_grows():
    made = schedule(OptimizerConfig(lr_warmup_samples=100), 10, 1000, 64)
    assert made == Schedule("cosine", "samples", 0.0, 3e-4, 0.0, 100, 1000, 64)
    assert made.learning_rate(iteration=99, consumed_samples=50) == pytest.approx(1.5e-4)


def test_a_longer_run_with_a_given_decay_changes_nothing_earlier():
    assert curve(100, total=100, lr_decay_iters=90) == curve(100, total=900, lr_decay_iters=90)


def test_a_run_that_ends_within_its_warm_up_is_told_with_numbers():
    def shortfall(**fields):
        made = schedule(OptimizerConfig(lr=0.5, **fields), total_iterations=100, total_samples=800, hidden_size=64)
        return made.shortfall(100, 800)

    assert (
        shortfall(lr_warmup_iters=100) is shortfall(lr_warmup_samples=800) is shortfall(lr_warmup_fraction=0.9) is None
    )
    assert shortfall() is None
    told = shortfall(lr_warmup_iters=1000)
    assert "the warm-up is 1,000 iterations and the run 100: the learning rate ends at 0.0495" in told
    assert "801 samples and the run 800" in shortfall(lr_warmup_samples=801)
