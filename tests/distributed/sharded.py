"""What every process does where weights are spread over them; started as `tests.distributed.worker` is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2irl import registry
from t2irl.batches import updates
from t2irl.config import Run
from t2irl.errors import RunError
from t2irl.monitor import UpdateLog
from t2irl.policy import Policy
from t2irl.regularizers.base import Regularizer
from t2irl.rollout import Noise, rollout
from t2irl.sharding import local, whole
from t2irl.train import Parts, update_policy
from t2irl.types import MicroBatch, Prediction, PromptGroups
from t2irl.utils import distributed
from tests.distributed.worker import CPU, main, one_image
from tests.families import CASES
from tests.invariants.test_gardo import GATE, RECORDED, SLOW, gardo_run, scored
from tests.invariants.toy import PROMPTS, toy_parts, toy_run

HERE = "tests.distributed.sharded"
FAMILIES = ("sd3", "flux_dev", "sd15", "qwen_image", "sana", "z_image", "flux2_klein")
"""Cases of `tests.families`, one for each kind of denoiser."""


class Extra(Regularizer):
    """One more call with gradient for every third image, so that some micro-batches make it and others do not."""

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """Mean square of the unguided velocity elsewhere."""
        rows = batch.image % 3 == 0
        if not bool(rows.any()):
            return None
        return (
            policy.velocity(-batch.x[rows], batch.t[rows], batch.text[rows]).square().mean((1, 2, 3)).sum()
            * batch.share
        )


def spread() -> bool:
    """Whether to: with one process the same scenario is what the others should equal."""
    return distributed.world_size() > 1


def snapshot(parts: Parts) -> dict[str, Tensor]:
    """The saved weights, whole, on the main process."""
    return {name: tensor.clone() for name, tensor in parts.policy.state_dict().items()}


def learn(run: Run, iterations: int = 3) -> dict[str, Any]:
    """Iterations of the loop: weights after every update, metrics, and what a checkpoint would hold in the end."""
    parts = toy_parts(run, sharded=spread())
    found: dict[str, Any] = {"weights": [], "metrics": [], "held": []}
    for _ in range(iterations):
        advantages, rolled = scored(run, parts)
        for regularizer in parts.regularizers.values():
            advantages = regularizer.shape(advantages, rolled)
        log = UpdateLog(CPU)
        for images in updates(rolled.trajectory, advantages, parts.geometry, run.seed, rolled.iteration, False):
            found["held"].append(len(images))
            update_policy(run, parts, images, rolled.trajectory.levels, log)
            found["weights"].append(snapshot(parts))
        own = {f"{name}/{k}": v for name, r in parts.regularizers.items() for k, v in r.metrics().items()}
        found["metrics"].append(log.metrics() | own)
        parts.clock.iteration += 1
    found["state"] = parts.state_dict()
    found["work"] = dict(parts.family.work)
    found["sizes"] = [[local(t).numel(), t.numel()] for t in _resident(parts)]
    return found


def _resident(parts: Parts) -> list[Tensor]:
    """Every tensor that full fine-tuning multiplies: weights, their copies, moments."""
    policy = parts.policy
    copies = [*policy.snapshots.values(), policy.average or {}, policy._initial or {}]
    moments = [t for state in parts.optimizer.adamw.state.values() for t in (state["exp_avg"], state["exp_avg_sq"])]
    return [*policy.family.denoiser.parameters(), *(t for copy in copies for t in copy.values()), *moments]


def lora() -> dict[str, Any]:
    """Adapters, with a divergence from the reference policy, which is the denoiser without them."""
    return learn(_run({"type": "lora", "rank": 4, "alpha": 8}))


def full() -> dict[str, Any]:
    """All weights, with divergences from two copies of them."""
    return learn(_run({"type": "full"}))


def _run(tune: dict[str, Any], **changes: Any) -> Run:
    return toy_run(
        {
            "policy": {"tune": tune},
            "rollout": {"prompts": 6, "window": {"type": "fixed", "start": 0, "size": 3}, "guidance_scale": 2.0},
            "speed": {"guidance_in_one_call": False},
            "regularizers": {
                "kl": {"type": "kl", "kind": "v_mse", "coefficient": 0.1},
                "slow": {"type": "kl", "kind": "v_mse", "coefficient": 0.1, "anchor": "average"},
                "extra": {"type": f"{HERE}:Extra"},
            },
            "update": {"per_iteration": 4, "batch_size": 2},
            "optimizer": {"lr": 0.05, "eps": 0.01, "max_grad_norm": 0.5},
            **changes,
        }
    )


def guards() -> dict[str, Any]:
    """A gate that opens for few images, measured to a copy that is renewed."""
    gate = {**GATE, "normaliser": "gated", "adapt": {"window": 1, "warmup": 1}}
    run = gardo_run({"gate": gate, "slow": SLOW}, {"prompts": 5, **RECORDED}, policy={"tune": {"type": "full"}})
    return learn(run.model_copy(update={"update": run.update.model_copy(update={"batch_size": 2})}))


def lonely() -> dict[str, Any]:
    """One image of the iteration carries signal: the other process has no call of its own to make."""
    run = _run({"type": "full"}, regularizers={}, update={"per_iteration": 2, "batch_size": 1})
    parts = toy_parts(run, sharded=spread())
    return {**one_image(run, parts), "weights": snapshot(parts)}


def alone() -> dict[str, Any]:
    """The main process draws with other weights and puts weights together, while the others do nothing; then one fails."""
    run = _run({"type": "full"})
    parts = toy_parts(run, sharded=spread())
    policy, found = parts.policy, {}
    with torch.no_grad():
        for parameter in policy.trained.values():
            local(parameter).add_(0.05)
    policy.take_snapshot("moved")
    groups = PromptGroups.of(PROMPTS, [0, 1, 2], [0, 0, 0])

    def picture() -> Tensor:
        return rollout(policy, groups, parts.family.levels(4), range(0), Noise(0, "grid"), 2).final

    if distributed.rank() == 0:
        found["trained"] = picture()
        with policy.averaged():
            found["average"], found["weights"] = picture(), policy.weights()
            with policy.reference():
                found["reference"] = picture()
            with policy.at("moved"):
                found["moved"] = picture()
            found["average again"] = picture()
    distributed.barrier()
    found["everyone"] = picture()
    try:
        with distributed.together(CPU):
            if distributed.rank() == 0:
                picture()
                raise ValueError("no more ink")
    except (ValueError, RunError) as error:
        found["failed"] = str(error)
    return found


def state() -> dict[str, Any]:
    """What is saved fits one process and many: a run goes on from its own checkpoint as if it had not stopped."""
    run = _run({"type": "full"})
    first, second = toy_parts(run, sharded=spread()), toy_parts(run, sharded=False)
    found: dict[str, Any] = {}
    for _ in range(2):
        saved = distributed.gather_objects((snapshot(first), first.state_dict()))[0]  # as read from a file
        second.policy.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
        found["unspread"] = snapshot(second), second.state_dict()["optimizer"]["adamw"]
        found["saved"] = saved[0], saved[1]["optimizer"]["adamw"]
        third = toy_parts(run, sharded=spread())
        third.policy.load_state_dict(saved[0])
        third.load_state_dict(saved[1])
        for parts in (first, third):
            distributed.keep(parts.policy.company)
            parts.clock.update = 0
            _, rolled = scored(run, parts)
            advantages = torch.linspace(-1, 1, len(rolled.trajectory.groups))
            for images in updates(rolled.trajectory, advantages, parts.geometry, run.seed, 0, False):
                update_policy(run, parts, images, rolled.trajectory.levels, UpdateLog(CPU))
        with third.policy.restored(saved[0]):
            found["restored"] = snapshot(third)
        found["both"] = snapshot(first), snapshot(third)
    return found


def scaled() -> dict[str, Any]:
    """Loss scaling: an infinite gradient in one process's part makes all of them skip the step."""
    run = _run({"type": "full"}, regularizers={}, model={"type": "tests.invariants.toy:ToyFamily", "precision": "fp16"})
    parts = toy_parts(run, sharded=spread())
    before, scales = snapshot(parts), []
    for bad in (True, False):
        parts.optimizer.scaler.scale(torch.zeros(1))
        for place, parameter in enumerate(parts.policy.trained.values()):
            parameter.grad = torch.ones_like(parameter)
            if bad and place == 0 and distributed.rank() == 0:
                local(parameter.grad)[0] = torch.inf
        parts.optimizer.step(parts.clock)
        scales.append(parts.optimizer.scaler.get_scale())
        before = [before, snapshot(parts)] if bad else [*before, snapshot(parts)]  # type: ignore[misc]
    return {"weights": before, "scales": scales}


