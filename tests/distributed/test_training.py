"""Under DDP and FSDP the parameters get the gradients of one process with the whole batch."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastnce
from fastnce import GradCache, distributed

COUNTS = (3, 5, 2, 2)
CLASSES = 3


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
        return (
            self.image(x),
            self.text(y),
            self.proxies(labels),
            self.log_temperature.exp(),
        )


def losses(ops, outputs, labels, **options):
    """All four losses at once; their sum is differentiated."""
    image, text, proxies, tau = outputs
    options |= {"temperature": tau}
    return (
        ops.info_nce(image, text, symmetric=True, **options)
        + ops.nt_xent(image, text, **options)
        + ops.sup_con(image, labels, **options)
        + ops.conditional_contrastive(image, proxies, labels, **options)
    )


def data():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, sum(COUNTS), 6, generator=generator)
    return x, y, torch.randint(CLASSES, (sum(COUNTS),), generator=generator)


def whole():
    """Loss and gradients of one process with the rows of all ranks."""
    model, (x, y, labels) = Model(), data()
    loss = losses(fastnce, model(x, y, labels), labels)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def own_rows(group):
    rank = dist.get_rank(group)
    return [x.split(COUNTS)[rank] for x in data()]


def one_step(group, wrapper, strategy):
    """This rank's loss, and all gradients after the wrapper has averaged them."""
    model = Model()
    if wrapper == "ddp":
        model = DistributedDataParallel(model, process_group=group)
    else:
        fully_shard(model, mesh=DeviceMesh("cpu", list(range(dist.get_world_size()))))
    x, y, labels = own_rows(group)
    loss = losses(distributed, model(x, y, labels), labels, strategy=strategy, group=group)
    loss.backward()
    grads = [p.grad.full_tensor() if wrapper == "fsdp" else p.grad for p in model.parameters()]
    return loss.detach(), grads


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_of_the_whole_batch(wrapper, strategy, workers):
    loss, truth = whole()
    for found_loss, found in workers.results(one_step, wrapper, strategy):
        torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
        for grad, true in zip(found, truth, strict=True):
            assert (grad - true).norm() <= 2e-6 * true.norm()


def own_losses(group, wrapper, op, counts, scale):
    """All gradients after the wrapper has averaged them, of this rank's part of the mean over all rows."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    model = Model()
    if wrapper == "ddp":
        model = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    else:
        fully_shard(model, mesh=DeviceMesh("cpu", list(range(size))))
    rows = sum(counts)
    x, y, labels = (part[:rows].split(counts)[rank] for part in data())
    options = {"reduction": "none", "group": group, "gradient_scale": scale}
    found = by_name(distributed, op, model(x, y, labels), labels, **options)
    if len(set(counts)) == 1:
        loss = found.mean()
    else:
        views = len(found) // len(x)  # of nt_xent two
        loss = found.sum() * size / (views * rows)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    return [
        grad.full_tensor() if wrapper == "fsdp" and grad is not None else grad for grad in grads
    ]


def by_name(ops, op, outputs, labels, **options):
    image, text, proxies, tau = outputs
    rows = {
        "info_nce": (image, text),
        "nt_xent": (image, text),
        "sup_con": (image, labels),
        "conditional_contrastive": (image, proxies, labels),
    }[op]
    return getattr(ops, op)(*rows, temperature=tau, **options)


@pytest.mark.parametrize(
    ("wrapper", "counts", "scale"),
    [
        ("ddp", (4, 4, 4), "mean"),
        ("ddp", (6, 6), "sum"),
        ("ddp", (3, 7, 2), "mean"),
        ("fsdp", (3, 3, 3, 3), "mean"),
    ],
)
@pytest.mark.parametrize("op", ["info_nce", "nt_xent", "sup_con", "conditional_contrastive"])
def test_the_mean_of_own_losses(op, wrapper, counts, scale, workers):
    """What the wrapper averages is the gradient of one process's mean, with nothing that the user has to multiply."""
    model, (x, y, labels) = Model(), data()
    by_name(fastnce, op, model(x, y, labels), labels, reduction="none").mean().backward()
    answers = workers.results(own_losses, wrapper, op, counts, scale, ranks=len(counts))
    for grads in answers:
        for found, parameter in zip(grads, model.parameters(), strict=True):
            true = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found = torch.zeros_like(parameter) if found is None else found
            assert (found - true).norm() <= 2e-6 * true.norm()


