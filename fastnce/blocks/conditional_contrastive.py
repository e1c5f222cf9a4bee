"""2C in blocks: two products where one block has all logits, else one more for their sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnce.blocks.labelled_lse import Logits, State
from fastnce.blocks.tiles import Rows


def conditional_contrastive_forward(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    *,
    grad_scale: float | None,
    mean: bool = False,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    call = _Call(embeddings, proxies, labels, temperature)
    sums = torch.stack(call.logits.sums())
    lse = torch.logaddexp(sums, call.to_proxy)  # (2, N)
    if grad_scale is None:
        return lse[0] - lse[1], lse, (None,) * 3
    weight = grad_scale / len(embeddings) if mean else grad_scale
    weights = torch.full_like(lse[0], weight)
    return lse[0] - lse[1], lse, call.gradients(lse, weights, needs)


def conditional_contrastive_backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    call = _Call(embeddings, proxies, labels, temperature)
    return call.gradients(lse, grad_loss.to(lse.dtype), needs)


class _Call:
    def __init__(
        self, embeddings: Tensor, proxies: Tensor, labels: Tensor, temperature: float | Tensor
    ) -> None:
        self.rows, self.proxies = Rows(embeddings, True), Rows(proxies, True)
        self.logits = Logits(self.rows, self.rows, labels, labels, temperature, own=True)
        self.to_proxy = (self.rows.units * self.proxies.units).sum(dim=1) / self.logits.tau

    def gradients(
        self, lse: Tensor, weights: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        need_embeddings, need_proxies, need_temperature = needs
        tau, units = self.logits.tau, self.rows.units
        shares = (self.to_proxy - lse).exp()
        of_proxy = weights * (shares[0] - shares[1])  # that of the logit
        to_proxy = (of_proxy / tau).unsqueeze(1)
        of_units = of_temperature = None
        if need_embeddings or need_temperature:
            state = State(lse[0], weights, lse[1], -weights)
            of_units, moment = self.logits.gradient(state, state, need_temperature)
        if need_temperature:
            moment = moment + (of_proxy * self.to_proxy).sum()
            of_temperature = (-moment / tau).to(units.dtype)
        return (
            self.rows.gradient(of_units.add_(self.proxies.units * to_proxy))
            if need_embeddings
            else None,
            self.proxies.gradient(units * to_proxy) if need_proxies else None,
            of_temperature,
        )
