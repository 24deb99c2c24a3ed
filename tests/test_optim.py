"""Learning rate, parameter groups, the average of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lcrnet import optim
from lcrnet.config import Train


def settings(**fields: Any) -> Train:
    return Train(**({"steps": 100, "lr": 0.4, "warmup": 0} | fields))


def rates(**fields: Any) -> list[float]:
    asked = settings(**fields)
    return [optim.learning_rate(step, asked) for step in range(asked.steps)]


def test_steps() -> None:
    got = rates(decay_at=[0.5, 0.9])
    assert got == pytest.approx([0.4] * 50 + [0.04] * 40 + [0.004] * 10)
    assert rates(decay_at=[]) == [0.4] * 100


def test_cosine() -> None:
    got = rates(schedule="cosine")
    assert got[0] == pytest.approx(0.4) and got[50] == pytest.approx(0.2) and 0 < got[-1] < 0.4 * 1e-3
    assert got == sorted(got, reverse=True)


@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_warm_up(schedule: str) -> None:
    """Linear, never 0, and at its end where the run would be without it."""
    plain, warm = rates(schedule=schedule), rates(schedule=schedule, warmup=9)
    assert warm[9:] == plain[9:]
    assert warm[:9] == pytest.approx([(i + 1) / 10 * plain[i] for i in range(9)])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_decay_of_norms_and_biases(optimizer: str) -> None:
    """Without gradients decay alone moves weights. Frozen ones are not in it at all."""
    net = network()
    net[3].weight.requires_grad_(False)
    built = optim.build(net, settings(optimizer=optimizer, weight_decay=0.1, lr=0.5))
    assert sum(len(group["params"]) for group in built.param_groups) == 5
    before = [p.detach().clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True)]
    assert moved == [True, False, False, False, False, False]
    torch.testing.assert_close(net[0].weight, before[0] * (1 - 0.5 * 0.1))


def test_settings_reach_the_optimizer() -> None:
    sgd = optim.build(network(), settings(momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD) and {g["momentum"] for g in sgd.param_groups} == {0.8}
    adam = optim.build(network(), settings(optimizer="adamw", momentum=0.8, beta2=0.95))
    assert isinstance(adam, torch.optim.AdamW) and {g["betas"] for g in adam.param_groups} == {(0.8, 0.95)}


def test_average() -> None:
    """Follows fast at first, then by its decay; swapped twice nothing has changed."""
    net = network()
    with torch.no_grad():
        average = optim.Average(net, 0.5)
        start = net[0].weight.clone()
        net[0].weight += 1
        average.update(net.parameters(), 0)  # min(0.5, 1 / 10) of the old
        torch.testing.assert_close(average.weights[0], start + 0.9)
        average.update(net.parameters(), 1000)
        torch.testing.assert_close(average.weights[0], start + 0.95)
    net_weights, mean_weights = ([w.detach().clone() for w in x] for x in (net.parameters(), average.weights))
    average.swap(net)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), mean_weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(average.weights, net_weights, strict=True))
    average.swap(net)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), net_weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(average.weights, mean_weights, strict=True))
    assert all(p.requires_grad for p in net.parameters())
