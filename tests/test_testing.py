"""The numerical contract notices wrong kernels: each test breaks a correct one in one way."""

import dataclasses

import pytest
import python_kernels
import torch

from fastnce import backends
from fastnce.testing import SAMPLE_INPUTS, Sample, assert_close_to_truth, error, run, truth


def sample_of(op: str, name: str, dtype=torch.float32) -> Sample:
    samples = SAMPLE_INPUTS[op](dtype, "cpu", torch.Generator().manual_seed(0))
    return next(sample for sample in samples if sample.name == name)


@pytest.fixture
def broken(monkeypatch):
    """Installs the backend "broken": python_kernels with one function wrapped."""

    def install(function: str, change) -> None:
        original = getattr(python_kernels, function)
        monkeypatch.setattr(python_kernels, function, change(original))
        monkeypatch.setitem(backends._TABLE, "broken", python_kernels)

    return install


def on_results(change):
    """A wrapper that changes (loss, lse, grads)."""
    return lambda original: lambda *args, **kwargs: change(*original(*args, **kwargs))


def on_inputs(change):
    """A wrapper that changes the first tensor or the options on their way in."""

    def wrap(original):
        def wrapped(first, *args, **kwargs):
            first, kwargs = change(first, kwargs)
            return original(first, *args, **kwargs)

        return wrapped

    return wrap


def scaled_gradient(index: int, factor: float):
    def change(loss, lse, grads):
        grads = list(grads)
        grads[index] = grads[index] * factor
        return loss, lse, tuple(grads)

    return on_results(change)


def one_row_wrong(loss, lse, grads):
    dq = grads[0].clone()
    dq[0, -1] = dq[0, -2]
    return loss, lse, (dq, *grads[1:])


def nan_in_one_element(loss, lse, grads):
    dk = grads[1].clone()
    dk[0, 0, 0] = torch.nan
    return loss, lse, (grads[0], dk, *grads[2:])


def radial_part(loss, lse, grads):
    """As if the backward of the normalisation forgot to project."""
    return loss, lse, (grads[0] + 1e-4 * torch.ones_like(grads[0]), *grads[1:])


BROKEN_INFO_NCE = {
    "gradient of the query off by 1e-4": ("queue", scaled_gradient(0, 1 + 1e-4)),
    "gradient of the key off by 1e-4": ("queue", scaled_gradient(1, 1 + 1e-4)),
    "gradient of the queue off by 1e-4": ("queue", scaled_gradient(2, 1 + 1e-4)),
    "gradient of the temperature off by 1e-4": ("queue", scaled_gradient(3, 1 + 1e-4)),
    "gradient with the wrong sign": ("queue", scaled_gradient(0, -1)),
    "gradient of zero": ("in_batch", scaled_gradient(1, 0.0)),
    "one row of the gradient": ("in_batch", on_results(one_row_wrong)),
    "NaN in one element": ("in_batch", on_results(nan_in_one_element)),
    "no projection": ("in_batch", on_results(radial_part)),
    "loss off by 1e-5": (
        "in_batch",
        on_results(lambda loss, lse, grads: (loss + 1e-5, lse, grads)),
    ),
    "products in bf16": (
        "in_batch",
        on_inputs(lambda q, kwargs: (q.bfloat16().float(), kwargs)),
    ),
    "products in tf32": (
        "in_batch",
        on_inputs(lambda q, kwargs: ((q.view(torch.int32) & ~0x1FFF).view(torch.float32), kwargs)),
    ),
    "one direction only": (
        "symmetric_none",
        on_inputs(lambda q, kwargs: (q, kwargs | {"symmetric": False})),
    ),
    "in-batch negatives forgotten": (
        "queue_in_batch",
        on_inputs(lambda q, kwargs: (q, kwargs | {"in_batch": False})),
    ),
    "normalised though not asked": (
        "dot",
        on_inputs(lambda q, kwargs: (q, kwargs | {"normalize": True})),
    ),
}