def cached_step(group, wrapper):
    """Gradients from chunks, and how often the ranks exchanged them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    exchanges = []
    if wrapper == "ddp":
        net = DistributedDataParallel(net, process_group=group)

        def hook(state, bucket):
            exchanges.append(1)
            done = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
            return done.then(lambda future: future.value()[0] / dist.get_world_size(group))

        net.register_comm_hook(None, hook)
    else:
        fully_shard(net, mesh=DeviceMesh("cpu", list(range(dist.get_world_size()))))
    # Every forward of a wrapped encoder is a meeting of the ranks: the same number of chunks each.
    x, y = (x.chunk(len(COUNTS))[dist.get_rank(group)] for x in data()[:2])
    cache = GradCache(net, net, loss=distributed.nt_xent, chunk_size=2)
    cache.backward(x, y, group=group)
    grads = [p.grad.full_tensor() if wrapper == "fsdp" else p.grad for p in net.parameters()]
    return grads, len(exchanges)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_chunks_of_one_batch_over_ranks(wrapper, workers):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y, _ = data()
    fastnce.nt_xent(net(x), net(y)).backward()
    for grads, exchanges in workers.results(cached_step, wrapper):
        for found, parameter in zip(grads, net.parameters(), strict=True):
            assert (found - parameter.grad).norm() <= 2e-6 * parameter.grad.norm()
        assert wrapper == "fsdp" or exchanges == 1, "the gradients travel once, with the last chunk"


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


def towers_and_scale(group, wrapper, scale_inside, options):
    """Parameters and gradients after each of three steps; the scale is the last of them."""
    model = Towers(scale_inside)
    scale = model.log_scale if scale_inside else nn.Parameter(torch.tensor([math.log(5.0)]))
    parameters = [x for x in model.parameters() if x is not scale]
    net, share = model, slice(None)
    if group is not None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        share = slice(rank * 12 // size, (rank + 1) * 12 // size)
        if "ddp" in wrapper:
            net = DistributedDataParallel(model, process_group=group, **options)
        else:
            fully_shard(net, mesh=DeviceMesh("cpu", list(range(size))))
            parameters = [x for name, x in net.named_parameters() if name != "log_scale"]
            scale = net.log_scale if scale_inside else scale
    x, y, _ = data()

    def loss(image, text, **options):
        now = model.log_scale if scale_inside else scale  # fully_shard puts another in its place
        temperature = (-now).exp().squeeze()
        if group is None:
            return fastnce.info_nce(image, text, temperature=temperature)
        return distributed.info_nce(image, text, temperature=temperature, group=group)

    encoder = (lambda inputs: net(inputs)) if wrapper == "ddp in a function" else net
    cache = GradCache(encoder, encoder, loss=loss, chunk_size=2)
    found = []
    for step in range(3):
        for parameter in (*parameters, scale):
            parameter.grad = None
        cache.backward({"image": x[share] + step}, {"text": y[share]})
        grads = [whole_tensor(p.grad) for p in (*parameters, scale)]
        found += [whole_tensor(p).detach().clone() for p in (*parameters, scale)] + grads
        with torch.no_grad():
            for parameter in (*parameters, scale):
                parameter -= 0.1 * parameter.grad
    return found


def whole_tensor(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


@pytest.mark.parametrize(
    ("wrapper", "scale_inside", "options"),
    [
        ("ddp", True, {}),
        ("ddp", True, {"find_unused_parameters": True}),
        ("ddp", True, {"gradient_as_bucket_view": True}),
        ("ddp", False, {}),
        ("ddp in a function", False, {"find_unused_parameters": True}),
        ("fsdp", True, {}),
        ("fsdp", False, {}),
    ],
)
def test_towers_of_one_model_and_a_scale(wrapper, scale_inside, options, workers):
    """Over ranks as in one process, for as many steps as one likes."""
    truth = towers_and_scale(None, wrapper, scale_inside, {})
    ranks = 4 if wrapper == "fsdp" else 2
    answers = workers.results(towers_and_scale, wrapper, scale_inside, options, ranks=ranks)
    for answer in answers:
        for found, true in zip(answer, truth, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, answer, answers[0])), "the ranks stay alike"


def static_graph(group):
    net = DistributedDataParallel(nn.Linear(6, 4), process_group=group, static_graph=True)
    cache = GradCache(net, net, loss=distributed.nt_xent, chunk_size=2)
    cache.backward(*torch.randn(2, 4, 6), group=group)


def test_a_static_graph_is_an_error(workers):
    for answer in workers.run(static_graph, ranks=2):
        assert isinstance(answer, ValueError) and "static_graph" in str(answer)


def sharded_scale(group):
    model = Towers(with_scale=True)
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def loss(image, text):
        temperature = (-model.log_scale.full_tensor()).exp().squeeze()
        return distributed.info_nce(image, text, temperature=temperature)

    x, y, _ = data()
    GradCache(model, model, loss=loss, chunk_size=2).backward({"image": x}, {"text": y})


def test_a_scale_that_is_sharded_is_an_error(workers):
    for answer in workers.run(sharded_scale):
        assert isinstance(answer, ValueError) and "fully_shard has sharded" in str(answer)
