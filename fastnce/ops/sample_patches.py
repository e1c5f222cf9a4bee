"""Patch sampling."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.reference.normalize import normalize_rows
from fastnce.registry import Form, Make, Op, Operator, Sample, accumulation_dtype, declare

# From here on drawing again what came twice is quicker than a whole permutation.
_CHEAP_SHARE = 16


def sample_patches(
    features: Tensor | Sequence[Tensor],
    num_patches: int = 256,
    *,
    patch_ids: Tensor | Sequence[Tensor] | None = None,
    normalize: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    r"""Feature vectors at random positions of a feature map, the same positions for all images of the batch.

    .. math:: \text{patches}_{b s} = \text{features}_{b,\, :,\, id_s}

    Plain PyTorch: ``features.permute(0, 2, 3, 1).flatten(1, 2)[:, patch_ids]``.

    Args:
        features: (B, C, H, W), any strides; float64, float32, bfloat16 or float16. Or a list of maps, which gives lists.
        num_patches: S; ``min(num_patches, H * W)`` distinct positions are drawn without replacement.
        patch_ids: (S,) int64 positions ``h * W + w`` to take instead of drawing them; one per map if ``features`` is a list.
            A repeated position is allowed.
        normalize: divide each patch by its L2 norm; an all-zero patch stays zero.
        generator: the source of the draw, on the device of ``features``; None for the default one.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        ``(patches, patch_ids)``: (B, S, C) in the dtype of ``features``, whose gradient flows to ``features``; (S,) int64.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit together.
        IndexError: a patch id outside the map. On an accelerator, whose ids are not read, its patch is NaN, or the device raises.
        RuntimeError: the requested backend cannot run this.

    Examples:
        >>> import torch, fastnce
        >>> keys, patch_ids = fastnce.sample_patches(torch.randn(2, 64, 32, 32), num_patches=16)
        >>> queries, _ = fastnce.sample_patches(torch.randn(2, 64, 32, 32), patch_ids=patch_ids)
        >>> queries.shape
        torch.Size([2, 16, 64])
    """
    op = "sample_patches"
    maps, ids = _validated(op, features, num_patches, patch_ids, generator)
    patches = _of_each_kind(_gather_alike, op, maps, ids, bool(normalize), backend)
    return (patches[0], ids[0]) if isinstance(features, Tensor) else (patches, ids)


def tap_patches(
    features: Tensor | Sequence[Tensor],
    num_patches: int = 256,
    *,
    patch_ids: Tensor | Sequence[Tensor] | None = None,
    normalize: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor] | tuple[list[Tensor], list[Tensor], list[Tensor]]:
    r"""Hands feature maps on and samples patches from them: ``sample_patches`` inside a network.

    Results and gradients are those of ``sample_patches(features)``. But where the network goes on from the map that is
    returned, the backward adds the patches' gradient into the gradient that arrives for the map, where ``sample_patches``
    fills a map with zeros and PyTorch adds the two maps. A gradient that anyone else still holds is copied first.

    The returned map shares the memory of ``features``; PyTorch refuses to change it in place. Arguments and errors are those of
    ``sample_patches``.

    Returns:
        ``(features, patches, patch_ids)``: the map to go on with; (B, S, C) in the dtype of ``features``; (S,) int64. Of a list
        of maps, lists.

    Examples:
        >>> import torch, fastnce
        >>> first, second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)
        >>> x, patches, _ = fastnce.tap_patches(first(torch.randn(2, 3, 32, 32)), num_patches=16)
        >>> second(x).shape, patches.shape
        (torch.Size([2, 8, 28, 28]), torch.Size([2, 16, 8]))
    """
    op = "tap_patches"
    maps, ids = _validated(op, features, num_patches, patch_ids, generator)
    tapped = _of_each_kind(_tap_alike, op, maps, ids, bool(normalize), backend)
    passed, patches = ([pair[side] for pair in tapped] for side in (0, 1))
    if isinstance(features, Tensor):
        return passed[0], patches[0], ids[0]
    return passed, patches, ids


def _validated(
    op: str,
    features: Tensor | Sequence[Tensor],
    num_patches: int,
    patch_ids: Tensor | Sequence[Tensor] | None,
    generator: torch.Generator | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The maps and their positions, drawn unless given."""
    single = isinstance(features, Tensor)
    maps = [features] if single else _expect_maps(op, features)
    for layer, feature in enumerate(maps):
        name = "features" if single else f"features[{layer}]"
        _checks.expect_float_tensor(op, name, feature, (4,), "(B, C, H, W)")
    if patch_ids is not None:
        return maps, _expect_patch_ids(op, maps, patch_ids, single)
    _checks.expect_int_at_least(op, "num_patches", num_patches, 1)
    ids = [
        draw_patch_ids(
            feature.shape[2] * feature.shape[3],
            num_patches,
            device=feature.device,
            generator=generator,
        )
        for feature in maps
    ]
    return maps, ids


