"""The contrastive part of translation systems: channels, positions, projectors, and queues that resume."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transcriptions import TINY, batches, draw_ids, make

import fastnce
from fastnce.networks import PatchProjector
from fastnce.systems.patch_contrast import (
    Comparison,
    PatchContrast,
    PatchContrastConfig,
    sample,
)
from fastnce.systems.translation import can_convert, convert_channels


def maps(*seeds: int) -> list[list[Tensor]]:
    """Feature maps of two layers, for each seed."""
    found = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        shapes = ((2, 5, 8, 8), (2, 7, 4, 4))
        found.append([torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes])
    return found


def test_luma_and_back():
    images = torch.tensor([1.0, 0.5, -1.0]).view(1, 3, 1, 1).requires_grad_()
    grey = convert_channels(images, 1)
    assert grey.item() == pytest.approx(0.299 + 0.587 * 0.5 - 0.114)
    grey.sum().backward()
    torch.testing.assert_close(images.grad.flatten(), torch.tensor([0.299, 0.587, 0.114]))
    assert convert_channels(grey, 3).flatten().tolist() == [grey.item()] * 3
    assert convert_channels(images, 3) is images
    torch.testing.assert_close(convert_channels(torch.ones(1, 3, 1, 1), 1), torch.ones(1, 1, 1, 1))


def test_channels_that_do_not_turn_into_each_other():
    assert [can_convert(*pair) for pair in ((1, 3), (3, 1), (4, 4), (4, 3), (1, 2))] == [
        True,
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(ValueError, match="images have 4 channels, expected 3"):
        convert_channels(torch.zeros(1, 4, 2, 2), 3)


def test_projectors_of_either_side_as_in_dclgan():
    """Two losses that share two projectors crosswise are the two losses one by one."""
    torch.manual_seed(0)
    config = PatchContrastConfig(num_patches=6, negatives="batch")
    f1, f2 = (PatchProjector([5, 7], 9).double() for _ in range(2))
    a, fake_b, b, fake_a = maps(0, 1, 2, 3)
    ids = {name: [torch.randperm(n)[:6] for n in (64, 16)] for name in ("NCE1", "NCE2")}
    losses = PatchContrast(config, ["NCE1", "NCE2"], [9, 9])(
        {"NCE1": Comparison(fake_b, a, f2, f1), "NCE2": Comparison(fake_a, b, f1, f2)}, ids
    )
    (losses["NCE1"] + losses["NCE2"]).backward()
    gradients = [parameter.grad.clone() for f in (f1, f2) for parameter in f.parameters()]

    for f in (f1, f2):
        f.zero_grad()
    for name, queries, keys, query_f, key_f in (
        ("NCE1", fake_b, a, f2, f1),
        ("NCE2", fake_a, b, f1, f2),
    ):
        rows = [
            f([x.flatten(2)[:, :, i].mT for x, i in zip(side, ids[name], strict=True)])
            for side, f in ((queries, query_f), (keys, key_f))
        ]
        loss = fastnce.patch_nce(rows[0], [x.detach() for x in rows[1]], negatives="batch")
        torch.testing.assert_close(losses[name], loss)
        loss.backward()
    for one, other in zip(
        gradients, (p.grad for f in (f1, f2) for p in f.parameters()), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("num_patches", [0, 6])
def test_sampled_gradients_are_contiguous(num_patches, backend):
    """With other strides the backward of instance norm, one image at a time, is wrong on a CPU: see the next test."""
    config = PatchContrastConfig(num_patches=num_patches, backend=backend)
    x = torch.randn(1, 5, 8, 8, requires_grad=True)
    (patches,), (ids,) = sample(config, [x])
    assert len(ids) == len(set(ids.tolist())) == (num_patches or 64)
    (gradient,) = torch.autograd.grad(patches, x, torch.randn_like(patches))
    assert gradient.is_contiguous()


@pytest.mark.parametrize("backend", ["torch", None])
def test_gradient_through_an_instance_norm_by_finite_differences(backend):
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8, 8, dtype=torch.float64, requires_grad=True)
    ids, weight = torch.randperm(64)[:20], torch.randn(1, 20, 5, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        normed = torch.nn.functional.instance_norm(x)
        return (fastnce.sample_patches(normed, patch_ids=ids, backend=backend)[0] * weight).sum()

    assert torch.autograd.gradcheck(value, x, fast_mode=True, rtol=1e-6, atol=1e-7)


def test_a_queue_resumes():
    """What is written to a checkpoint between two steps holds the keys of the last one."""
    config = replace(TINY, num_patches=6, negatives="image+queue", queue_size=40)
    model = make(config)
    first, second, third = batches(3)
    for batch in (first, second):
        model.training_step(batch, patch_ids=draw_ids(model, 0))
    resumed = make(config, seed=5)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    for name, optimizer in resumed.optimizers.items():
        optimizer.load_state_dict(copy.deepcopy(model.optimizers[name].state_dict()))
    ids = draw_ids(model, 1)
    assert model.training_step(third, patch_ids=ids) == resumed.training_step(third, patch_ids=ids)
    key = "contrast.queues.NCE_Y.4.queue"
    assert torch.equal(model.state_dict()[key], resumed.state_dict()[key])


def test_each_loss_and_layer_has_its_own_queue():
    model = make(replace(TINY, negatives="queue", queue_size=40))
    model.training_step(batches(1)[0], patch_ids=draw_ids(model, 0))
    state = model.state_dict()
    queues = [value for key, value in state.items() if key.endswith(".queue")]
    assert len(queues) == 2 * 5 and all(queue.shape == (8, 40) for queue in queues)
    assert all(int(value) == 24 for key, value in state.items() if key.endswith("queue_ptr"))
    for index, queue in enumerate(queues):
        assert not any(torch.equal(queue[:, :24], other[:, :24]) for other in queues[:index])
