"""Second derivatives are right, or an error: on every way on which PyTorch asks for them, of every op."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastnce
from fastnce.backends import native
from fastnce.ops.blur_resample import blur_kernel, blur_resample
from fastnce.ops.conv3x3 import conv3x3
from fastnce.ops.instance_norm import instance_norm

LABELS = torch.tensor([0, 0, 1, 1, 2])
IDS = torch.tensor([0, 5, 5, 3])


def made(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


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


def pair_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one tensor, as of one network."""
    return x, x.flip(0) * 1.5


def others_of(x: Tensor) -> Tensor:
    return made(*x.shape).to(x.dtype)


REFUSED = {
    "info_nce": lambda x, **kw: fastnce.info_nce(x, others_of(x), **kw),
    "info_nce sum of a queue": lambda x, **kw: fastnce.info_nce(
        others_of(x), others_of(x).sin(), x, reduction="sum", **kw
    ),
    "info_nce none": lambda x, **kw: fastnce.info_nce(*pair_of(x), reduction="none", **kw),
    "info_nce temperature": lambda x, **kw: fastnce.info_nce(
        others_of(x), others_of(x).cos(), temperature=x[0, 0].exp(), **kw
    ),
    "nt_xent": lambda x, **kw: fastnce.nt_xent(*pair_of(x), **kw),
    "nt_xent none": lambda x, **kw: fastnce.nt_xent(*pair_of(x), reduction="none", **kw),
    "sup_con": lambda x, **kw: fastnce.sup_con(x, LABELS, **kw),
    "sup_con none": lambda x, **kw: fastnce.sup_con(x, LABELS, reduction="none", **kw),
    "conditional_contrastive": lambda x, **kw: fastnce.conditional_contrastive(
        *pair_of(x), LABELS, **kw
    ),
    "conditional_contrastive none": lambda x, **kw: fastnce.conditional_contrastive(
        *pair_of(x), LABELS, reduction="none", **kw
    ),
    "patch_nce": lambda x, **kw: fastnce.patch_nce(x[None], others_of(x)[None], **kw),
    "pairwise_cosine_similarity": lambda x, **kw: fastnce.pairwise_cosine_similarity(x, **kw),
    "sample_patches normalized": lambda x, **kw: fastnce.sample_patches(
        x.view(1, 3, 5, 2), patch_ids=IDS, normalize=True, **kw
    )[0],
    "tap_patches normalized": lambda x, **kw: torch.cat(
        [y.flatten() for y in fastnce.tap_patches(x.view(1, 3, 5, 2), patch_ids=IDS, normalize=True, **kw)[:2]]
    ),
}  # fmt: skip


@each_way
@pytest.mark.parametrize("op", REFUSED)
def test_fused_kernels_refuse(op, way, fused_backend):
    attempt = ways(lambda x: REFUSED[op](x, backend=fused_backend), made(5, 6, seed=0).float())
    with pytest.raises(RuntimeError, match="no second derivative.*backend='torch'"):
        attempt[way]()


def test_of_plain_pytorch_the_hessian_is_that_of_the_equation():
    """Against differences of gradients."""
    x = made(4, 8, seed=0)
    hessian = torch.autograd.functional.hessian(
        lambda a: fastnce.info_nce(a, made(4, 8), backend="torch"), x
    )
    assert hessian.abs().max() > 0.1

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(fastnce.info_nce(x, made(4, 8)), x)[0]

    step = torch.zeros_like(x)
    step[1, 2] = 1e-6
    difference = (gradient(x + step) - gradient(x - step)) / 2e-6
    torch.testing.assert_close(hessian[1, 2], difference, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_the_first_derivative_may_be_made_with_a_graph(fused_backend):
    """As second-order optimisers do for all parameters; and be clipped in place."""
    x = made(5, 6, seed=0).requires_grad_()
    loss = fastnce.info_nce(x * 1, made(5, 6), backend=fused_backend)
    loss /= 2  # in place: nothing that is saved
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (loss + x.square().sum()).backward(create_graph=True)
    torch.testing.assert_close(x.grad.detach(), expected + 2 * x.detach())
    torch.nn.utils.clip_grad_norm_([x], 1e-3)
    assert x.grad.detach().norm() < 1.1e-3


def two_maps(x: Tensor) -> Tensor:
    return torch.cat([x.view(1, 3, 5, 2), x.cos().view(1, 3, 5, 2)])


EXACT = {
    "sample_patches": lambda x, **kw: fastnce.sample_patches(two_maps(x), patch_ids=IDS, **kw)[0],
    "tap_patches": lambda x, **kw: torch.cat(
        [y.sin().flatten() for y in fastnce.tap_patches(two_maps(x), patch_ids=IDS, **kw)[:2]]
    ),
    "tap_patches unused map": lambda x, **kw: fastnce.tap_patches(two_maps(x), patch_ids=IDS, **kw)[
        1
    ].sin(),
}


@each_way
@pytest.mark.parametrize("op", EXACT)
def test_patches_have_exact_ones(op, way, fused_backend):
    got = ways(lambda x: EXACT[op](x, backend=fused_backend), made(5, 6, seed=0).float())[way]()
    truth = ways(lambda x: EXACT[op](x, backend="torch"), made(5, 6, seed=0))[way]()
    torch.testing.assert_close(got, truth.float())


def weights_of(x: Tensor) -> Tensor:
    """(16, 16, 3, 3), made of the map: one input of the convolution leads to the other."""
    return x.mean((0, 2, 3)).view(16, 1, 1, 1) * made(16, 16, 3, 3).to(x.dtype) / 12


MAPS = {
    "conv3x3": lambda x: conv3x3(x, weights_of(x), reflect=True),
    "conv3x3 of its own": lambda x: conv3x3(x, made(16, 16, 3, 3).to(x.dtype) / 12),
    "instance_norm": lambda x: instance_norm(x, x.cos(), slope=0.2),
    "blur_resample": lambda x: blur_resample(
        x, blur_kernel(16, halve=True).to(x.dtype), halve=True
    ),
}


@pytest.mark.skipif(native.available() != "ok", reason=native.available())
@each_way
@pytest.mark.parametrize("op", MAPS)
def test_maps_have_exact_ones(op, way):
    """What R1 and WGAN-GP need of a critic."""
    start = made(1, 16, 3, 2, seed=0)
    got, truth = (ways(MAPS[op], x)[way]() for x in (start.float(), start))
    assert truth.abs().max() > 0.01
    assert (got - truth).norm() < 3e-5 * truth.norm()
