"""GARDO in the real loop of a toy: who is penalised, by how much, to which policy, and that nothing is forgotten."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from t2irl.advantages import group_advantages
from t2irl.batches import micro_batches, updates
from t2irl.config import Run
from t2irl.guards.gardo import gate, uncertainty
from t2irl.monitor import UpdateLog
from t2irl.rewards.base import Reward
from t2irl.train import Parts, shaped, update_policy
from t2irl.types import MicroBatch, PromptGroups, Rollout
from t2irl.utils import distributed
from tests.invariants.toy import PROMPTS, merged, toy_parts, toy_rollout, toy_run, weights_of

HERE = "tests.invariants.test_gardo"


class Redness(Reward):
    """Mean of the first channel."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """In [0, 1]."""
        return images[:, 0].mean((1, 2))


class Detail(Reward):
    """Spread of the picture."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """In [0, 1]."""
        return images.std((1, 2, 3))


REWARDS = {
    "brightness": {"type": "tests.invariants.toy:Brightness"},
    "red": {"type": f"{HERE}:Redness", "weight": 0},
    "detail": {"type": f"{HERE}:Detail", "weight": 0},
}
GATE = {
    "type": "gated_kl", "auxiliaries": ["red", "detail"], "anchor": "slow", "kind": "v_mse", "coefficient": 1, "share": 0.2,
}  # fmt: skip
SLOW = {"type": "adaptive_reference", "threshold": None, "every": 3}
MATCHING = {"dynamics": {"type": "matching"}, "window": {"type": "fixed"}}
RECORDED = {"window": {"type": "fixed", "start": 0, "size": 3}}


def gardo_run(
    regularizers: Mapping[str, Any] | None = None, rollout: Mapping[str, Any] | None = None, **changes: Any
) -> Run:
    """A run with a proxy, two auxiliaries, and the regularisers."""
    tree = {
        "rollout": {"prompts": 6, "group_size": 4, **(rollout or RECORDED)},
        "regularizers": regularizers if regularizers is not None else {"gate": GATE, "slow": SLOW},
        "update": {"per_iteration": 2, "batch_size": 5},
        "optimizer": {"lr": 0.05, "eps": 0.01},
    }
    return toy_run({"rewards": REWARDS, **merged(tree, changes)})


def scored(run: Run, parts: Parts) -> tuple[Tensor, Rollout]:
    """This process's advantages and the scored rollout, as the loop makes them."""
    trajectory, cpu = toy_rollout(run, parts), torch.device("cpu")
    scores = parts.rewards.score(trajectory.images, trajectory.groups)
    table = {name: distributed.gather_rows(values, cpu) for name, values in scores.items()}
    ids = distributed.gather_rows(torch.tensor(trajectory.groups.ids), cpu)
    first = distributed.rank() * len(trajectory.groups)
    found = Rollout(trajectory, table, ids, first, parts.clock.iteration)
    return group_advantages(table, parts.rewards.weights, ids, run.advantage).float()[found.own], found


def iterate(run: Run, parts: Parts, count: int) -> list[Tensor]:
    """The loop without metrics; this process's advantages of each iteration."""
    found = []
    for _ in range(count):
        advantages, rollout = scored(run, parts)
        advantages = shaped(advantages, rollout, parts)
        found.append(advantages)
        chosen = updates(rollout.trajectory, advantages, parts.geometry, run.seed, rollout.iteration, False)
        for images in chosen:
            update_policy(run, parts, images, rollout.trajectory.levels, UpdateLog(torch.device("cpu")))
        parts.clock.iteration += 1
    return found


def take_over(first: Parts, second: Parts) -> None:
    """Give the second run the state of the first, as a checkpoint would."""
    second.policy.load_state_dict({k: v.clone() for k, v in first.policy.state_dict().items()})
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.clock.iteration, second.clock.update = first.clock.iteration, first.clock.update


def batches(run: Run, parts: Parts, size: int) -> list[MicroBatch]:
    """All micro-batches of an iteration that has one update."""
    advantages, rollout = scored(run, parts)
    for regularizer in parts.regularizers.values():
        regularizer.shape(advantages, rollout)
    images = next(updates(rollout.trajectory, advantages, parts.geometry, run.seed, 0, False))
    share = 1 / (len(images) * parts.geometry.window_size)
    return list(micro_batches(images, rollout.trajectory.levels, parts.policy, PROMPTS, size, share))