def _expect_maps(op: str, features: object) -> list[Tensor]:
    if not isinstance(features, (list, tuple)) or not features:
        raise TypeError(
            f"{op}: features must be a tensor (B, C, H, W) or a non-empty list of them, got "
            f"{'an empty list' if isinstance(features, (list, tuple)) else type(features).__name__}."
        )
    return list(features)


def _expect_patch_ids(op: str, maps: list[Tensor], patch_ids: object, single: bool) -> list[Tensor]:
    if not (
        isinstance(patch_ids, Tensor)
        if single
        else isinstance(patch_ids, (list, tuple)) and len(patch_ids) == len(maps)
    ):
        expected = "a tensor (S,)" if single else f"a list of {len(maps)} tensors, one per map"
        got = type(patch_ids).__name__
        got += f" of length {len(patch_ids)}" if isinstance(patch_ids, (list, tuple)) else ""
        raise ValueError(f"{op}: patch_ids must be {expected}, like features; got {got}.")
    ids = [patch_ids] if single else list(patch_ids)
    for layer, (feature, values) in enumerate(zip(maps, ids, strict=True)):
        name = "patch_ids" if single else f"patch_ids[{layer}]"
        _checks.expect_tensor(op, name, values, "(S,)")
        if values.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64, got {values.dtype}. Use {name}.long().")
        if values.dim() != 1 or 0 in values.shape:
            raise ValueError(
                f"{op}: {name} must have the shape (S,), S at least 1, got {_checks.shape_of(values)}."
            )
        if values.device != feature.device:
            raise ValueError(
                f"{op}: {name} is on {values.device} but its map is on {feature.device}. "
                f"Move it with {name}.to({str(feature.device)!r})."
            )
        if values.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(x) for x in values.aminmax())
            height, width = feature.shape[2:]
            if low < 0 or high >= height * width:
                raise IndexError(
                    f"{op}: {name} must lie in [0, {height * width}) for a map of {height} x {width} positions, "
                    f"got {low if low < 0 else high}."
                )
    return ids


def _of_each_kind(
    run: Callable[..., list],
    op: str,
    maps: list[Tensor],
    ids: list[Tensor],
    normalize: bool,
    backend: str | None,
) -> list:
    """The results of ``run`` for each map; maps of one device and dtype are in one call."""
    found = [None] * len(maps)
    for layers in _common.alike(maps):
        group = [maps[layer] for layer in layers], [ids[layer] for layer in layers]
        for layer, result in zip(layers, run(op, *group, normalize, backend), strict=True):
            found[layer] = result
    return found


def _gather_alike(
    op: str, maps: list[Tensor], ids: list[Tensor], normalize: bool, backend: str | None
) -> list[Tensor]:
    kernels = backends.select(op, maps[0], backend, maps)
    with _common.no_autocast(maps[0]):
        if kernels is backends.reference:
            pairs = zip(maps, ids, strict=True)
            return [plain(feature, id_, normalize) for feature, id_ in pairs]
        _checks.expect_fusable(op, maps[0])
        return list(
            SamplePatchesFunction.apply(kernels, normalize, *_common.distinct((*maps, *ids)))
        )


