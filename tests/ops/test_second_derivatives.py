"""Second derivatives are right, or an error: on every way on which PyTorch asks for them, of every op."""

from collections.abc import Callable

import pytest
import torch
from forms import LOSSES, REDUCED, gaussian, of_rows, rows_of
from torch import Tensor

import fastnce
from fastnce.backends import native
from fastnce.ops.blur_resample import blur_kernel, blur_resample
from fastnce.ops.conv3x3 import conv3x3
from fastnce.ops.instance_norm import instance_norm

IDS = torch.tensor([0, 5, 5, 3])


def ways(op: Callable[[Tensor], Tensor], start: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to a second derivative of ``op``, each in the dtype of ``start``; through a layer, as nobody has the leaf itself."""

    def loss(w):
        return op(w.sin()).square().sum()

    def leaf():
        return start.clone().requires_grad_()

    def slope(w):
        return torch.autograd.grad(loss(w), w, create_graph=True)[0]

    def named():
        w = leaf()
        return torch.autograd.grad(loss(w) + slope(w).square().sum(), w)[0]

    def backward_to():
        w = leaf()
        (loss(w) + slope(w).square().sum()).backward(inputs=[w])
        return w.grad

    def plain():
        """Nothing stands behind the op, so that the gradient that arrives requires none itself."""
        w = leaf()
        out = op(w.sin()).sum()
        (grad,) = torch.autograd.grad(out, w, create_graph=True)
        return torch.autograd.grad(out + grad.square().sum(), w)[0]

    def upstream():
        w = leaf()
        out = op(w.sin())
        weight = out.detach().cos().requires_grad_()
        (grad,) = torch.autograd.grad(out, w, weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    return {
        "hessian": lambda: torch.autograd.functional.hessian(loss, start),
        "named": named,
        "backward to": backward_to,
        "plain": plain,
        "upstream": upstream,
    }


each_way = pytest.mark.parametrize("way", ["hessian", "named", "backward to", "plain", "upstream"])


def of_both_sides(op: str, **options: object) -> Callable:
    """All rows of one tensor, as of one network."""

    def call(x: Tensor, backend: str) -> Tensor:
        sample = of_rows(op, (x, x), x.dtype, **options)
        rows = {name: x.view_as(sample.arguments[name]) for name in rows_of(sample)}
        rows = {name: y.flip(-2) * 1.5 if i else y for i, (name, y) in enumerate(rows.items())}
        return getattr(fastnce, op)(**sample.arguments | rows, backend=backend)

    return call


def other(x: Tensor, seed: int = 1) -> Tensor:
    return gaussian(*x.shape, seed=seed).to(x.dtype)


def masked(query: Tensor, key: Tensor, *negatives: Tensor, **options: object) -> Tensor:
    ids = torch.arange(len(query)) % 3
    more = {"query_ids": ids, "in_batch_negatives": True}
    return fastnce.info_nce(query, key, *negatives, **more, **options)


REFUSED = {
    **{op: of_both_sides(op) for op in LOSSES},
    **{f"{op} none": of_both_sides(op, reduction="none") for op in REDUCED},
    "info_nce of one side": lambda x, **kw: fastnce.info_nce(x, other(x), **kw),
    "info_nce of a queue": lambda x, **kw: fastnce.info_nce(other(x), other(x, 2), x, reduction="sum", **kw),
    "info_nce of the temperature": lambda x, **kw: fastnce.info_nce(other(x), other(x, 2), temperature=x[0, 0].exp(), **kw),
    "masked": lambda x, **kw: masked(x, other(x), **kw),
    "masked none": lambda x, **kw: masked(other(x), x, reduction="none", decoupled=True, **kw),
    "masked weights": lambda x, **kw: masked(other(x), x, reduction="none", weights=torch.rand(len(x)), **kw),
    "masked queue": lambda x, **kw: masked(other(x), other(x, 2), x, negative_mask=torch.arange(len(x)) > 0, **kw),
    "masked temperature": lambda x, **kw: masked(other(x), other(x, 2), temperature=x[0, 0].exp(), **kw),
    "sample_patches normalized": lambda x, **kw: fastnce.sample_patches(x.view(1, 3, 5, 2), patch_ids=IDS, normalize=True, **kw)[0],
    "tap_patches normalized": lambda x, **kw: torch.cat(
        [y.flatten() for y in fastnce.tap_patches(x.view(1, 3, 5, 2), patch_ids=IDS, normalize=True, **kw)[:2]]
    ),
}  # fmt: skip


@each_way
@pytest.mark.parametrize("op", REFUSED)
def test_fused_kernels_refuse(op, way, fused_backend, needs_support):
    if "masked" in op:
        needs_support("masked_info_nce", fused_backend)
    attempt = ways(lambda x: REFUSED[op](x, backend=fused_backend), gaussian(5, 6).float())
    with pytest.raises(RuntimeError, match="second derivative.*backend='torch'"):
        attempt[way]()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_the_first_derivative_may_be_made_with_a_graph(fused_backend):
    """As second-order optimisers do for all parameters; and be clipped in place."""
    x = gaussian(5, 6).requires_grad_()
    loss = fastnce.info_nce(x * 1, gaussian(5, 6, seed=1), backend=fused_backend)
    loss /= 2  # in place: nothing that is saved
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (loss + x.square().sum()).backward(create_graph=True)
    torch.testing.assert_close(x.grad.detach(), expected + 2 * x.detach())
    torch.nn.utils.clip_grad_norm_([x], 1e-3)
    assert x.grad.detach().norm() < 1.1e-3


def two_maps(x: Tensor) -> Tensor:
    return torch.cat([x.view(1, 3, 5, 2), x.cos().view(1, 3, 5, 2)])


def tapped(x: Tensor, **kw: object) -> tuple[Tensor, Tensor]:
    return fastnce.tap_patches(two_maps(x), patch_ids=IDS, **kw)[:2]


EXACT = {
    "sample_patches": lambda x, **kw: fastnce.sample_patches(two_maps(x), patch_ids=IDS, **kw)[0],
    "tap_patches": lambda x, **kw: torch.cat([y.sin().flatten() for y in tapped(x, **kw)]),
    "tap_patches unused map": lambda x, **kw: tapped(x, **kw)[1].sin(),
}


@each_way
@pytest.mark.parametrize("op", EXACT)
def test_patches_have_exact_ones(op, way, fused_backend):
    got = ways(lambda x: EXACT[op](x, backend=fused_backend), gaussian(5, 6).float())[way]()
    truth = ways(lambda x: EXACT[op](x, backend="torch"), gaussian(5, 6))[way]()
    torch.testing.assert_close(got, truth.float())


KERNEL = gaussian(16, 16, 3, 3, seed=1) / 12
MAPS = {
    # The weights are made of the map: one input of the convolution leads to the other.
    "conv3x3": lambda x: conv3x3(x, x.mean((0, 2, 3)).view(16, 1, 1, 1) * KERNEL.to(x), reflect=True),
    "conv3x3 of its own": lambda x: conv3x3(x, KERNEL.to(x)),
    "instance_norm": lambda x: instance_norm(x, x.cos(), slope=0.2),
    "instance_norm leaky": lambda x: instance_norm(x, slope=0.2),
    "blur_resample": lambda x: blur_resample(x, blur_kernel(16, halve=True).to(x), halve=True),
    "blur_resample double": lambda x: blur_resample(x, blur_kernel(16, halve=False).to(x), halve=False),
}  # fmt: skip


@pytest.mark.skipif(native.available() != "ok", reason=native.available())
@each_way
@pytest.mark.parametrize("op", MAPS)
def test_maps_have_exact_ones(op, way):
    """What R1 and WGAN-GP need of a critic."""
    start = gaussian(1, 16, 3, 2)
    got, truth = (ways(MAPS[op], x)[way]() for x in (start.float(), start))
    assert truth.abs().max() > 0.01
    assert (got - truth).norm() < 3e-5 * truth.norm()
