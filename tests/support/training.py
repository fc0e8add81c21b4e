"""A small network, its gradients and steps, the same for the same numbers: what tests of an optimizer's behaviour train."""

from __future__ import annotations

import torch


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))


def backward(net, seed=0):
    torch.manual_seed(seed)
    net.zero_grad()
    loss = net(torch.randn(11, 5)).square().mean()
    loss.backward()
    return loss


def train(net, optimizer, steps=5, start=0):
    for i in range(start, start + steps):
        backward(net, i)
        optimizer.step()


def assert_close(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def with_values(net, values):
    for p, value in zip(net.parameters(), values, strict=True):
        p.data.copy_(value)
    return net
