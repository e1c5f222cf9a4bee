"""Under DDP and FSDP the parameters get the gradients of one process with the whole batch."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import fastnce
from fastnce import GradCache, distributed

COUNTS = (3, 5, 2, 2)
CLASSES = 3
LOSSES = ("info_nce", "nt_xent", "sup_con", "conditional_contrastive")


class Model(nn.Module):
    """Two encoders, class proxies and a learnable temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.text = nn.Linear(6, 4)
        self.proxies = nn.Embedding(CLASSES, 4)
        # fully_shard knows no 0-d parameters.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(0.2)]))

    def forward(self, x, y, labels):
        temperature = self.log_temperature.exp()
        return self.image(x), self.text(y), self.proxies(labels), temperature


def wrapped(model: nn.Module, wrapper: str, group, **options) -> nn.Module:
    if "ddp" in wrapper:
        return DistributedDataParallel(model, process_group=group, **options)
    return fully_shard(model, mesh=DeviceMesh("cpu", list(range(dist.get_world_size(group)))))


def whole(x: Tensor) -> Tensor:
    """Of all ranks, a copy."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, sum(COUNTS), 6, generator=generator)
    return x, y, torch.randint(CLASSES, (sum(COUNTS),), generator=generator)


def loss_of(ops, op: str, outputs: tuple[Tensor, ...], labels: Tensor, **options) -> Tensor:
    image, text, proxies, tau = outputs
    rows = {"sup_con": (image, labels), "conditional_contrastive": (image, proxies, labels)}
    return getattr(ops, op)(*rows.get(op, (image, text)), temperature=tau, **options)


def assert_near(found: list[Tensor], truth: list[Tensor]) -> None:
    """To rounding in single precision."""
    for x, true in zip(found, truth, strict=True):
        assert (x - true).norm() <= 2e-6 * true.norm()


def one_step(group, wrapper: str, counts: tuple[int, ...], options: dict):
    """This rank's part of each loss's mean over all rows, and all gradients of their sum after the wrapper has averaged them."""
    rank, size, rows, model = dist.get_rank(group), len(counts), sum(counts), Model()
    x, y, labels = (part.split(counts)[rank] for part in data())
    net = wrapped(model, wrapper, group)  # DDP averages as long as it lives
    outputs = net(x, y, labels)
    losses = []
    for op in LOSSES:
        loss = loss_of(distributed, op, outputs, labels, group=group, **options)
        if options.get("reduction") == "none":  # of nt_xent both views
            views = len(loss) // len(x)
            even = len(set(counts)) == 1
            loss = loss.mean() if even else loss.sum() * size / (views * rows)
        losses.append(loss)
    sum(losses).backward()
    return torch.stack(losses).detach(), [whole(p.grad) for p in model.parameters()]


@pytest.mark.parametrize(
    ("wrapper", "counts", "options"),
    [
        ("ddp", COUNTS, {"strategy": "ring"}),
        ("ddp", COUNTS, {"strategy": "gather"}),
        ("fsdp", COUNTS, {"strategy": "ring"}),
        ("fsdp", COUNTS, {"strategy": "gather"}),
        ("ddp", (4, 4, 4), {"reduction": "none"}),
        ("ddp", (6, 6), {"reduction": "none", "gradient_scale": "sum"}),
        ("ddp", (3, 7, 2), {"reduction": "none"}),
        ("fsdp", (3, 3, 3, 3), {"reduction": "none"}),
    ],
)
def test_gradients_of_the_whole_batch(wrapper, counts, options, workers):
    """With nothing that the user has to multiply, also where each rank takes the mean of its own losses."""
    model, (x, y, labels) = Model(), data()
    outputs = model(x, y, labels)
    losses = torch.stack([loss_of(fastnce, op, outputs, labels) for op in LOSSES])
    losses.sum().backward()
    answers = workers.results(one_step, wrapper, counts, options, ranks=len(counts))
    mean = torch.stack([found for found, _ in answers]).mean(0)
    torch.testing.assert_close(mean, losses.detach(), rtol=1e-6, atol=1e-7)
    for _, grads in answers:
        assert_near(grads, [p.grad for p in model.parameters()])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def counted(net: DistributedDataParallel, group) -> list[int]:
    """One entry for each exchange of gradients from now on."""
    exchanges = []

    def hook(state, bucket):
        exchanges.append(1)
        done = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
        return done.then(lambda future: future.value()[0] / dist.get_world_size(group))

    net.register_comm_hook(None, hook)
    return exchanges


def cached_step(group, encoder_is: str):
    """Gradients from chunks, and how often the ranks exchanged them."""
    net = wrapped(network(), "ddp", group)
    exchanges = counted(net, group)
    encoder = {
        "a module": net,
        "a function": lambda x: net(x),
        "a module with it inside": nn.Sequential(net),
        "a method": net.module.forward,
    }[encoder_is]
    wrapper = net if encoder_is == "a method" else None
    x, y = (x.chunk(len(COUNTS))[dist.get_rank(group)] for x in data()[:2])
    options = {"loss": distributed.nt_xent, "chunk_size": 2, "wrapper": wrapper}
    GradCache(encoder, encoder, **options).backward(x, y, group=group)
    return [whole(p.grad) for p in net.parameters()], len(exchanges)


@pytest.mark.parametrize(
    "encoder_is", ["a module", "a function", "a module with it inside", "a method"]
)
def test_chunks_of_one_batch_over_ranks(encoder_is, workers):
    net, (x, y, _) = network(), data()
    fastnce.nt_xent(net(x), net(y)).backward()
    for grads, exchanges in workers.results(cached_step, encoder_is):
        assert_near(grads, [p.grad for p in net.parameters()])
        assert exchanges == 1, "the gradients travel once, with the last chunk"


class Towers(nn.Module):
    """Two towers and a scale in one model; the input says which tower."""

    def __init__(self, with_scale: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(6, 4)
        if with_scale:
            self.log_scale = nn.Parameter(torch.tensor([math.log(5.0)]))

    def forward(self, inputs):
        ((name, x),) = inputs.items()
        return getattr(self, name)(x)

    def encode(self, inputs):
        return self(inputs)


def towers_and_scale(group, wrapper: str, scale_inside: bool, options: dict) -> list[Tensor]:
    """Parameters and gradients after each of three steps; the scale is the last of them."""
    model = Towers(scale_inside)
    model.text.requires_grad_("text frozen" not in wrapper)
    own_scale = None if scale_inside else nn.Parameter(torch.tensor([math.log(5.0)]))
    net = model if group is None else wrapped(model, wrapper, group, **options)

    def scale() -> nn.Parameter:
        return model.log_scale if scale_inside else own_scale  # fully_shard puts another in place

    def loss(image: Tensor, text: Tensor) -> Tensor:
        options = {} if group is None else {"group": group}
        op = fastnce.info_nce if group is None else distributed.info_nce
        return op(image, text, temperature=(-scale()).exp().squeeze(), **options)

    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    x, y = (part[rank * 12 // size : (rank + 1) * 12 // size] for part in data()[:2])
    encoder = (lambda inputs: net(inputs)) if wrapper == "ddp in a function" else net
    chunks = {"loss": loss, "chunk_size": 2}
    if "methods" in wrapper:
        encoder = model.encode
        if group is not None and "ddp" in wrapper:
            chunks["wrapper"] = net
        elif group is not None:
            register_fsdp_forward_method(model, "encode")
            encoder = model.encode
    cache, found = GradCache(encoder, encoder, **chunks), []
    exchanges = counted(net, group) if group is not None and "ddp" in wrapper else [1, 1, 1]
    towers = [p for name, p in model.named_parameters() if name != "log_scale" and p.requires_grad]
    for step in range(3):
        parameters = [*towers, scale()]
        for parameter in parameters:
            parameter.grad = None
        cache.backward({"image": x + step}, {"text": y})
        found += [whole(p).detach().clone() for p in parameters]
        found += [whole(p.grad) for p in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.1 * parameter.grad
    assert len(exchanges) == 3, "the gradients travel once a step"
    return found


@pytest.mark.parametrize(
    ("wrapper", "scale_inside", "options"),
    [
        ("ddp", True, {}),
        ("ddp", True, {"find_unused_parameters": True}),
        ("ddp", True, {"gradient_as_bucket_view": True}),
        ("ddp", False, {}),
        ("ddp in a function", False, {"find_unused_parameters": True}),
        ("ddp in a function", True, {}),
        ("ddp, methods", True, {}),
        ("ddp, methods", False, {"find_unused_parameters": True}),
        ("ddp, text frozen", True, {}),
        ("ddp, text frozen", False, {"find_unused_parameters": True}),
        ("fsdp, methods", True, {}),
        ("fsdp, text frozen", True, {}),
        ("fsdp", True, {}),
        ("fsdp", False, {}),
    ],
)
def test_towers_of_one_model_and_a_scale(wrapper, scale_inside, options, workers):
    """Over ranks as in one process, for as many steps as one likes."""
    truth = towers_and_scale(None, wrapper, scale_inside, {})
    ranks = 4 if "fsdp" in wrapper else 2
    answers = workers.results(towers_and_scale, wrapper, scale_inside, options, ranks=ranks)
    for answer in answers:
        torch.testing.assert_close(answer, truth, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, answer, answers[0])), "the ranks stay alike"


class WithBuffer(nn.Module):
    """DDP sends its buffer to all ranks in forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.register_buffer("rows", torch.zeros(1))

    def forward(self, x, length):
        self.rows += len(x)
        return self.net(x)


