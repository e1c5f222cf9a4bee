"""The layers of the class-conditional GANs against plain formulas, in fp64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnce.networks.conditional import (
    ConditionalBatchNorm,
    SelfAttention,
    conv2d,
    embedding,
    linear,
    upsample_conv2d,
)


@pytest.fixture(autouse=True)
def fp64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layer_and_input(kind):
    if kind == "conv":
        return conv2d(3, 8, 3, spectral=True), torch.randn(2, 3, 5, 5)
    if kind == "linear":
        return linear(6, 4, spectral=True), torch.randn(2, 6)
    return embedding(7, 5, spectral=True), torch.tensor([3, 6])


@pytest.mark.parametrize("kind", ["conv", "linear", "embedding"])
def test_spectral_norm_after_two_training_forwards(kind):
    layer, x = layer_and_input(kind)
    nn.init.normal_(layer.weight_orig)
    matrix = layer.weight_orig.detach().flatten(1)
    u, v = layer.weight_u.clone(), layer.weight_v.clone()
    for _ in range(2):
        layer(x)
        v = matrix.t() @ u
        v = v / v.norm()
        u = matrix @ v
        u = u / u.norm()
    torch.testing.assert_close(layer.weight_u, u)
    torch.testing.assert_close(layer.weight_v, v)
    expected = layer.weight_orig / torch.einsum("i,ij,j->", u, matrix, v)
    torch.testing.assert_close(layer.weight, expected)
    layer.eval()(x)
    assert torch.equal(layer.weight_u, u.to(layer.weight_u))
    assert {"weight_orig", "weight_u", "weight_v"} <= set(layer.state_dict())


def test_spectral_norm_finds_the_largest_singular_value():
    layer = linear(6, 4, spectral=True)
    nn.init.normal_(layer.weight_orig)
    for _ in range(100):
        layer(torch.zeros(1, 6))
    assert torch.linalg.matrix_norm(layer.weight, ord=2).item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["conv", "linear", "embedding"])
def test_a_fresh_layer_is_normalised_in_eval_mode(kind):
    """Orthogonal weights have singular values of 1; random u and v would say about 0."""
    layer, x = layer_and_input(kind)
    copy.deepcopy(layer)
    layer.eval()(x)
    torch.testing.assert_close(layer.weight, layer.weight_orig.data)


def test_initialisation():
    layers = [
        conv2d(2, 18, 3, spectral=False),
        conv2d(4, 18, 3, spectral=False),
        linear(6, 4, spectral=False),
        embedding(3, 5, spectral=False),
        upsample_conv2d(2, 3),
    ]
    for layer in layers:
        matrix = layer.weight.flatten(1)
        small = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
        torch.testing.assert_close(small, torch.eye(len(small)))
        assert getattr(layer, "bias", None) is None or not layer.bias.any()


@pytest.mark.parametrize("spectral", [False, True])
def test_conditional_batch_norm(spectral):
    norm = ConditionalBatchNorm(3, 4, spectral=spectral)
    x, condition = torch.randn(2, 3, 5, 4) * 0.01 + 2, torch.randn(2, 4)
    y = norm(x, condition)
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = x.var((0, 2, 3), keepdim=True, correction=0)
    gain = torch.einsum("nk,ck->nc", condition, norm.gain.weight)[:, :, None, None]
    bias = torch.einsum("nk,ck->nc", condition, norm.bias.weight)[:, :, None, None]
    # The variance is as small as the eps: another eps would show.
    torch.testing.assert_close(y, (x - mean) / (variance + 1e-4).sqrt() * (1 + gain) + bias)
    running = 0.9 + 0.1 * x.var((0, 2, 3))
    torch.testing.assert_close(norm.bn.running_var, running)
    torch.testing.assert_close(norm.bn.running_mean, 0.1 * mean.flatten())
    keys = {"weight_orig", "weight_u", "weight_v"} if spectral else {"weight"}
    assert set(norm.gain.state_dict()) == set(norm.bias.state_dict()) == keys


def test_self_attention():
    attention = SelfAttention(16, spectral=True)
    x = torch.randn(2, 16, 4, 6)
    torch.testing.assert_close(attention(x), x)  # sigma is 0
    nn.init.constant_(attention.sigma, 0.7)
    y = attention(x)
    conv = {name: child.weight[:, :, 0, 0] for name, child in attention.named_children()}
    theta, phi, g = (conv[f"conv1x1_{name}"] @ x.flatten(2) for name in ("theta", "phi", "g"))
    phi, g = (F.max_pool2d(t.unflatten(2, (4, 6)), 2).flatten(2) for t in (phi, g))
    assert theta.shape == phi[:, :, :1].expand(2, 2, 24).shape
    assert g.shape == (2, 8, 6)
    expected = torch.zeros(2, 8, 24)
    for n in range(2):
        for position in range(24):
            scores = torch.stack([theta[n, :, position] @ phi[n, :, j] for j in range(6)])
            weights = scores.exp() / scores.exp().sum()
            expected[n, :, position] = sum(weights[j] * g[n, :, j] for j in range(6))
    expected = (conv["conv1x1_attn"] @ expected).unflatten(2, (4, 6))
    torch.testing.assert_close(y, x + 0.7 * expected)


def test_self_attention_rejects_channels():
    with pytest.raises(ValueError, match=r"channels=12 must be a multiple of 8\. Choose"):
        SelfAttention(12, spectral=True)
