"""Other people's losses beside ours: what each can be asked for, and that it is called as documented."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is not installed

from benchmarks import baselines, harness, report, rivals_info_nce, suite  # noqa: E402
from benchmarks.case import Draw, Provider  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_rival_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(rivals_info_nce.importlib.util, "find_spec", lambda name: None)
    case = suite.find_case("info_nce", "two directions, both gradients, 65536 x 256")
    reasons = {p.name: p.reason for p in rivals_info_nce.providers(case, GPU)}
    assert reasons["memeff"] == "not installed; pip install memeff"
    assert reasons["inf-cl"] == "not installed; pip install inf-cl"
    assert reasons["siglip-kernel (sigmoid loss)"] == "not installed; pip install siglip-kernel"
    assert rivals_info_nce.providers(case, CPU) == []


def test_a_rival_is_not_asked_for_what_it_does_not_have(monkeypatch):
    monkeypatch.setattr(rivals_info_nce.importlib.util, "find_spec", lambda name: object())

    def reasons(name: str) -> dict[str, str]:
        case = suite.find_case("info_nce", name)
        return {p.name: p.reason for p in rivals_info_nce.providers(case, GPU)}

    assert set(reasons("two directions, both gradients, 65536 x 256").values()) == {"ok"}
    narrow = reasons("two directions, both gradients, 65536 x 128")
    assert narrow["inf-cl"].startswith("needs D to be a multiple of 256")
    learnt = reasons("CLIP, two directions, learnt temperature, 8192 x 512")
    assert learnt["memeff"] == "has no gradient of the temperature"
    assert learnt["inf-cl"] == "its gradient of the temperature fails on one GPU"
    assert "inf-cl" not in reasons("keys without gradient, 65536 x 256")
    assert reasons("MoCo, queue of 65536, 256 x 128") == {}


@pytest.fixture
def modules(monkeypatch):
    """Stands in for a package: ``modules("memeff", Loss=...)``."""

    def install(name: str, **members) -> None:
        module = type(sys)(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        find = rivals_info_nce.importlib.util.find_spec
        monkeypatch.setattr(
            rivals_info_nce.importlib.util, "find_spec", lambda x: x == name or find(x)
        )

    return install


def small(name: str):
    return dataclasses.replace(suite.find_case("info_nce", name), shape={"N": 24, "D": 16})


def rival(case, name: str) -> Provider:
    return next(p for p in rivals_info_nce.providers(case, GPU) if p.name == name)


@pytest.mark.parametrize(
    ("case", "loss"),
    [
        ("two directions, both gradients, 65536 x 256", "MemoryEfficientCLIPLoss"),
        ("both gradients, 8192 x 256", "MemoryEfficientQwen3Loss"),
        ("keys without gradient, 65536 x 256", "MemoryEfficientLiTLoss"),
    ],
)
def test_memeff_is_called_as_documented(case, loss, modules):
    """With the interface of its documentation, over plain PyTorch: the form and the gradients' scale are the case's."""
    case = small(case)

    class Loss:
        def __init__(self, temperature=0.07, *, stable=True, margin=0.1):
            assert not stable and (margin >= 2) == (loss == "MemoryEfficientQwen3Loss")
            self.temperature = temperature

        def __call__(self, query, key):
            symmetric = loss == "MemoryEfficientCLIPLoss"
            return baselines.info_nce(query, key, temperature=self.temperature, symmetric=symmetric)

    modules("memeff", **{loss: Loss})
    check(case, rival(case, "memeff"))


def test_inf_cl_is_called_once_for_each_direction(modules):
    case = small("two directions, both gradients, 65536 x 256")

    def cal_inf_loss(q, k, labels=None, scale=None, head_dim=256):
        assert torch.allclose(q.norm(dim=-1), torch.ones(len(q), dtype=q.dtype))
        target = torch.arange(len(q))
        return torch.nn.functional.cross_entropy(q @ k.T * scale, target, reduction="none")

    modules("inf_cl", cal_inf_loss=cal_inf_loss)
    large = dataclasses.replace(case, shape={"N": 128, "D": 256})
    assert rival(large, "inf-cl").reason == "ok"
    check(case, rival(case, "inf-cl"), single=True)


def test_siglip_kernel_is_held_against_its_own_loss(modules):
    case = small("two directions, both gradients, 65536 x 256")

    def fused_siglip_loss(img, txt, log_temperature, bias):
        return baselines.sigmoid_loss(img, txt, log_temperature.exp(), bias)

    modules("siglip_kernel", fused_siglip_loss=fused_siglip_loss)
    provider = rival(case, "siglip-kernel (sigmoid loss)")
    found = harness.measure(
        case,
        [Provider("eager", suite.fused(case, "torch")), provider],
        suite.fused(case, "torch"),
        CPU,
        torch.float32,
        0.01,
    )
    assert [x["status"] for x in found["providers"]] == ["ok", "ok"]
    assert found["providers"][1]["other_function"]
    # Its time is in the table, and in no comparison with ours.
    quick = {**found["providers"][1], "seconds": {"median": 1e-9}}
    ours = {"name": "triton", "ours": True, "status": "ok", "seconds": {"median": 1.0}}
    assert report.summary([{**found, "providers": [quick, ours]}]) == [
        "No fused backend was timed; the tables say why."
    ]


def test_another_function_is_still_checked():
    case = small("two directions, both gradients, 65536 x 256")
    truth = rivals_info_nce._sigmoid_loss
    wrong = Provider("wrong", lambda inputs: 1.1 * truth(inputs), truth=truth)
    arguments = (suite.fused(case, "torch"), CPU, torch.float32, 0.01)
    (found,) = harness.measure(case, [wrong], *arguments)["providers"]
    assert found["status"] == "wrong"


def test_fp8_similarities_are_held_against_the_reference_that_rounds_too():
    case = small("keys without gradient, 65536 x 256")
    exact = Provider("torch", suite.fused(case, "torch"), ours=True)
    rounded = suite._fp8(exact, case)
    unrounded = dataclasses.replace(rounded, name="unrounded", call=exact.call)
    arguments = (suite.fused(case, "torch"), CPU, torch.float32, 0.01)
    found = harness.measure(case, [rounded, unrounded], *arguments)["providers"]
    assert [x["status"] for x in found] == ["ok", "wrong"]
    assert found[0]["rounds_products"] and found[0]["other_function"]


def test_the_sigmoid_loss_is_its_sum_over_pairs():
    draw = Draw(CPU, torch.float64)
    query, key = draw.normal(3, 5), draw.normal(3, 5)
    expected = 0.0
    for i in range(3):
        for j in range(3):
            sign = 1 if i == j else -1
            logit = 2.0 * float(query[i] @ key[j]) - 0.5
            expected += math.log1p(math.exp(-sign * logit)) / 3
    assert float(baselines.sigmoid_loss(query, key, 2.0, -0.5)) == pytest.approx(expected)


def check(case, provider: Provider, single: bool = False) -> None:
    dtype = torch.float32 if single else torch.float64
    inputs = case.inputs(CPU, dtype)
    truth = harness.run(suite.fused(case, "torch"), harness.in_double(inputs), case.wrt)
    found = harness.errors(harness.run(provider.call, inputs, case.wrt), truth)
    assert max(found.values()) < (1e-5 if single else 1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
def test_linear_cross_entropy_is_the_same_loss(symmetric):
    if rivals_info_nce._has_linear_cross_entropy() != "ok":
        pytest.skip("this torch has none")
    name = (
        "two directions, both gradients, 65536 x 256" if symmetric else "both gradients, 8192 x 256"
    )
    check(small(name), rival(small(name), "linear_cross_entropy"), single=True)