def steps_by_tokens(group):
    """Gradients of the second step, and the chunks of the ranks."""
    net, rank = wrapped(WithBuffer(), "ddp", group), dist.get_rank(group)
    x, y = (x.chunk(2)[rank] for x in data()[:2])
    lengths = torch.tensor([[1, 2, 1, 2, 1, 2], [3, 9, 9, 3, 9, 3]][rank])
    options = {"loss": distributed.nt_xent, "tokens": 6, "keywords": True}
    cache, calls = GradCache(net, net, **options), []
    net.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        net.zero_grad()
        cache.backward(*({"x": view, "length": lengths} for view in (x, y)), group=group)
    return [whole(p.grad) for p in net.parameters()], len(calls)


def test_ranks_with_different_numbers_of_chunks(workers):
    net, (x, y, _) = network(), data()
    fastnce.nt_xent(net(x), net(y)).backward()
    answers = workers.results(steps_by_tokens, ranks=2)
    assert [calls for _, calls in answers] == [2 * 2 * 2 * 2, 2 * 2 * 2 * 5]
    for grads, _ in answers:
        assert_near(grads, [p.grad for p in net.parameters()])


def two_wrapped_towers(group):
    """Of one function, which names both and runs one: their gradients, and how often each exchanged them."""
    towers = {name: wrapped(network(), "ddp", group) for name in ("image", "text")}
    exchanges = [counted(net, group) for net in towers.values()]

    def encode(inputs):
        ((name, x),) = inputs.items()
        return image(x) if name == "image" else text(x)

    image, text = towers.values()
    x, y = (x.chunk(2)[dist.get_rank(group)] for x in data()[:2])
    cache = GradCache(encode, encode, loss=distributed.info_nce, chunk_size=4)
    cache.backward({"image": x}, {"text": y}, group=group)
    return [whole(p.grad) for net in towers.values() for p in net.parameters()], exchanges


