import time

import pytest
import torch

from sslfast.bench.timing import (
    call_seconds,
    median_seconds,
    milliseconds,
    peak_extra_bytes,
    quantile,
    seconds_in_turns,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.2, 2.0), (0.5, 3.0), (0.8, 4.0), (1.0, 5.0)])
def test_quantile_is_one_of_the_values(share: float, value: float) -> None:
    assert quantile([5.0, 3.0, 1.0, 2.0, 4.0], share) == value
    assert quantile([7.0], share) == 7.0


def test_milliseconds() -> None:
    found = milliseconds([0.005, 0.001, 0.003, 0.002, 0.004])
    assert found == {"median_ms": 3.0, "quantile20_ms": 2.0, "quantile80_ms": 4.0}


def test_every_function_runs_once_in_every_round() -> None:
    order: list[str] = []
    functions = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    times = seconds_in_turns(functions, CPU, rounds=3)
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_the_first_call_is_not_counted() -> None:
    naps = iter([0.2, 0.0, 0.0, 0.0])
    assert median_seconds(lambda: time.sleep(next(naps)), CPU, rounds=3) < 0.2
    assert next(naps, None) is None
    assert call_seconds(lambda: None, CPU) >= 0


def test_peak_memory_of_a_call() -> None:
    peak = peak_extra_bytes(CPU, lambda: torch.ones(32, 2**20).sum())
    assert peak is None or 100 * 2**20 < peak < 400 * 2**20
