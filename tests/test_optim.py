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


def test_gamma() -> None:
    assert rates(decay_at=[0.5, 0.9], gamma=0.5) == pytest.approx([0.4] * 50 + [0.2] * 40 + [0.1] * 10)


def test_detectrons_warm_up() -> None:
    """Its lr_policy: factor * (1 - alpha) + alpha, alpha = step / WARM_UP_ITERS; or WARM_UP_FACTOR all the time."""
    linear = rates(decay_at=[], warmup=10, warmup_factor=0.25)
    assert linear == pytest.approx([0.4 * (0.25 * (1 - i / 10) + i / 10) for i in range(10)] + [0.4] * 90)
    constant = rates(decay_at=[], warmup=10, warmup_kind="constant", warmup_factor=0.25)
    assert constant == pytest.approx([0.1] * 10 + [0.4] * 90)
    assert rates(decay_at=[], warmup=3, warmup_kind="constant")[:4] == pytest.approx([0.1, 0.1, 0.1, 0.4])


def test_scaled() -> None:
    """Twice the batch: twice the lr, half the steps; the images of a run and of its warm-up stay."""
    asked = settings(batch=32, lr_reference=16, lr=0.02, steps=90000, warmup=501)
    got = optim.scaled(asked)
    assert (got.lr, got.steps, got.warmup) == (0.04, 45000, 251)
    assert optim.scaled(got) == got
    small = optim.scaled(settings(batch=3, lr_reference=16, lr=0.02, steps=1000))
    assert small.lr == pytest.approx(0.02 * 3 / 16) and small.steps == 5333
    for same in (settings(batch=32), settings(batch=32, lr_reference=32)):
        assert optim.scaled(same) is same


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


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_bias_lr(optimizer: str) -> None:
    """Biases of layers learn faster, scale and shift of a norm do not; nothing of that kind decays."""
    asked = settings(optimizer=optimizer, bias_lr=2, weight_decay=0.1)
    net = network()
    built = optim.build(net, asked)
    optim.at(0, built, asked)
    got = {id(p): (g["lr"], g["weight_decay"]) for g in built.param_groups for p in g["params"]}
    names = {name: got[id(p)] for name, p in net.named_parameters()}
    assert names == {"0.weight": (0.4, 0.1), "0.bias": (0.8, 0), "1.weight": (0.4, 0), "1.bias": (0.4, 0),
                     "3.weight": (0.4, 0.1), "3.bias": (0.8, 0)}  # fmt: skip


@pytest.mark.parametrize("corrected", [False, True])
def test_momentum_when_the_learning_rate_falls(corrected: bool) -> None:
    """Against the two rules written out: torch's v = m v + g, w -= r v, where v is multiplied by new / old or not."""
    asked = settings(momentum_correction=corrected, decay_at=[0.03], weight_decay=0, warmup=0, momentum=0.9)
    layer = nn.Linear(1, 1, bias=False)
    weight = layer.weight.item()
    built = optim.build(layer, asked)
    velocity = 0.0
    for step in range(6):
        rate = optim.at(step, built, asked)
        assert rate == pytest.approx(0.4 if step < 3 else 0.04)
        if corrected and step == 3:
            velocity *= 0.1
        velocity = 0.9 * velocity + 1
        weight -= rate * velocity
        layer.weight.grad = torch.ones(1, 1)
        built.step()
        assert layer.weight.item() == pytest.approx(weight, rel=1e-5)


def test_small_changes_of_the_learning_rate_leave_the_momentum() -> None:
    asked = settings(momentum_correction=True, schedule="cosine")
    layer = nn.Linear(1, 1)
    built = optim.build(layer, asked)
    layer(torch.ones(1, 1)).sum().backward()
    built.step()
    before = built.state[layer.weight]["momentum_buffer"].clone()
    optim.at(50, built, asked)
    assert torch.equal(built.state[layer.weight]["momentum_buffer"], before)


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