def test_two_wrapped_towers_of_one_function(workers):
    image, text, (x, y, _) = network(), network(), data()
    fastnce.info_nce(image(x), text(y)).backward()
    truth = [p.grad for net in (image, text) for p in net.parameters()]
    for grads, exchanges in workers.results(two_wrapped_towers, ranks=2):
        assert_near(grads, truth)
        assert exchanges == [[1], [1]]


class Unseen:
    """Hides an encoder, and so that DDP wraps it."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x):
        return self.net(x)


def named_parameters_of_the_loss(group) -> list[Tensor]:
    """The gradients of a scale and of one that no rank uses."""
    scale, unused = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.ones(2))
    net, (x, y, _) = network(), data()
    if group is None:
        fastnce.nt_xent(net(x), net(y), temperature=scale).backward()
        return [scale.grad, torch.zeros(2)]
    x, y = (x.chunk(len(COUNTS))[dist.get_rank(group)] for x in (x, y))
    encoder = Unseen(wrapped(net, "ddp", group))
    options = {"loss": distributed.nt_xent, "chunk_size": 2, "loss_parameters": [scale, unused]}
    GradCache(encoder, encoder, **options).backward(x, y, temperature=scale)
    return [scale.grad, unused.grad]


def test_named_parameters_of_the_loss(workers):
    truth = named_parameters_of_the_loss(None)
    answers = workers.results(named_parameters_of_the_loss)
    for answer in answers:
        torch.testing.assert_close(answer, truth, rtol=1e-5, atol=1e-6)


def refused(group, case: str) -> None:
    x, y, _ = data()
    if case == "static_graph":
        net = wrapped(nn.Linear(6, 4), "ddp", group, static_graph=True)
        GradCache(net, net, loss=distributed.nt_xent, chunk_size=2).backward(x, y, group=group)
    model = Towers(with_scale=True)
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if case == "tokens":
        inputs = {"image": x, "length": torch.ones(len(x))}
        GradCache(model, loss=distributed.nt_xent, tokens=8).backward(inputs)

    def loss(image, text):
        temperature = (-model.log_scale.full_tensor()).exp().squeeze()
        return distributed.info_nce(image, text, temperature=temperature)

    GradCache(model, model, loss=loss, chunk_size=2).backward({"image": x}, {"text": y})


@pytest.mark.parametrize("case", ["static_graph", "fully_shard", "tokens"])
def test_what_wrappers_cannot_do_is_an_error(case, workers):
    for answer in workers.run(refused, case):
        assert isinstance(answer, ValueError) and case in str(answer)
