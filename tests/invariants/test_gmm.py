"""GARDO on a mixture of Gaussians in the plane: reinforcement alone loses modes, with diversity they stay.

Nine Gaussians on {-4, 0, 4}^2, the one in the centre a tenth as likely. The reward is high at the corners and the centre. A small
velocity network learns the mixture, then GRPO on the flow SDE fine-tunes it, with the library's dynamics, advantages and guards.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from t2irl.advantages import group_advantages
from t2irl.config import Advantage
from t2irl.dynamics.base import euler, kl
from t2irl.dynamics.flow_sde import FlowSde
from t2irl.guards.diversity import factors, nearest
from t2irl.guards.gardo import GateShare, ResetRule, gate, statistic, uncertainty

pytestmark = pytest.mark.slow
AXIS = (-4.0, 0.0, 4.0)
MEANS = torch.tensor([(x, y) for x in AXIS for y in AXIS])
WEIGHTS = torch.tensor([1.0] * 4 + [0.1] + [1.0] * 4)
GOOD = MEANS[[0, 2, 4, 6, 8]]
"""Centre and corners."""
STEPS, GROUPS, SIZE = 20, 10, 24
LEVELS = torch.linspace(1, 0, STEPS + 1)
SDE = FlowSde(FlowSde.Config(noise_level=0.7))
PLAIN = Advantage(std="none", clip=1e9)


class Velocity(nn.Module):
    """Three linear layers over position and noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 2, 1, 1)."""
        angles = t[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])
        return self.layers(torch.cat([x.flatten(1), angles.sin(), angles.cos()], 1)).view_as(x)


def reward(x: Tensor, width: float = 0.8) -> Tensor:
    """(B, 2, 1, 1) -> (B,) in (0, 1]: nearness to the nearest good mean."""
    return (-torch.cdist(x.flatten(1), GOOD).square() / (2 * width**2)).exp().amax(1)


@pytest.fixture(scope="module")
def base() -> Velocity:
    """The mixture, learnt by flow matching."""
    torch.manual_seed(0)
    model = Velocity()
    steps = 3000
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.multinomial(WEIGHTS, 1024, replacement=True)
        clean = (MEANS[chosen] + math.sqrt(0.3) * torch.randn(1024, 2)).view(-1, 2, 1, 1)
        noise, t = torch.randn_like(clean), torch.rand(1024)
        level = t.view(-1, 1, 1, 1)
        loss = (model((1 - level) * clean + level * noise, t) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def sample(model: Velocity, count: int, generator: torch.Generator, trained: bool) -> tuple[Tensor, Tensor]:
    """States (count, STEPS + 1, 2, 1, 1) and log-densities (count, STEPS - 1); without `trained` by the ODE, without the latter."""
    x, log_probs = torch.randn(count, 2, 1, 1, generator=generator), []
    states = [x]
    for step in range(STEPS):
        t, t_next = LEVELS[step].expand(count), LEVELS[step + 1].expand(count)
        v = model(x, t)
        if trained and step < STEPS - 1:
            mean, std = SDE.mean_std(x, v, t, t_next)
            x = SDE.sample(mean, std, torch.randn(x.shape, generator=generator))
            log_probs.append(SDE.log_prob(x, mean, std))
        else:
            x = euler(x, v, t, t_next)
        states.append(x)
    return torch.stack(states, 1), torch.stack(log_probs, 1) if log_probs else x


def train(base: Velocity, seed: int, beta: float, diverse: bool, iterations: int = 400) -> tuple[float, float]:
    """Fine-tune; mean reward and effective number of good modes, exp(entropy of their shares), of 8000 samples."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, anchor = copy.deepcopy(base), copy.deepcopy(base)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    share, rule = GateShare(0.1), ResetRule(threshold=None, every=40)
    ids = torch.arange(GROUPS * SIZE) // SIZE
    for _ in range(iterations):
        states, old = sample(model, len(ids), generator, trained=True)
        final = states[:, -1]
        scores = reward(final)
        advantages = group_advantages({"r": scores}, {"r": 1.0}, ids, PLAIN)
        if diverse:
            advantages = advantages * factors(nearest(final.flatten(1), ids, "euclidean"), ids, advantages)
        uncertain = uncertainty(scores, [reward(final, width=1.6)])
        chosen = gate(uncertain, share.update(statistic(uncertain)))
        if rule.due:
            anchor.load_state_dict(model.state_dict())
            rule.reset()
        for images in torch.randperm(len(ids), generator=generator).chunk(2):
            update(
                model, anchor, optimizer, states[images], old[images], advantages[images].float(), chosen[images], beta
            )
            rule.after_update(None)
    final = sample(model, 8000, torch.Generator().manual_seed(99), trained=False)[0][:, -1]
    near = torch.cdist(final.flatten(1), GOOD) < 1.5
    shares = near.float().mean(0) / near.float().mean(0).sum()
    return float(reward(final).mean()), float(torch.special.entr(shares).sum().exp())


def update(
    model: Velocity, anchor: Velocity, optimizer: torch.optim.Optimizer,
    states: Tensor, old: Tensor, advantages: Tensor, chosen: Tensor, beta: float,
) -> None:  # fmt: skip
    """One step: clipped policy gradient over all transitions but the last, and KL on the chosen images."""
    steps = STEPS - 1
    x, x_next, t, t_next = SDE.rows(states[:, :STEPS], LEVELS[:STEPS])
    advantage, rows = advantages.repeat_interleave(steps), chosen.repeat_interleave(steps)
    v = model(x, t)
    mean, std = SDE.mean_std(x, v, t, t_next)
    ratio = (SDE.log_prob(x_next, mean, std) - old.flatten()).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.98, 1.02)).mean()
    if beta and rows.any():
        with torch.no_grad():
            v_ref = anchor(x[rows], t[rows])
            mean_ref, _ = SDE.mean_std(x[rows], v_ref, t[rows], t_next[rows])
        loss = loss + beta * kl("exact", mean[rows], mean_ref, std[rows], (t - t_next)[rows], v[rows], v_ref).mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def test_the_base_model_has_all_modes(base: Velocity) -> None:
    """Four corners and, barely, the centre, and a low reward."""
    found, modes = train(base, 0, 0.0, False, iterations=0)
    assert modes > 3.9 and 0.1 < found < 0.4


def test_diversity_keeps_the_modes_that_reinforcement_loses(base: Velocity) -> None:
    """All reach three times the base model's reward; only with the diversity factor the four corners stay equally likely."""
    start, _ = train(base, 0, 0.0, False, iterations=0)
    alone, without, gardo = (train(base, 0, *how) for how in ((0.0, False), (0.1, False), (0.1, True)))
    assert min(found for found, _ in (alone, without, gardo)) > 3 * start
    assert gardo[1] > 3.8
    assert max(alone[1], without[1]) < 3.4