def disturb(parts: Parts) -> None:
    """Move the policy away from where it began."""
    generator = torch.Generator().manual_seed(0)
    for p in parts.policy.trained.values():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("rollout", [RECORDED, MATCHING], ids=["recorded", "matching"])
@pytest.mark.parametrize("normaliser", ["all", "gated"])
def test_the_penalty_is_that_of_the_chosen_images_however_they_are_batched(
    rollout: Mapping[str, Any], normaliser: str
) -> None:
    """Their mean divergence, over all images or over the chosen ones; any split gives the same loss and gradient."""
    run = gardo_run({"gate": {**GATE, "normaliser": normaliser}, "slow": SLOW}, rollout, update={"per_iteration": 1})
    parts = toy_parts(run)
    disturb(parts)
    found = []
    for size in (24, 5, 1):
        regularizer, losses = parts.regularizers["gate"], []
        for batch in batches(run, parts, size):
            losses.append(regularizer.loss(parts.policy, parts.policy.predict(batch), batch))
        total = torch.stack(losses).sum()
        found.append((total.detach(), torch.autograd.grad(total, list(parts.policy.trained.values()))))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-7)
    (batch,) = batches(run, parts, 24)
    chosen = parts.regularizers["gate"].rows
    assert 0 < int(chosen.sum()) <= 6
    with torch.no_grad():
        ours = parts.policy.predict(batch).velocity
        with parts.policy.at("slow"):
            theirs = parts.policy.predict(batch).velocity
    each = (ours - theirs).square().mean((1, 2, 3))[chosen[batch.image]]
    count = 24 * parts.geometry.window_size if normaliser == "all" else len(each)
    torch.testing.assert_close(found[0][0], each.sum() / count, rtol=1e-4, atol=1e-9)


def test_the_anchor_sees_only_chosen_images() -> None:
    """The forward pass costs their share, and a micro-batch without any costs nothing and gives exactly 0."""
    run = gardo_run(update={"per_iteration": 1})
    parts = toy_parts(run)
    disturb(parts)
    for batch in batches(run, parts, 3):
        prediction = parts.policy.predict(batch)
        before = parts.family.work["denoiser_forward_images"]
        loss = parts.regularizers["gate"].loss(parts.policy, prediction, batch)
        rows = int(parts.regularizers["gate"].rows[batch.image].sum())
        assert parts.family.work["denoiser_forward_images"] - before == rows
        assert (loss == 0) == (rows == 0)


def test_whom_the_gate_chooses() -> None:
    """Those of the largest uncertainty of eq. 7; with the inverted sign the opposite ones; at random as many."""
    chosen = {}
    for name, changes in {"paper": {}, "inverted": {"sign": "inverted"}, "random": {"select": "random"}}.items():
        run = gardo_run({"gate": {**GATE, **changes}, "slow": SLOW})
        parts = toy_parts(run)
        advantages, rollout = scored(run, parts)
        assert parts.regularizers["gate"].shape(advantages, rollout) is advantages
        chosen[name] = parts.regularizers["gate"].chosen
        metrics = parts.regularizers["gate"].metrics()
        assert metrics["gate_share"] == 0.2 and 0 < metrics["gate_fraction"] <= 0.25
        assert -1 <= metrics["agreement"] <= 1
    uncertain = uncertainty(rollout.scores["brightness"], [rollout.scores["red"], rollout.scores["detail"]])
    assert torch.equal(chosen["paper"], gate(uncertain, 0.2))
    assert not (chosen["paper"] & chosen["inverted"]).any() and bool((uncertain[chosen["inverted"]] < 0).all())
    assert int(chosen["random"].sum()) == int(chosen["paper"].sum())
    assert not torch.equal(chosen["random"], chosen["paper"])