@pytest.mark.parametrize("fault", BROKEN_INFO_NCE)
def test_wrong_info_nce_is_noticed(fault, broken):
    name, change = BROKEN_INFO_NCE[fault]
    broken("info_nce_forward", change)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close_to_truth("info_nce", "broken", sample_of("info_nce", name), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wrong_low_precision_gradient_is_noticed(dtype, broken):
    factor = 1 + 6 * torch.finfo(dtype).eps
    broken("info_nce_forward", scaled_gradient(0, factor))
    with pytest.raises(AssertionError, match="d query is off by"):
        assert_close_to_truth("info_nce", "broken", sample_of("info_nce", "queue", dtype), dtype)


def test_loss_of_low_precision_inputs_is_held_to_fp32(broken):
    broken("info_nce_forward", on_results(lambda loss, lse, g: (loss.bfloat16().float(), lse, g)))
    sample = sample_of("info_nce", "in_batch", torch.bfloat16)
    with pytest.raises(AssertionError, match="out is off by"):
        assert_close_to_truth("info_nce", "broken", sample, torch.bfloat16)


def test_wrong_backward_of_unreduced_losses_is_noticed(broken):
    def sum_instead(original):
        return lambda grad, *args, **kwargs: original(torch.ones_like(grad), *args, **kwargs)

    broken("info_nce_backward", sum_instead)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close_to_truth("info_nce", "broken", sample_of("info_nce", "none"), torch.float32)


def test_forgotten_self_logit_is_noticed(broken):
    broken("info_nce_forward", on_inputs(lambda q, kw: (q, kw | {"self_logit": None})))
    sample = sample_of("patch_nce", "self_logit")
    with pytest.raises(AssertionError, match="is off by"):
        assert_close_to_truth("patch_nce", "broken", sample, torch.float32)


def test_gradient_of_the_wrong_dtype_or_missing_is_noticed(broken):
    broken("info_nce_forward", on_results(lambda a, b, grads: (a, b, (None, *grads[1:]))))
    with pytest.raises(AssertionError, match="d query is missing"):
        assert_close_to_truth(
            "info_nce", "broken", sample_of("info_nce", "in_batch"), torch.float32
        )


def test_own_class_as_a_negative_only_is_noticed(broken):
    def proxy_only(original):
        def wrapped(e, p, labels, *args, **kwargs):
            return original(e, p, torch.arange(len(labels)), *args, **kwargs)

        return wrapped

    broken("conditional_contrastive_forward", proxy_only)
    sample = sample_of("conditional_contrastive", "mean")
    with pytest.raises(AssertionError, match="is off by"):
        assert_close_to_truth("conditional_contrastive", "broken", sample, torch.float32)


def test_lost_repeats_of_a_position_are_noticed(broken):
    def overwrite(original):
        def wrapped(grad_patches, patches, norms, ids, likes, normalize):
            last = [len(i) - 1 for i in ids]
            keep = [
                torch.tensor([n for n in range(m + 1) if i[n] not in i[n + 1 :]])
                for m, i in zip(last, ids, strict=True)
            ]
            grads = [g[:, k] for g, k in zip(grad_patches, keep, strict=True)]
            chosen = [i[k] for i, k in zip(ids, keep, strict=True)]
            return original(grads, patches, norms, chosen, likes, normalize)

        return wrapped

    broken("sample_patches_backward", overwrite)
    assert_close_to_truth(
        "sample_patches", "broken", sample_of("sample_patches", "one"), torch.float32
    )
    with pytest.raises(AssertionError, match="d features is off by"):
        assert_close_to_truth(
            "sample_patches", "broken", sample_of("sample_patches", "repeated"), torch.float32
        )


def test_errors_are_weighed_by_the_norm_of_the_row():
    """A small row has a large gradient, which must not hide an error in the gradient of another."""
    sample = sample_of("info_nce", "in_batch")
    query = sample.arguments["query"].detach().clone()
    query[0] *= 1e-10
    sample = Sample("small row", {**sample.arguments, "query": query.requires_grad_()})
    got = run("info_nce", sample, backend="torch")["d query"]
    others = truth("info_nce", sample)["d query"][1:].abs().amax(dim=1)
    worst = others.argmax()
    got[1 + worst] *= 1.01
    assert got[0].abs().max() > 1e6 * others[worst]
    assert error("info_nce", sample, "d query", got) > 0.01 * others[worst]


def test_a_sample_that_plain_pytorch_cannot_compute_is_refused():
    """Here fp16 cannot hold the gradient at all; a bound of twice that error would allow anything."""
    query = (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 6e4).half()
    arguments = {"query": query.requires_grad_(), "positive_key": torch.ones(4, 8).half()}
    with pytest.raises(AssertionError, match="plain PyTorch is itself off"):
        assert_close_to_truth("info_nce", "torch", Sample("huge", arguments), torch.float16)


def test_samples_cover_every_public_op():
    import fastnce

    public = {name for name in fastnce.__all__ if callable(getattr(fastnce, name))}
    # tap_patches is sample_patches inside a network, and has tests of its own.
    others = {"use_backend", "tap_patches", "NegativeQueue", "GradCache"}
    assert set(SAMPLE_INPUTS) == public - others
    assert dataclasses.is_dataclass(Sample)
