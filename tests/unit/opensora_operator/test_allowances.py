"""So many times at once, so many times a second."""

from __future__ import annotations

from opensora_operator.allowances import Allowances


def test_a_key_may_be_used_in_a_burst_and_then_at_its_pace() -> None:
    now = [0.0]
    allowances = Allowances(burst=3, per_second=0.5, clock=lambda: now[0])
    assert [allowances.take("a") for _ in range(4)] == [True, True, True, False]
    assert allowances.seconds_left("a") == 2.0
    assert allowances.take("b"), "keys do not share"
    now[0] = 2.0
    assert [allowances.take("a") for _ in range(2)] == [True, False]
    now[0] = 1000.0
    assert [allowances.take("a") for _ in range(4)] == [True, True, True, False]


def test_only_so_many_keys_are_remembered() -> None:
    allowances = Allowances(burst=1, per_second=0.001, clock=lambda: 0.0, max_keys=2)
    for key in ("a", "b", "c"):
        assert allowances.take(key)
    assert not allowances.take("c")
    assert not allowances.take("b")
    assert allowances.take("a"), "the longest unused one is forgotten"