def test_the_gate_ranks_by_what_is_optimised() -> None:
    """A proxy of negative weight the other way round; without a name, what the rewards make together."""
    less = {"brightness": {"type": "tests.invariants.toy:Brightness", "weight": -1}}
    more = {"dim": {"type": "tests.invariants.toy:Brightness"}}
    limited = {
        "aggregate": {"type": "constraints", "initial": 1},
        "rewards": {"dim": {"constraint": {"at": 0, "sense": "at_most"}}},
    }
    for rewards, proxy, combine in (
        (REWARDS | less, "brightness", None), (REWARDS | less, None, None), (REWARDS | more, None, limited)
    ):  # fmt: skip
        changes = {"combine": combine, "heldout_rewards": {"gold": REWARDS["brightness"]}}
        run = gardo_run({"gate": {**GATE, "proxy": proxy}, "slow": SLOW}, rewards=rewards, **changes)
        parts = toy_parts(run)
        advantages, rollout = scored(run, parts)
        parts.regularizers["gate"].shape(advantages, rollout)
        witnesses = [rollout.scores["red"], rollout.scores["detail"]]
        optimised = -rollout.scores["brightness"]
        if combine:
            first, cost = rollout.scores["brightness"], rollout.scores["dim"]
            w = parts.pipeline.multipliers.weights()
            optimised = w[0] * first + w[1]["dim"] * cost
        assert torch.equal(parts.regularizers["gate"].chosen, gate(uncertainty(optimised, witnesses), 0.2))


@pytest.mark.parametrize("tune", [{"type": "lora", "rank": 4, "alpha": 8}, {"type": "full"}], ids=["lora", "full"])
def test_the_reference_policy_follows_in_jumps(tune: Mapping[str, Any]) -> None:
    """It begins as the base model; after three updates it is the policy of the next iteration's start, to the bit, and only then."""
    run = gardo_run(policy={"tune": tune})
    parts = toy_parts(run)
    policy, rule = parts.policy, parts.regularizers["slow"].rule
    start = weights_of(policy)

    def snapshot_is(weights: Mapping[str, Tensor]) -> bool:
        return all(torch.equal(policy.snapshots["slow"][name], w) for name, w in weights.items())

    assert snapshot_is(start)
    iterate(run, parts, 2)
    assert snapshot_is(start) and (rule.age, rule.count) == (4, 0)
    moved, average = weights_of(policy), copy.deepcopy(policy.average)
    moments = copy.deepcopy(parts.optimizer.state_dict())
    advantages, rollout = scored(run, parts)
    parts.regularizers["slow"].shape(advantages, rollout)
    assert snapshot_is(moved) and not snapshot_is(start) and (rule.age, rule.count) == (0, 1)
    assert all(torch.equal(policy.average[n], average[n]) for n in average)
    after = parts.optimizer.state_dict()["adamw"]["state"]
    assert all(torch.equal(after[k]["exp_avg"], v["exp_avg"]) for k, v in moments["adamw"]["state"].items())
    # Right after it the divergence is zero up to the rounding of other batch shapes.
    (batch,) = batches(gardo_run(update={"per_iteration": 1}), parts, 24)[:1]
    assert parts.regularizers["gate"].loss(policy, policy.predict(batch), batch).item() < 1e-10


def test_a_divergence_above_the_threshold_renews_the_reference() -> None:
    """The mean over measured transitions of an update, not diluted by the others."""
    run = gardo_run({"gate": GATE, "slow": {**SLOW, "threshold": 1e-12, "every": None}})
    parts = toy_parts(run)
    iterate(run, parts, 1)  # the first update measures 0, the second one does not
    slow = parts.regularizers["slow"]
    assert slow.rule.due == "divergence" and len(slow.seen) == 2
    assert slow.metrics()["divergence"] > 0 and slow.metrics()["resets"] == 0
    never = toy_parts(gardo_run({"gate": GATE, "slow": {**SLOW, "threshold": 1e9, "every": None}}))
    iterate(run, never, 2)
    assert never.regularizers["slow"].rule.due is None


def test_plain_kl_to_the_adaptive_reference_measures_all_images() -> None:
    """Without a gate: the same anchor, the same rule."""
    run = gardo_run({"pull": {"type": "kl", "anchor": "slow", "kind": "v_mse"}, "slow": SLOW})
    parts = toy_parts(run)
    iterate(run, parts, 3)
    assert parts.regularizers["slow"].rule.count == 1 and parts.regularizers["slow"].metrics()["divergence"] > 0


