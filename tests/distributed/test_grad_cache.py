"""Two passes in chunks against one pass."""

import collections
import dataclasses
import random
import types

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnce
from fastnce import GradCache

IN, OUT = 7, 5


def encoder(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, 9), nn.Dropout(dropout), nn.GELU(), nn.Linear(9, OUT))


def batch(count: int = 13, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(seed))


def taken(*modules: nn.Module) -> list[torch.Tensor]:
    """The gradients, which the modules then do not have any more."""
    grads = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    for module in modules:
        module.zero_grad()
    return grads


def assert_same(found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """To rounding in single precision."""
    for x, true in zip(found, truth, strict=True):
        assert (x - true).norm() <= 2e-6 * true.norm()


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
def test_two_encoders_equal_one_pass(chunk_size):
    image, text = encoder(0), encoder(1)
    scale = nn.Parameter(torch.tensor(0.2))
    x, y = batch(seed=0), batch(seed=1)
    expected = fastnce.info_nce(image(x), text(y), temperature=scale, symmetric=True)
    expected.backward()
    truth = [*taken(image, text), scale.grad]
    scale.grad = None
    cache = GradCache(image, text, loss=fastnce.info_nce, chunk_size=chunk_size)
    loss = cache.backward(x, y, temperature=scale, symmetric=True)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    assert_same([*taken(image, text), scale.grad], truth)


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
    truth = taken(net)
    torch.manual_seed(3)
    loss = GradCache(net, net, loss=fastnce.nt_xent, chunk_size=4).backward(x, y)
    torch.testing.assert_close(loss, expected.detach())
    assert_same(taken(net), truth)
    assert torch.equal(torch.rand(3), following)


def test_autocast_and_a_scaler():
    """The weights that autocast has converted in the first pass must not cut the second off from its gradients."""
    net, x, y = encoder(), batch(seed=0), batch(seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fastnce.nt_xent(net(x), net(y)).backward()
    truth = taken(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        GradCache(net, net, loss=fastnce.nt_xent, chunk_size=4, scaler=scaler).backward(x, y)
    for found, true in zip(taken(net), truth, strict=True):
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

    net = encoder()
    net.register_forward_hook(lambda module, inputs, output: Counting.apply(output))
    GradCache(net, net, loss=fastnce.nt_xent, chunk_size=4).backward(batch(), batch(seed=1))
    # In the first pass Linear's outputs need no gradient at all.
    assert (alive[0], most[0]) == (0, 4)


class OtherDevice:
    """The random numbers of a device that is not there, by the names that torch.cuda and torch.mps have for them."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def is_initialized(self) -> bool:
        return True

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        assert device.index == 0
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.generator.set_state(state)


class DropoutThere(nn.Module):
    """Takes CPU inputs, and draws its dropout on the device where one of its buffers is."""

    def __init__(self, generator: torch.Generator, device: str) -> None:
        super().__init__()
        self.net, self.generator = encoder(), generator
        with FakeTensorMode():
            self.register_buffer("there", torch.empty(2, device=device))

    def forward(self, x):
        keep = torch.rand(x.shape, generator=self.generator) < 0.5
        return self.net(x * keep)


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
@pytest.mark.parametrize("encoder_is", ["a module", "a method", "a function"])
def test_the_random_state_is_that_of_the_encoders_device(encoder_is, device, monkeypatch):
    """Whatever the input's: the model moves it. Of a function, it is that of the current accelerator."""
    other = OtherDevice()
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: other)
    current = torch.device(device) if encoder_is == "a function" else None
    accelerator = types.SimpleNamespace(
        current_accelerator=lambda check_available=False: current, current_device_index=lambda: 0
    )
    monkeypatch.setattr(torch, "accelerator", accelerator)
    model = DropoutThere(other.generator, f"{device}:0")
    net = {"a module": model, "a method": model.forward, "a function": lambda x: model(x)}
    x, y = batch(seed=0), batch(seed=1)
    views = [torch.cat([model(part) for part in view.split(4)]) for view in (x, y)]
    fastnce.nt_xent(*views).backward()
    following = torch.rand(3, generator=other.generator)
    truth = taken(model)
    other.generator.manual_seed(0)
    cache = GradCache(net[encoder_is], net[encoder_is], loss=fastnce.nt_xent, chunk_size=4)
    cache.backward(x, y)
    assert_same(taken(model), truth)
    assert torch.equal(torch.rand(3, generator=other.generator), following)


class Encoding(collections.UserDict):
    """As transformers' BatchEncoding: a mapping with attributes, of its own and of the tensors' names."""

    def __init__(self, data, origin: str = "") -> None:
        super().__init__(data)
        self.origin = origin

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class OfEncoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = encoder()

    def forward(self, inputs):
        assert inputs.origin == "a tokenizer"
        nested = inputs["nested"][0]
        return self.net(inputs.x) * nested["weight"][:, None] + inputs["shift"] * inputs["scale"]


def test_inputs_may_be_mappings_with_numbers():
    """In tensors or not; dicts are inputs in test_training."""
    net, nested = OfEncoding(), [types.MappingProxyType({"weight": torch.rand(13)})]
    numbers = {"shift": torch.tensor(0.5), "scale": 0.7}
    inputs = Encoding({"x": batch(), "nested": nested, **numbers}, "a tokenizer")
    fastnce.info_nce(net(inputs), batch(seed=2)[:, :OUT]).backward()
    truth = taken(net)
    before = dict(inputs)
    cache = GradCache(net, lambda x: x[:, :OUT], loss=fastnce.info_nce, chunk_size=5)
    cache.backward(inputs, batch(seed=2))
    assert_same(taken(net), truth)
    assert all(inputs[name] is x for name, x in before.items()), "what was passed is as it was"


@dataclasses.dataclass
class Found:
    pooled: torch.Tensor
    hidden: torch.Tensor


class Text(nn.Module):
    """The mean over a text's tokens; takes keywords, returns more than the representations, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.net = nn.Embedding(20, 6), nn.Linear(6, OUT)
        self.shapes = []

    def forward(self, input_ids, attention_mask, length=None):
        self.shapes.append(tuple(input_ids.shape))
        mask = attention_mask[..., None].to(self.net.weight)
        hidden = self.embedding(input_ids) * mask
        return Found(pooled=self.net(hidden.sum(1) / mask.sum(1)).tanh(), hidden=hidden)


def texts(count: int = 13, longest: int = 9) -> Encoding:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(20, (count, longest), generator=generator)
    return Encoding({"input_ids": ids, "attention_mask": mask})


def assert_one_pass_of_texts(text: Text, **options) -> None:
    """The gradients of images and ``text``, in double precision."""
    image, text = encoder().double(), text.double()
    x, y, scale = batch().double(), texts(), nn.Parameter(torch.tensor(5.0).double())
    expected = fastnce.info_nce(image(x), text(**y).pooled, temperature=1 / scale, backend="torch")
    expected.backward()
    truth = [*taken(image, text), scale.grad]
    scale.grad = None
    text.shapes.clear()
    cache = GradCache(
        lambda x: (x, image(x)),
        text,
        loss=fastnce.info_nce,
        keywords=True,
        output=(lambda found: found[1], lambda found: found.pooled),
        **options,
    )
    loss = cache.backward(x, y, temperature=1 / scale, backend="torch")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    for found, true in zip([*taken(image, text), scale.grad], truth, strict=True):
        assert (found - true).norm() <= 1e-12 * true.norm()


def test_keywords_other_outputs_and_a_chunk_size_each():
    text = Text()
    assert_one_pass_of_texts(text, chunk_size=[6, 4])
    assert text.shapes == [(4, 9), (4, 9), (4, 9), (1, 9)] * 2


@pytest.mark.parametrize("chunk_size", [(6, None), 3])
def test_chunks_by_tokens(chunk_size):
    """Of similar lengths, without the padding that none of them needs."""
    text = Text()
    assert_one_pass_of_texts(text, chunk_size=chunk_size, tokens=[None, 16])
    most = 13 if chunk_size != 3 else 3
    assert all(rows * width <= 16 and rows <= most for rows, width in text.shapes)
    lengths = texts()["attention_mask"].sum(1).sort().values
    chunks = lengths.split([rows for rows, _ in text.shapes[: len(text.shapes) // 2]])
    assert text.shapes == [(len(x), int(x.max())) for x in chunks] * 2


def test_tokens_of_a_given_length():
    """Nothing tells where the padding is then."""
    seen = []

    def encode(inputs):
        seen.append(inputs["length"].tolist())
        return net(inputs["x"])

    net, x = encoder(), batch(5)
    fastnce.nt_xent(net(x), net(x + 1)).backward()
    truth = taken(net)
    inputs = [{"x": part, "length": torch.tensor([4, 1, 9, 2, 2])} for part in (x, x + 1)]
    GradCache(encode, encode, loss=fastnce.nt_xent, tokens=6).backward(*inputs)
    assert seen == [[1, 2, 2], [4], [9]] * 4
    assert_same(taken(net), truth)


def test_python_random_numbers_where_asked():
    net = encoder()

    def encode(x):
        return net(x * (random.random() + numpy.random.rand()))

    def seeded():
        random.seed(0)
        numpy.random.seed(0)

    x, y = batch(seed=0), batch(seed=1)
    seeded()
    fastnce.nt_xent(*[torch.cat([encode(part) for part in v.split(4)]) for v in (x, y)]).backward()
    following, truth = (random.random(), numpy.random.rand()), taken(net)
    seeded()
    options = {"loss": fastnce.nt_xent, "chunk_size": 4, "python_random": True}
    GradCache(encode, encode, **options).backward(x, y)
    assert_same(taken(net), truth)
    assert (random.random(), numpy.random.rand()) == following


class Frozen(nn.Module):
    """A frozen tower in a module that has a trained part too."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.idle = tower, nn.Linear(2, 2)

    def forward(self, x):
        return self.tower(x)


@pytest.mark.parametrize("kind", ["module", "function", "method", "frozen inside", "tower"])
def test_frozen_encoders(kind):
    net, frozen = encoder(), encoder(1).requires_grad_(False)
    model = types.SimpleNamespace(net=frozen)
    other = {
        "module": frozen,
        "function": lambda x: frozen(x),
        "method": frozen.forward,
        "frozen inside": lambda x: model.net(x).detach(),
        "tower": Frozen(frozen),
    }[kind]
    x, y = batch(), batch(seed=2)
    fastnce.info_nce(net(x), frozen(y)).backward()
    truth, calls = taken(net), []
    frozen[0].register_forward_hook(lambda *_: calls.append(1))
    GradCache(net, other, loss=fastnce.info_nce, chunk_size=5).backward(x, y)
    assert len(calls) == 3, "three chunks, one pass"
    assert_same(taken(net), truth)


def test_an_input_that_the_loss_does_not_use():
    net, idle = encoder(), encoder(1)
    x, y = batch(), batch(seed=2)
    fastnce.nt_xent(net(x), net(y)).backward()
    truth = taken(net)
    calls = []
    idle.register_forward_hook(lambda *_: calls.append(1))
    cache = GradCache(net, idle, net, loss=lambda a, b, c: fastnce.nt_xent(a, c), chunk_size=5)
    cache.backward(x, x, y)
    assert len(calls) == 3 and not taken(idle)
    assert_same(taken(net), truth)


def once(net, inputs, loss=fastnce.nt_xent):
    return GradCache(net, net, loss=loss, chunk_size=4).backward(inputs, inputs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradCache(loss=fastnce.nt_xent, chunk_size=4), "encoders"),
        (lambda: GradCache(encoder(), loss=fastnce.nt_xent, chunk_size=0), "chunk_size .*1"),
        (lambda: GradCache(encoder(), loss=fastnce.nt_xent), "neither chunk_size nor tokens"),
        (lambda: GradCache(encoder(), loss=fastnce.nt_xent, tokens=2.5), "tokens must be an int, got float"),
        (lambda: GradCache(encoder(), loss=fastnce.nt_xent, chunk_size=[1, 2]), "chunk_size .* 1 encoders, got 2"),
        (lambda: GradCache(encoder(), loss=fastnce.nt_xent, chunk_size=1, wrapper=encoder()), "wrapper .*got Sequential"),
        (lambda: GradCache(encoder(), loss=sum, tokens=4).backward(batch()), "input 0 .*attention_mask.* got Tensor"),
        (lambda: GradCache(encoder(), encoder(), loss=fastnce.nt_xent, chunk_size=4).backward(batch()), "2 inputs.* got 1"),
        (lambda: GradCache(encoder(), loss=sum, chunk_size=4).backward([batch(3), batch(4)]), r"got lengths \[3, 4\]"),
        (lambda: once(encoder(), ["a text"]), "got list without any"),
        (lambda: once(encoder(), {"x": torch.tensor(1.0)}), "got dict without any"),
        (lambda: once(lambda x: (x, x), batch()), r"encoder 0 .*\(4, D\), got tuple"),
        (lambda: once(lambda x: x.mean(0), batch()), r"encoder 0 .*\(4, D\), got \(7,\)"),
        (lambda: once(encoder(), batch(), loss=lambda a, b: (a - b).square()), r"loss.* got .*\(13, 5\)"),
        (lambda: once(encoder(), batch(), loss=lambda a, b: 0.5), "loss.* got float"),
        (lambda: once(encoder().requires_grad_(False), batch()), "nothing that is trained"),
        (lambda: once(lambda x: x, batch()), "nothing that is trained"),
        (lambda: once(encoder(), batch(), loss=lambda a, b: a.detach().sum()), "nothing that is trained"),
    ],
)  # fmt: skip
def test_errors(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()
