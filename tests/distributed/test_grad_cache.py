"""Two passes in chunks against one pass."""

import pytest
import torch
from torch import nn

import fastnce
from fastnce import GradCache

IN, OUT = 7, 5


def encoder(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, 9), nn.Dropout(dropout), nn.GELU(), nn.Linear(9, OUT))


def batch(count: int = 13, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(seed))


def gradients(*modules: nn.Module) -> list[torch.Tensor]:
    return [p.grad for module in modules for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
def test_two_encoders_equal_one_pass(chunk_size):
    image, text = encoder(0), encoder(1)
    scale = nn.Parameter(torch.tensor(0.2))
    x, y = batch(seed=0), batch(seed=1)
    expected = fastnce.info_nce(image(x), text(y), temperature=scale, symmetric=True)
    expected.backward()
    truth = [*gradients(image, text), scale.grad]
    image.zero_grad(), text.zero_grad()
    scale.grad = None
    cache = GradCache(image, text, loss=fastnce.info_nce, chunk_size=chunk_size)
    loss = cache.backward(x, y, temperature=scale, symmetric=True)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    for found, true in zip([*gradients(image, text), scale.grad], truth, strict=True):
        assert (found - true).norm() <= 2e-6 * true.norm()


def test_one_encoder_twice_with_dropout():
    """The second pass must draw what the first drew; and the random state goes on from the first."""
    net = encoder(dropout=0.5)
    x, y = batch(seed=0), batch(seed=1)
    torch.manual_seed(3)
    # One pass over the same chunks draws the same masks.
    views = [torch.cat([net(part) for part in view.split(4)]) for view in (x, y)]
    expected = fastnce.nt_xent(*views)
    expected.backward()
    following = torch.rand(3)
    truth = gradients(net)
    net.zero_grad()
    torch.manual_seed(3)
    loss = GradCache(net, net, loss=fastnce.nt_xent, chunk_size=4).backward(x, y)
    torch.testing.assert_close(loss, expected.detach())
    for found, true in zip(gradients(net), truth, strict=True):
        assert (found - true).norm() <= 2e-6 * true.norm()
    assert torch.equal(torch.rand(3), following)


class OfDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = encoder()

    def forward(self, inputs: dict) -> torch.Tensor:
        return self.net(inputs["x"]) * inputs["weight"][:, None] + inputs["shift"]


def test_inputs_may_be_dicts_and_an_encoder_frozen():
    net, frozen = OfDict(), encoder(1).requires_grad_(False)
    inputs = {"x": batch(), "weight": torch.rand(13), "shift": 0.5}
    fastnce.info_nce(net(inputs), frozen(batch(seed=2))).backward()
    truth = gradients(net)
    net.zero_grad()
    calls = []
    frozen.register_forward_hook(lambda *_: calls.append(1))
    GradCache(net, frozen, loss=fastnce.info_nce, chunk_size=5).backward(inputs, batch(seed=2))
    assert len(calls) == 3, "three chunks, one pass"
    for found, true in zip(gradients(net), truth, strict=True):
        assert (found - true).norm() <= 2e-6 * true.norm()


def test_autocast_and_a_scaler():
    """The weights that autocast has converted in the first pass must not cut the second off from its gradients."""
    net, x, y = encoder(), batch(seed=0), batch(seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fastnce.nt_xent(net(x), net(y)).backward()
    truth = gradients(net)
    net.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        GradCache(net, net, loss=fastnce.nt_xent, chunk_size=4, scaler=scaler).backward(x, y)
    for found, true in zip(gradients(net), truth, strict=True):
        assert (found / 8 - true).norm() < 0.02 * true.norm()


def test_activations_are_those_of_one_chunk():
    alive, most = [0], [0]

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.rows = len(x)
            if x.requires_grad:
                alive[0] += len(x)
                most[0] = max(most[0], alive[0])
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive[0] -= ctx.rows
            return grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = encoder()

        def forward(self, x):
            return Counting.apply(self.net(x))

    net = Net()
    GradCache(net, net, loss=fastnce.nt_xent, chunk_size=4).backward(batch(), batch(seed=1))
    # In the first pass Linear's outputs need no gradient at all.
    assert (alive[0], most[0]) == (0, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradCache(loss=fastnce.nt_xent, chunk_size=4), "encoders are missing"),
        (lambda: GradCache(encoder(), loss=fastnce.nt_xent, chunk_size=0), "chunk_size must be at least 1"),
        (
            lambda: GradCache(encoder(), encoder(), loss=fastnce.nt_xent, chunk_size=4).backward(batch()),
            "expected 2 inputs, one per encoder, got 1",
        ),
        (
            lambda: GradCache(encoder(), loss=sum, chunk_size=4).backward([batch(3), batch(4)]),
            "tensors of one length, got lengths [3, 4]",
        ),
    ],
)  # fmt: skip
def test_errors(build, message):
    with pytest.raises(ValueError) as raised:
        build()
    assert message in str(raised.value)
