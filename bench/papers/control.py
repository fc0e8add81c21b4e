"""Reinforcement learning on gymnasium's CartPole and Acrobot: an advantage actor-critic (A2C) for many networks at once.

A run depends on its point and seed alone: starts of episodes and draws of actions are those of the seed, whatever is beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.envs.classic_control.acrobot import AcrobotEnv
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from torch import Tensor, nn

from .contenders import Method
from .search import Point
from .stacked import Networks

#: Environments of a network, and steps of each between two updates.
ENVIRONMENTS, HORIZON = 8, 16
LONGEST = 500
GAMMA, ENTROPY = 0.99, 0.01
WINDOWS = 20


class Episodes:
    """Environments side by side, as gymnasium has them: a step after the end of an episode only starts the next one.

    ``starts`` are the first states, (environments, episodes, 4), and taken again from the first where more are needed.
    """

    actions: int
    reward: float

    def __init__(self, starts: np.ndarray) -> None:
        self.starts, self.count = starts, len(starts)
        self.episode = np.zeros(self.count, dtype=np.int64)
        self.steps = np.zeros(self.count, dtype=np.int64)
        self.ended = np.zeros(self.count, dtype=bool)
        self.state = starts[:, 0].T.copy()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What is seen, and whether an action was taken, ended the episode, or was the last of the ``LONGEST`` allowed."""
        alive = ~self.ended
        self.state, terminated = self.dynamics(action)
        self.steps += 1
        cut = (self.steps >= LONGEST) & alive
        terminated &= alive
        fresh = ~alive
        if fresh.any():
            self.episode[fresh] += 1
            self.state[:, fresh] = self.starts[fresh, self.episode[fresh] % self.starts.shape[1]].T
            self.steps[fresh] = 0
        self.ended = terminated | cut
        return self.seen(), alive, terminated, cut & ~terminated

    def dynamics(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def seen(self) -> np.ndarray:
        raise NotImplementedError


class CartPole(Episodes):
    """gymnasium's CartPole-v1: a reward of 1 for each step."""

    actions, sees, spread = 2, 4, 0.05

    def __init__(self, starts: np.ndarray) -> None:
        super().__init__(starts)
        self.of_gymnasium = CartPoleVectorEnv(self.count)
        self.of_gymnasium.reset(seed=0)

    def dynamics(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Episodes counts steps and starts episodes.
        self.of_gymnasium.state, self.of_gymnasium.steps[:] = self.state, 0
        self.of_gymnasium.prev_done[:] = False
        _, _, terminated, _, _ = self.of_gymnasium.step(action)
        return self.of_gymnasium.state, terminated

    def rewards(self, alive: np.ndarray, terminated: np.ndarray) -> np.ndarray:
        return alive.astype(np.float32)

    def seen(self) -> np.ndarray:
        return self.state.T.astype(np.float32)


class Acrobot(Episodes):
    """gymnasium's Acrobot-v1, by its own equations of motion: a reward of -1 for each step but the last."""

    actions, sees, spread = 3, 6, 0.1
    of_gymnasium = AcrobotEnv()

    def dynamics(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        env, h = self.of_gymnasium, self.of_gymnasium.dt

        def slope(y: np.ndarray) -> np.ndarray:
            return np.stack(np.broadcast_arrays(*env._dsdt(y)))

        # One step of Runge-Kutta; gymnasium's takes a single environment.
        y = np.concatenate([self.state, action[None] - 1.0])
        k1 = slope(y)
        k2 = slope(y + h / 2 * k1)
        k3 = slope(y + h / 2 * k2)
        k4 = slope(y + h * k3)
        state = (y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))[:4]
        for row in (0, 1):
            angle = state[row]
            while (high := angle > np.pi).any() or (angle < -np.pi).any():
                angle -= 2 * np.pi * high
                angle += 2 * np.pi * (angle < -np.pi)
        state[2] = state[2].clip(-env.MAX_VEL_1, env.MAX_VEL_1)
        state[3] = state[3].clip(-env.MAX_VEL_2, env.MAX_VEL_2)
        return state, -np.cos(state[0]) - np.cos(state[1] + state[0]) > 1.0

    def rewards(self, alive: np.ndarray, terminated: np.ndarray) -> np.ndarray:
        return -(alive & ~terminated).astype(np.float32)

    def seen(self) -> np.ndarray:
        a, b, c, d = self.state
        return np.stack([np.cos(a), np.sin(a), np.cos(b), np.sin(b), c, d], 1).astype(np.float32)


class ActorCritic(nn.Module):
    def __init__(self, sees: int, actions: int, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(sees, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.policy, self.value = nn.Linear(width, actions), nn.Linear(width, 1)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(seen)
        return self.policy(hidden), self.value(hidden)[..., 0]


def act(network: Callable[[Tensor], Any], seen: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Actions by the inverse of their distribution function at ``uniform``, and values."""
    logits, value = network(seen)
    above = torch.softmax(logits, -1).cumsum(-1)[..., :-1] < uniform[..., None]
    return above.sum(-1), value


def loss_of(network: Callable[[Tensor], Any], seen: Tensor, action: Tensor, goal: Tensor, alive: Tensor) -> Tensor:
    """A2C's loss over (steps, environments); advantages have mean 0 and deviation 1 over the steps of living episodes."""
    logits, value = network(seen)
    log = torch.log_softmax(logits, -1)
    count = alive.sum().clamp_min(1.0)
    error = (goal - value) * alive
    centred = (error.detach() - error.detach().sum() / count) * alive
    advantage = centred / (centred.square().sum() / count + 1e-8).sqrt()
    chosen = (log * nn.functional.one_hot(action, log.shape[-1])).sum(-1)
    entropy = -(log.exp() * log).sum(-1)
    return (alive * (-chosen * advantage - ENTROPY * entropy) + 0.5 * error.square()).sum() / count


def goals(reward: Tensor, value: Tensor, terminated: Tensor, cut: Tensor, last: Tensor) -> Tensor:
    """Discounted returns of each step, (steps, ...): where an episode was cut off, and after the last step, values go on.

    The value after step t is that of t + 1, whose action is ignored where an episode ended at t.
    """
    found, after = torch.empty_like(reward), last
    for t in reversed(range(len(reward))):
        following = value[t + 1] if t + 1 < len(reward) else last
        after = torch.where(cut[t], following, after)
        after = reward[t] + GAMMA * torch.where(terminated[t], 0.0, after)
        found[t] = after
    return found


@dataclasses.dataclass(frozen=True)
class Control:
    """Training for a number of updates; the score is minus the mean return over the whole training."""

    kind: type[Episodes]
    #: A return that counts as solved.
    target: float
    updates: int = 800

    unit = "return"
    searched, runoff, reported, priced = (tuple(range(n, m)) for n, m in ((0, 5), (50, 60), (100, 140), (200, 220)))
    ratios = False

    @property
    def steps(self) -> int:
        return self.updates

    def settings(self) -> dict[str, Any]:
        module = self.build()
        return {
            "updates": self.updates,
            "environments": ENVIRONMENTS,
            "horizon": HORIZON,
            "gamma": GAMMA,
            "entropy": ENTROPY,
            "parameters": sum(p.numel() for p in module.parameters()),
        }

    def positions(self) -> list[float]:
        """Updates at which a curve has its points: the middles of its windows."""
        return [(k + 0.5) * self.updates / WINDOWS for k in range(WINDOWS)]

    def build(self) -> nn.Module:
        return ActorCritic(self.kind.sees, self.kind.actions)

    def train(
        self, method: Method, points: Sequence[Point], seeds: Sequence[int], *, test: bool, tick: Callable[[], Any]
    ) -> list[list[dict[str, Any]]]:
        """The record of every point and seed."""
        networks = Networks(self.build, len(points), seeds)
        optimizers = method.optimizers(networks.parameters, points)
        shape = len(points), len(seeds), ENVIRONMENTS
        draws = [np.random.default_rng(2000 + seed) for seed in seeds]
        starts = np.stack([d.uniform(-1, 1, (ENVIRONMENTS, 64, 4)) for d in draws]) * self.kind.spread
        environments = self.kind(np.broadcast_to(starts, (len(points), *starts.shape)).reshape(-1, 64, 4))
        seen = torch.from_numpy(environments.seen()).view(*shape, -1)
        running, finished = torch.zeros(shape), torch.zeros(*shape[:2], WINDOWS, 2)
        for update in range(self.updates):
            window = update * WINDOWS // self.updates
            uniforms = torch.from_numpy(np.stack([d.random((HORIZON, ENVIRONMENTS), np.float32) for d in draws], 1))
            kept: list[list[Tensor]] = []
            for uniform in uniforms:
                with torch.no_grad():
                    action, value = networks.each(act, seen, uniform.expand(shape), shared=False)
                after, *flags = environments.step(action.flatten().numpy())
                reward = torch.from_numpy(environments.rewards(flags[0], flags[1])).view(shape)
                alive, terminated, cut = (torch.from_numpy(flag).view(shape) for flag in flags)
                kept.append([seen, action, value, reward, alive.float(), terminated, cut])
                seen = torch.from_numpy(after).view(*shape, -1)
                running += reward
                if (ended := terminated | cut).any():
                    finished[:, :, window, 0] += (running * ended).sum(-1)
                    finished[:, :, window, 1] += ended.sum(-1)
                    running[ended] = 0.0
            with torch.no_grad():
                last = networks.each(act, seen, uniforms[0].expand(shape), shared=False)[1]
            views, actions, values, rewards, alive, terminated, cut = (
                torch.stack(of) for of in zip(*kept, strict=True)
            )
            # In units in which a return is about 1.
            goal = goals(rewards * (1.0 - GAMMA), values, terminated, cut, last)
            inputs = [t.movedim(0, 2) for t in (views, actions, goal, alive)]
            networks.backward(networks.each(loss_of, *inputs, shared=False))
            for optimizer in optimizers:
                optimizer.step()
            tick()
        # Every window is longer than an episode can be, so that each environment ends one.
        curve = finished[..., 0] / finished[..., 1]
        # A network of NaN goes on with its first action.
        curve[~networks.finite()] = torch.nan
        mean, end = curve.mean(-1).tolist(), curve[..., -WINDOWS // 5 :].mean(-1).tolist()
        records = [
            [
                {"score": -mean[i][j], "test": mean[i][j], "end": end[i][j], "curve": curve[i, j].tolist()}
                for j in range(shape[1])
            ]
            for i in range(shape[0])
        ]
        if test:
            method.inspect(optimizers, networks, records)
        return records


#: The return that CartPole-v0 counted as solved, and the threshold of Acrobot-v1.
TASKS = {"cartpole": Control(CartPole, 195.0), "acrobot": Control(Acrobot, -100.0)}