def families() -> dict[str, Any]:
    """Gradients of genuine denoisers, one process calling twice and the other once, and the folder that is exported."""
    with tempfile.TemporaryDirectory() as own:
        folder = Path(distributed.gather_objects(own)[0])
        if distributed.rank() == 0:
            for name in FAMILIES:
                CASES[name].make(folder / name, **CASES[name].settings)
        distributed.barrier()
        found = {name: _family(name, folder / name, {}) for name in FAMILIES}
        found["sd3, checkpointed"] = _family("sd3", folder / "sd3", {"gradient_checkpointing": True})
        found["sd3, bf16"] = _family("sd3", folder / "sd3", {"precision": "bf16"})
        found["sd3, bf16 adapters"] = _family("sd3", folder / "sd3", {"precision": "bf16"}, "lora")
        distributed.barrier()
    return found


def _family(name: str, path: Path, settings: dict[str, Any], tune: str = "full") -> dict[str, Any]:
    case = CASES[name]
    run = toy_run({"model": {**case.model, "path": path, **settings}, "policy": {"tune": {"type": tune}, "ema": None}})
    made = []
    for sharded in (False, spread()):
        family = registry.build("models", run.model, CPU)
        made.append(Policy(run, family, registry.build("dynamics", run.rollout.dynamics), "mean", sharded))
    one, many = made
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(one.trained.items()):
            if "lora_B" in name:  # zero at first, and with it the gradient of A
                value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
                one.load_state_dict({**one.state_dict(), f"trained.{name}": value})
        many.load_state_dict(one.state_dict())
    x = torch.randn(3, *one.family.latent_shape, generator=generator)
    t = torch.full((3,), 0.7) * one.family.highest_level
    text = ["a red circle", "two small blue squares", "a red circle"]
    for row in range(3):
        one.velocity(x[[row]], t[[row]], one.text([text[row]]), 1.0).square().mean().backward()
    for row in range(distributed.rank(), 3, distributed.world_size()):
        loss = many.velocity(x[[row]], t[[row]], many.text([text[row]]), 1.0).square().mean()
        loss.backward() if many.company is None else many.company.backward(loss)
    distributed.sum_gradients(many.trained.values())
    expected = [p.grad for p in one.trained.values() if p.grad is not None]
    gradients = whole([p.grad for name, p in many.trained.items() if one.trained[name].grad is not None])
    result: dict[str, Any] = {"parts": [[local(p).numel(), p.numel()] for p in many.family.denoiser.parameters()]}
    if distributed.rank() == 0:
        result |= {
            "gradients": torch.cat([g.flatten() for g in gradients]),
            "expected": torch.cat([g.flatten() for g in expected]),
        }
        if tune == "full":
            saved = many.family.save_denoiser(path / "saved", many.weights() if spread() else None)
            fresh: Any = many.family.denoiser_class.from_pretrained(saved)  # type: ignore[attr-defined]
            result["saved"] = all(torch.equal(p, one.trained[n]) for n, p in fresh.named_parameters())
    distributed.barrier()
    return result


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    function.__name__: function for function in (lora, full, guards, lonely, alone, state, scaled, families)
}

if __name__ == "__main__":
    main(SCENARIOS)
