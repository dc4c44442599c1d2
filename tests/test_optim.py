import pytest

from msr_dist.optim import Schedule


def test_warm_up_rises_to_one():
    schedule = Schedule(warmup_steps=4)
    assert [schedule.factor(step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_falls_to_its_end(decay):
    schedule = Schedule(warmup_steps=2, decay=decay, final=0.1)
    factors = [schedule.factor(step, 12) for step in range(2, 13)]
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)
    assert factors[5] == pytest.approx(0.55)
