"""NT-Xent, SimCLR's loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastnce.ops import _checks
from fastnce.ops.sup_con import sup_con_reduced
from fastnce.registry import Make, Op, Sample, declare


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709).

    .. math:: \ell_i = \log \sum_{j \ne i} e^{s_{ij} / \tau} - s_{i\,p(i)} / \tau

    over the 2N rows of ``cat([z1, z2])``, with the cosine s and the other view p(i) of row i. It is the supervised contrastive
    loss where each image is a class of its own.

    Args:
        z1: (N, D), the first views; float64, float32, bfloat16 or float16. Normalisation is part of the op.
        z2: (N, D), the second views.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for (2N,), the rows of ``z1`` first.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Example:
        >>> import torch, fastnce
        >>> loss = fastnce.nt_xent(torch.randn(32, 128), torch.randn(32, 128))
    """
    op = "nt_xent"
    z1, z2 = _checks.same_dtype_under_autocast(z1, z2)
    _checks.expect_float_tensor(op, "z1", z1, (2,), "(N, D)")
    _checks.expect_float_tensor(op, "z2", z2, (2,), "(N, D)")
    _checks.expect_shape(op, "z2", z2, tuple(z1.shape), "the shape of z1")
    _checks.expect_alike(op, "z2", z2, "z1", z1)
    image = torch.arange(z1.shape[0], device=z1.device)
    return sup_con_reduced(
        op, torch.cat([z1, z2]), torch.cat([image, image]), temperature, reduction, backend
    )


def _samples(make: Make) -> Iterator[Sample]:
    z1 = make(17, 20)
    views = {"z1": z1, "z2": make.similar(z1)}
    yield Sample("mean", views)
    yield Sample("none", {**views, "temperature": 0.1, "reduction": "none"})
    yield Sample("temperature", {**views, "temperature": torch.tensor(0.2, requires_grad=True)})


declare(
    Op(
        "nt_xent",
        runs=("sup_con_forward", "sup_con_backward"),
        function=nt_xent,
        samples=_samples,
        typical="temperature",
    )
)
