"""The gradient of a penalty on slopes, such as R1, which takes the network's second derivatives."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call


def check_penalty(network: nn.Module, penalty: Callable[[Callable[..., Tensor]], Tensor]) -> None:
    """Of ``penalty(judge)`` by every parameter, against finite differences along random directions, in float64."""
    network.double()
    names, parameters = zip(*network.named_parameters(), strict=True)

    def of_parameters(*values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return penalty(lambda *inputs: functional_call(network, state, inputs))

    assert gradcheck(of_parameters, parameters, fast_mode=True, rtol=1e-5, atol=1e-7)
