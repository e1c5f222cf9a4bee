"""The benchmark of a CUT step: what it compares with is the same step."""

import pytest
import torch

from benchmarks import cut_step


def test_the_published_step_is_ours():
    assert cut_step.check()["float64"] < 1e-6


@pytest.mark.parametrize("name", ["float64", "fastnce fp32"])
@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_another_step_is_not_timed(name, value):
    same = {"float64": 1e-7, "eager fp32": 1e-3, "fastnce fp32": 2e-3}
    cut_step.require_same(same)
    with pytest.raises(RuntimeError, match="not the same step"):
        cut_step.require_same({**same, name: value})


def test_report_has_a_row_per_provider():
    names = cut_step.PROVIDERS
    groups = dict.fromkeys([*cut_step._GROUPS, "other"], 0.5)
    results = {
        "machine": {"device": "here", "threads": torch.get_num_threads()},
        "size": 256,
        "check": {"float64": 1e-7, "eager fp32": 1e-3, "fastnce fp32": 2e-3},
        "seconds": {name: [2.0 / (i + 1)] for i, name in enumerate(names)},
        "peak_bytes": dict.fromkeys(names, 10**9),
        "breakdown": dict.fromkeys(names, groups),
    }
    text = cut_step.report(results)
    assert "| fastnce fp32 | 1.00 (1.00 to 1.00) | 2.00 | 712 | 1000 | 1.00 |" in text