@pytest.mark.parametrize("features", [{"path": None}, {"path": None, "distance": "euclidean", "factor": "raw"}])
def test_diversity_scales_positive_advantages_only(features: Mapping[str, Any]) -> None:
    """Within groups, negative ones to the bit."""
    run = gardo_run({"wide": {"type": "diversity", **features}})
    parts = toy_parts(run)
    advantages, rollout = scored(run, parts)
    shaped = parts.regularizers["wide"].shape(advantages, rollout)
    assert shaped.dtype == torch.float32 and torch.equal(shaped[advantages <= 0], advantages[advantages <= 0])
    assert not torch.equal(shaped, advantages) and bool((shaped[advantages > 0] >= 0).all())
    assert {"nearest", "pairwise", "factor_max"} == set(parts.regularizers["wide"].metrics())
    order = torch.arange(23, -1, -1)
    flipped = Rollout(
        copy.copy(rollout.trajectory), rollout.scores, rollout.ids[order], 0, rollout.iteration
    )  # the same images the other way round
    object.__setattr__(flipped.trajectory, "images", rollout.trajectory.images[order])
    again = parts.regularizers["wide"].shape(advantages[order], flipped)
    torch.testing.assert_close(again, shaped[order])


@pytest.mark.parametrize("rollout", [RECORDED, MATCHING], ids=["recorded", "matching"])
def test_state_goes_round(rollout: Mapping[str, Any]) -> None:
    """Stopped after two iterations and continued: the same bits as without a stop, adaptive reference and share included."""
    adapt = {"window": 1, "warmup": 1, "factor": 0.1}
    entries = {
        "gate": {**GATE, "adapt": adapt, "share": 0.15},
        "slow": SLOW,
        "wide": {"type": "diversity", "path": None},
    }
    run = gardo_run(entries, rollout)
    whole, first, second = (toy_parts(run) for _ in range(3))
    iterate(run, whole, 4)
    iterate(run, first, 2)
    take_over(first, second)
    iterate(run, second, 2)
    ours, theirs = second.policy.state_dict(), whole.policy.state_dict()
    assert any(name.startswith("snapshot.slow.") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = second.state_dict()["regularizers"]
    assert found == whole.state_dict()["regularizers"] and found["gate"]["share"] != 0.15


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"g": {"type": "gated_kl", "kind": "exact"}}, "g needs auxiliaries: names of rewards of weight 0"),
        ({"g": {**GATE, "anchor": "slo"}, "slow": SLOW}, "g has anchor 'slo', which is neither .*Did you mean 'slow'"),
        ({"g": {**GATE, "anchor": "reference"}, "slow": SLOW}, "slow is used by no regulariser: set anchor: slow"),
        ({"g": {**GATE, "auxiliaries": ["rod"]}, "slow": SLOW}, "'rod', which is not among the rewards: .*mean 'red'"),
        ({"g": {**GATE, "auxiliaries": ["brightness"]}, "slow": SLOW}, r"'brightness', which is trained on \(weight 1\)"),
        ({"g": {**GATE, "auxiliaries": ["red", "red"]}, "slow": SLOW}, "auxiliaries: 'red' twice"),
        ({"g": {**GATE, "proxy": "red"}, "slow": SLOW}, "proxy: 'red', a reward of weight 0"),
        ({"g": {**GATE, "share": 0.5}, "slow": SLOW}, r"share 0.5 should lie within adapt.bounds \[0.02, 0.2\]"),
        ({"g": {**GATE, "adapt": {"window": 5}}, "slow": SLOW}, "adapt.warmup 20 should be at most adapt.window 5"),
        ({"g": GATE, "slow": {**SLOW, "every": None}}, "slow has neither threshold nor every"),
        ({"g": {**GATE, "anchor": "average"}, "average": SLOW}, "average needs another name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(entries: Mapping[str, Any], message: str) -> None:
    """Before anything is loaded, by the name of the regulariser."""
    with pytest.raises(ValidationError, match=message):
        gardo_run(entries)


@pytest.mark.parametrize("type_", ["kl", "gated_kl"])
def test_a_divergence_times_the_steps_length_needs_steps(type_: str) -> None:
    """Finished pictures that are noised again have none."""
    entry = {"type": type_, "kind": "no_dt", **({"auxiliaries": ["red"]} if type_ == "gated_kl" else {})}
    with pytest.raises(ValidationError, match=r"has kind no_dt, which needs the steps of a rollout.*use kind: v_mse"):
        gardo_run({"pull": entry}, MATCHING)
    gardo_run({"pull": entry}, RECORDED)