def _tap_alike(
    op: str, maps: list[Tensor], ids: list[Tensor], normalize: bool, backend: str | None
) -> list[tuple[Tensor, Tensor]]:
    kernels = backends.select(op, maps[0], backend, maps)
    # A compiler sees both uses of the map, and cannot trace sparse gradients.
    apart = (
        kernels is backends.reference
        or torch.compiler.is_compiling()
        or not _common.wants_grad(*maps)
    )
    if apart:
        patches = _gather_alike(op, maps, ids, normalize, backend)
        # A tensor of its own, so that its gradient, too, is the network's alone.
        return [(x.view_as(x), rows) for x, rows in zip(maps, patches, strict=True)]
    _checks.expect_fusable(op, maps[0])
    with _common.no_autocast(maps[0]):
        count = len(maps)
        tapped = TapFunction.apply(kernels, normalize, *maps, *ids)
        inner, patches = tapped[:count], tapped[count:]
        out = OwnGradientFunction.apply(*inner, *inner, *patches)
        return list(zip(out[:count], out[count:], strict=True))


class SamplePatchesFunction(torch.autograd.Function):
    """Autograd of ``sample_patches``, all maps in one call of the kernels of any fused backend."""

    @staticmethod
    def forward(
        ctx, kernels: ModuleType, normalize: bool, first: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        maps_and_ids = (first, *others)  # by a name: as in PatchNCEFunction
        count = len(maps_and_ids) // 2
        maps, ids = list(maps_and_ids[:count]), list(maps_and_ids[count:])
        patches, inverse_norms = kernels.sample_patches_forward(maps, ids, normalize)
        ctx.kernels, ctx.normalize = kernels, normalize
        # Only the maps' layouts are kept: the maps may be freed, or changed in place, before the backward.
        ctx.layouts = [(x.shape, _memory_format(x)) for x in maps]
        ctx.save_for_backward(*ids, *(patches if normalize else ()), *inverse_norms)
        return tuple(patches)

    @staticmethod
    def backward(ctx, *grad_patches: Tensor):
        count = len(grad_patches)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not ctx.normalize:
            grads = _linear_gradients(ctx, grad_patches)
        else:
            grads = _sampled_gradients(ctx, *grad_patches)
        return None, None, *grads, *(None,) * count


class TapFunction(torch.autograd.Function):
    """Maps and positions -> the maps and their patches; the backward adds the latter's gradient into the former's, in place.

    It may, because every output goes through ``OwnGradientFunction``.
    """

    @staticmethod
    def forward(ctx, kernels: ModuleType, normalize: bool, *maps_and_ids: Tensor):
        ctx.set_materialize_grads(False)
        patches = SamplePatchesFunction.forward(ctx, kernels, normalize, *maps_and_ids)
        return *maps_and_ids[: len(patches)], *patches

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        count = len(ctx.layouts)
        grads, grad_patches = gradients[:count], gradients[count:]
        if not torch.is_grad_enabled():
            grads = _tapped_gradients(ctx, *gradients)
        elif ctx.normalize:
            mine = [None if grad is None else grad.clone() for grad in grads]
            grads = _tapped_gradients(ctx, *mine, *grad_patches)
        else:
            found = zip(grads, _linear_gradients(ctx, grad_patches), strict=True)
            grads = [b if a is None else a if b is None else a + b for a, b in found]
        return None, None, *grads, *(None,) * count


class OwnGradientFunction(torch.autograd.Function):
    """Maps, the same maps again, and patches -> maps and patches; makes the gradients of maps the previous node's own.

    The gradient that arrives for a map may be held by others too: another summand, a hook, the caller. With it, an empty
    sparse gradient is sent to the same map, first. Where PyTorch adds a gradient to a sparse one that came before, it
    adds in place if nobody else holds the tensor or its memory, and otherwise into a new tensor. So the sum belongs to the
    receiver alone, and there was no copy unless it was needed. Where a graph is made of the gradients (``create_graph``),
    PyTorch has no such sum, and the receiver copies or adds out of place.
    """

    @staticmethod
    def forward(ctx, *maps_and_patches: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        count = len(maps_and_patches) // 3
        return *maps_and_patches[:count], *(x.detach() for x in maps_and_patches[2 * count :])

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        count = len(gradients) // 2
        if torch.is_grad_enabled():
            return *(None,) * count, *gradients
        both = zip(gradients[:count], gradients[count:], strict=True)
        empty = [None if g is None or patch is None else _empty_like(g) for g, patch in both]
        return *empty, *gradients


def _empty_like(x: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        size=x.shape, dtype=x.dtype, device=x.device, check_invariants=False
    )


def _linear_gradients(ctx, grad_patches: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of the maps, differentiable: patches that are not normalised are linear in their map."""
    ids, grads = ctx.saved_tensors[: len(grad_patches)], []
    for grad, positions, (shape, _) in zip(grad_patches, ids, ctx.layouts, strict=True):
        if grad is not None:
            flat = grad.new_zeros((*shape[:2], shape[2] * shape[3]))
            grad = flat.index_add(2, positions, grad.mT).view(shape)
        grads.append(grad)
    return grads


@_common.first_derivative_only
def _sampled_gradients(
    ctx, saved: tuple[Tensor, ...], *grad_patches: Tensor
) -> list[Tensor | None]:
    """The gradients of the maps where only patches have one."""
    return _dense_gradients(ctx, saved, grad_patches, range(len(grad_patches)))


@_common.first_derivative_only
def _tapped_gradients(
    ctx, saved: tuple[Tensor, ...], *gradients: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the maps; those that arrive for maps are the caller's own, and changed."""
    count = len(ctx.layouts)
    grads, grad_patches = list(gradients[:count]), gradients[count:]
    sampled = [layer for layer in range(count) if grad_patches[layer] is not None]
    alone = [layer for layer in sampled if grads[layer] is None]
    joined = [layer for layer in sampled if grads[layer] is not None]
    for layer in joined:
        if not grads[layer].untyped_storage().resizable():  # of another library, such as NumPy
            grads[layer] = grads[layer].clone()
    if alone:
        dense = _dense_gradients(ctx, saved, [grad_patches[layer] for layer in alone], alone)
        for layer, grad in zip(alone, dense, strict=True):
            grads[layer] = grad
    if joined:
        into = [grads[layer] for layer in joined]
        arriving = [grad_patches[layer] for layer in joined]
        patches, norms, ids = _parts(ctx, saved, joined)
        ctx.kernels.sample_patches_add_(into, arriving, patches, norms, ids, ctx.normalize)
    return grads


def _parts(
    ctx, saved: tuple[Tensor, ...], layers: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Patches, inverse norms and positions of ``layers``; the first two are empty unless patches are normalised."""
    count = len(ctx.layouts)
    ids, patches, norms = saved[:count], saved[count : 2 * count], saved[2 * count :]
    return tuple([x[layer] for layer in layers] if x else [] for x in (patches, norms, ids))


def _dense_gradients(
    ctx, saved: tuple[Tensor, ...], grad_patches: Sequence[Tensor], layers: Sequence[int]
) -> list[Tensor]:
    """The gradients of the maps ``layers`` from those of their patches."""
    maps = []
    for grad, layer in zip(grad_patches, layers, strict=True):
        shape, memory_format = ctx.layouts[layer]
        maps.append(
            torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        )
    patches, norms, ids = _parts(ctx, saved, layers)
    return ctx.kernels.sample_patches_backward(
        list(grad_patches), patches, norms, ids, maps, ctx.normalize
    )


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _form(maps: Sequence[Tensor]) -> Form:
    planes = _memory_format(maps[0]) == torch.contiguous_format
    return Form("planes" if planes else "channels last", sum(x.numel() for x in maps), 0)


def draw_patch_ids(
    num_positions: int,
    num_patches: int,
    *,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Distinct positions with the distribution of a random permutation's head: (min(num_patches, num_positions),) int64."""
    few = device.type == "cpu" and not torch.compiler.is_compiling()
    if few and num_patches * _CHEAP_SHARE <= num_positions:
        return _draw_distinct(num_positions, num_patches, generator)
    return torch.randperm(num_positions, device=device, generator=generator)[:num_patches]


def _draw_distinct(num_positions: int, count: int, generator: torch.Generator | None) -> Tensor:
    """The first ``count`` distinct numbers of a sequence of independent uniform ones."""
    found: dict[int, None] = {}
    while len(found) < count:
        # A few more than needed, for at most one in _CHEAP_SHARE is expected to repeat another.
        draws = torch.randint(
            num_positions, (count + count // 8,), generator=generator, device="cpu"
        )
        found.update(dict.fromkeys(draws.tolist()))
    # torch.tensor of a list takes six times as long; the copy makes the memory PyTorch's own.
    return torch.frombuffer(array("q", list(found)[:count]), dtype=torch.int64).clone()


def plain(features: Tensor, patch_ids: Tensor, normalize: bool) -> Tensor:
    """``patches[b, s, :] = features[b, :, id_s]``, L2-normalised over the channels if asked.

    Args:
        features: (B, C, H, W).
        patch_ids: (S,) int64, row-major positions ``h * W + w``.
        normalize: divide each patch by its L2 norm.

    Returns:
        (B, S, C), in the dtype of the features.
    """
    # The gradient of features.permute(0, 2, 3, 1).flatten(1, 2)[:, patch_ids] has the strides of channels_last, for which the
    # backward of instance norm is wrong by its own size at B = 1 on a CPU (torch 2.13). This one's is contiguous.
    patches = features.flatten(2)[:, :, patch_ids].mT.contiguous()  # (B, S, C)
    if normalize:
        dtype = accumulation_dtype(patches.dtype)
        patches = normalize_rows(patches.to(dtype)).to(features.dtype)
    return patches


def _samples(make: Make) -> Iterator[Sample]:
    def ids(count: int, size: int) -> Tensor:
        return torch.randperm(size, generator=make.generator)[:count].to(make(1).device)

    one = {"features": make(2, 12, 9, 7), "patch_ids": ids(16, 63)}
    yield Sample("one", one)
    yield Sample("one_normalized", {**one, "normalize": True})
    repeated = {**one, "patch_ids": torch.tensor([5, 5, 0, 62, 5]).to(make(1).device)}
    yield Sample("repeated", repeated)
    yield Sample("repeated_normalized", {**repeated, "normalize": True})
    several = {
        "features": [make(2, 3, 16, 16), make(2, 40, 8, 5), make(2, 9, 1, 1)],
        "patch_ids": [ids(50, 256), ids(40, 40), ids(1, 1)],
    }
    yield Sample("several", several)
    yield Sample("several_normalized", {**several, "normalize": True})


def _patches(
    features: list[Tensor], patch_ids: list[Tensor], normalize: bool
) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(zip(features, patch_ids, strict=True))
    patches = [x.new_empty((x.shape[0], ids.shape[0], x.shape[1])) for x, ids in pairs]
    norms = [
        x.new_empty((x.shape[0], ids.shape[0]), dtype=accumulation_dtype(x.dtype))
        for x, ids in pairs
    ]
    return patches, norms if normalize else []


def _gradients(feature_likes: list[Tensor], **_: object) -> list[Tensor]:
    return [torch.empty_like(x) for x in feature_likes]


def _nothing(**_: object) -> None:
    return None


_SAMPLED = ("sample_patches_forward", "sample_patches_backward")
declare(
    Op(
        "sample_patches",
        runs=_SAMPLED,
        function=sample_patches,
        samples=_samples,
        is_loss=False,
        form=_form,
    ),
    # patch_ids[l] (S_l,) are positions in H * W, which may repeat. inverse_norms[l] (B, S_l) in acc, 0 for a zero row; none
    # without normalize.
    Operator(
        "sample_patches_forward(Tensor[] features, Tensor[] patch_ids, bool normalize) -> "
        "(Tensor[] patches, Tensor[] inverse_norms)",
        _patches,
    ),
    # Gradients shaped and laid out like feature_likes[l], of which only sizes and strides are read; patches and inverse_norms may
    # be empty lists unless normalize. Zero where nothing was sampled, summed where a position was sampled more than once.
    Operator(
        "sample_patches_backward(Tensor[] grad_patches, Tensor[] patches, Tensor[] inverse_norms, Tensor[] patch_ids, "
        "Tensor[] feature_likes, bool normalize) -> Tensor[]",
        _gradients,
    ),
    # Adds those gradients to maps (B, C, H, W), without overlaps in memory, in place.
    Operator(
        "sample_patches_add_(Tensor(a!)[] maps, Tensor[] grad_patches, Tensor[] patches, Tensor[] inverse_norms, "
        "Tensor[] patch_ids, bool normalize) -> ()",
        _nothing,
    ),
    sample_patches=plain,
    draw_patch_ids=draw_patch_ids,
)
declare(
    Op(
        "tap_patches",
        runs=(*_SAMPLED, "sample_patches_add_"),
        function=tap_patches,
        is_loss=False,
        form=_form,
    )
)
