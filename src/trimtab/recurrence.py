"""A bidirectional GRU of few rows on a CPU, where torch's own spends its time between small operations.

    g = h W_h + b_h;  r, z = sigmoid(x_r + g_r), sigmoid(x_z + g_z);  n = tanh(x_n + r g_n);  h' = (1 - z) n + z h

The two directions are one batch. What backward needs of a step besides the gradient itself is made of all steps at
once, so that a step back is four operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def both_ways(gru: nn.GRU, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a bidirectional GRU of one layer, with `batch_first`, gives of (B, L, D) forwards and backwards, (B, L, H)
    each. On other devices than a CPU torch's own computes it."""
    if x.device.type != "cpu":
        forth, back = gru(x)[0].chunk(2, dim=-1)
        return forth, back

    def weights(name: str) -> Tensor:
        return torch.stack([getattr(gru, f"{name}_l0{end}") for end in ("", "_reverse")])

    with torch.autocast("cpu", enabled=False):
        steps = x.transpose(0, 1)  # (L, B, D)
        steps = torch.stack([steps, steps.flip(0)])  # (2, L, B, D)
        gates = steps.flatten(1, 2) @ weights("weight_ih").transpose(1, 2) + weights("bias_ih")[:, None]
        gates = gates.view(*steps.shape[:3], -1).transpose(0, 1)  # (L, 2, B, 3 H)
        states = _Steps.apply(gates, weights("weight_hh").transpose(1, 2).contiguous(), weights("bias_hh")[:, None])
    return states[:, 0].transpose(0, 1), states[:, 1].flip(0).transpose(0, 1)


class _Steps(torch.autograd.Function):
    """Gates of the inputs (L, S, B, 3 H), the state's weights (S, H, 3 H) and biases (S, 1, 3 H) -> (L, S, B, H)."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        width = weight.shape[1]
        first = gates.new_zeros(*gates.shape[1:3], width)
        states, own, opened, new = [first], [], [], []
        two = [2 * width, width]  # cut with few operations: each of them costs as much as a step's arithmetic
        for x_rz, x_n in zip(*(x.unbind() for x in gates.split(two, dim=-1)), strict=True):
            g_rz, g_n = torch.baddbmm(bias, states[-1], weight).split(two, dim=-1)
            rz = (x_rz + g_rz).sigmoid_()
            r, z = rz.chunk(2, dim=-1)
            n = torch.addcmul(x_n, r, g_n).tanh_()
            states.append(torch.lerp(n, states[-1], z))
            own.append(g_n)
            opened.append(rz)
            new.append(n)
        every = torch.stack(states)
        ctx.save_for_backward(every, torch.stack(own), torch.stack(opened), torch.stack(new), weight)
        return every[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, own, opened, new, weight = ctx.saved_tensors
        r, z = opened.chunk(2, dim=-1)
        slope = (1 - z) * (1 - new**2)  # of h' by what is in the tanh
        # Of h' by each gate of the state, (L, S, B, 3, H).
        slopes = torch.stack([slope * own * r * (1 - r), (states[:-1] - new) * z * (1 - z), slope * r], dim=3)
        back, carry, found = weight.transpose(1, 2), torch.zeros_like(states[0]), []
        for own_grad, own_slopes, own_z in zip(*(t.unbind()[::-1] for t in (grad, slopes, z)), strict=True):
            d_state = own_grad + carry
            d_gates = (d_state[:, :, None] * own_slopes).flatten(2)  # (S, B, 3 H)
            carry = torch.baddbmm(d_state * own_z, d_gates, back)
            found.append((d_state, d_gates))
        d_states, d_all = (torch.stack(x[::-1]) for x in zip(*found, strict=True))
        by_side = d_all.transpose(0, 1).flatten(1, 2)  # (S, L B, 3 H)
        d_weight = states[:-1].transpose(0, 1).flatten(1, 2).transpose(1, 2) @ by_side
        d_inputs = torch.cat([d_all[..., : -new.shape[-1]], d_states * slope], dim=-1)
        return d_inputs, d_weight, by_side.sum(dim=1, keepdim=True)
