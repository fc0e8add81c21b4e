"""Reinforcement learning in bench/papers/control.py: environments are gymnasium's, goals are discounted returns."""

from __future__ import annotations

import dataclasses
import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch

from bench.papers import control
from bench.papers.contenders import Method

SHORT = dataclasses.replace(control.TASKS["cartpole"], updates=40)


@pytest.mark.parametrize(("kind", "name"), [(control.CartPole, "CartPole-v1"), (control.Acrobot, "Acrobot-v1")])
def test_environments_take_the_steps_of_gymnasiums(kind, name):
    draw = np.random.default_rng(0)
    # A start that falls at once, one that is cut off, one in between.
    starts = draw.uniform(-1, 1, (3, 4, 4)) * kind.spread
    ours, theirs = kind(starts), [gymnasium.make(name) for _ in starts]
    for env, start in zip(theirs, starts, strict=True):
        env.reset()
        env.unwrapped.state = start[0].copy()
    waiting, ends = [False] * 3, 0
    for _ in range(1200):
        # Against the pole's fall in the third, so that its episode is long.
        actions = draw.integers(0, kind.actions, 3)
        if kind is control.CartPole:
            actions[2] = ours.state[2, 2] + ours.state[3, 2] > 0
        seen, alive, terminated, cut = ours.step(actions)
        rewards = ours.rewards(alive, terminated)
        for i, env in enumerate(theirs):
            assert alive[i] == (not waiting[i])
            if waiting[i]:
                env.reset()
                env.unwrapped.state = starts[i, ours.episode[i] % 4].copy()
                assert rewards[i] == 0.0
                waiting[i] = False
                continue
            expected, reward, over, truncated, _ = env.step(int(actions[i]))
            np.testing.assert_allclose(seen[i], expected, rtol=1e-5, atol=1e-5)
            assert (rewards[i], terminated[i], cut[i]) == (reward, over, truncated and not over)
            waiting[i] = over or truncated
            ends += waiting[i]
            # Chaotic: each step from gymnasium's state.
            ours.state[:, i] = env.unwrapped.state
    assert ends > 3
    assert cut.dtype == bool


@pytest.mark.parametrize("lr", [0.01, 1e30])
def test_a_policy_that_diverged_has_no_score(lr, monkeypatch):
    monkeypatch.setattr(control, "WINDOWS", 1)
    record = SHORT.train(Method("SGD"), [{"lr": lr}], (0,), test=False, tick=lambda: None)[0][0]
    assert math.isfinite(record["score"]) == (lr < 1)


def test_goals_are_discounted_returns():
    draw = torch.Generator().manual_seed(0)
    reward, value = torch.randn(9, 4, generator=draw), torch.randn(9, 4, generator=draw)
    last, terminated, cut = torch.randn(4, generator=draw), torch.zeros(9, 4).bool(), torch.zeros(9, 4).bool()
    terminated[3, 1] = cut[5, 2] = cut[8, 3] = True
    found = control.goals(reward, value, terminated, cut, last)
    for t, e in itertools.product(range(9), range(4)):
        expected, discount = 0.0, 1.0
        for s in range(t, 9):
            expected += discount * reward[s, e].item()
            discount *= control.GAMMA
            if terminated[s, e]:
                break
            if cut[s, e] or s == 8:
                expected += discount * (value[s + 1, e] if s < 8 else last[e]).item()
                break
        assert found[t, e].item() == pytest.approx(expected, abs=1e-5)
