"""The result of a run as diffusers loads it, proven by loading it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2irl.config import Lora, Run
from t2irl.errors import RunError
from t2irl.models.base import DTYPES
from t2irl.policy import Policy
from t2irl.rollout import Noise, rollout
from t2irl.types import PromptGroups

SHARE, FLOOR = 0.25, 1e-4
"""The exported picture may differ from the policy's by this share of what training changed, plus this much of the brightness
range (a fortieth of a grey level, so that a training without visible effect proves nothing and is not refused)."""


@dataclass(frozen=True)
class Exported:
    """What was written and how it was proven."""

    file: str
    """Path within the run folder."""
    max_difference_to_policy: float
    """Largest pixel difference between the trained policy and a fresh pipeline with the file, [0, 1]."""
    difference_to_base: float
    """The same between that pipeline and the base model."""
    snippet: str
    """Python that draws a picture with the file."""


def lora_weights(policy: Policy) -> dict[str, Tensor]:
    """Adapter weights by diffusers' names, with the scale alpha / rank folded into B.

    Loaders disagree on where they read alpha from; with the scale in the weights every one of them gets it right.
    """
    assert isinstance(policy.tune, Lora)
    scale = policy.tune.alpha / policy.tune.rank
    weights = {}
    for name, tensor in policy.weights().items():
        tensor = tensor.float()
        weights[name.replace(".default.", ".")] = tensor * scale if ".lora_B." in name else tensor.clone()
    return weights


def export(policy: Policy, run: Run, folder: Path, prompt: str, name: str = "export") -> Exported:
    """Write the averaged weights to `folder`/`name` and prove them with one picture of `prompt`.

    LoRA gives one safetensors file, full fine-tuning a `transformer/` folder. Raises RunError when a fresh pipeline
    with the file does not draw the policy's picture.
    """
    out, sampling, family = folder / name, run.rollout, policy.family
    groups, noise = PromptGroups.of([prompt], [0], [0]), Noise(run.seed, "export")
    latents = noise.draw(groups, 1, family.latent_shape)[:, 0]
    with policy.averaged():
        target = _write(policy, run, out)
        ours = _picture(policy, run, groups, noise)
    with policy.reference():
        ours_base = _picture(policy, run, groups, noise)
    theirs, theirs_base = (
        family.sample_pipeline(file, prompt, latents, sampling.steps, sampling.guidance_scale, sampling.negative_prompt)
        for file in (target, None)
    )
    _prove(target, ours, ours_base, theirs, theirs_base)
    snippet = family.loading_snippet(target, prompt, sampling.steps, sampling.guidance_scale, sampling.negative_prompt)
    to_policy, to_base = (float((theirs - x).abs().max()) for x in (ours, theirs_base))
    result = Exported(str(target.relative_to(folder)), to_policy, to_base, snippet)
    (out / "README.md").write_text(_card(run, result), encoding="utf-8")
    return result


def _write(policy: Policy, run: Run, out: Path) -> Path:
    """The trained weights as they are now, in the format of the family's pipelines; returns the file or folder."""
    if policy.tune.type == "full":
        return policy.family.save_denoiser(out, *([policy.weights()] if policy.company else ()))
    dtype = DTYPES[run.model.precision]
    target = policy.family.save_lora(out, {k: v.to(dtype) for k, v in lora_weights(policy).items()})
    _annotate(target, run)
    return target


def _prove(target: Path, ours: Tensor, ours_base: Tensor, theirs: Tensor, theirs_base: Tensor) -> None:
    """Raise RunError unless the file's picture is the policy's.

    In 16 bits a pipeline and the policy round differently, and many steps magnify that. How much is seen on the base
    model, where nothing else can differ; more than three times that, and more than a small share of what training
    changed, is an error of the file.
    """
    error, rounding = _distance(ours, theirs), _distance(ours_base, theirs_base)
    effect = _distance(ours, ours_base)
    if error <= 3 * rounding + SHARE * effect + FLOOR:
        return
    found = "has no effect" if _distance(theirs, theirs_base) < SHARE * effect else "does not reproduce the policy"
    raise RunError(
        f"the exported {target} {found}: its picture differs from the policy's by {error:.2g} on average, the base model's "
        f"by {effect:.2g} (of 1; rounding explains {rounding:.2g}). The checkpoints hold the trained weights"
    )


def _distance(a: Tensor, b: Tensor) -> float:
    """Mean absolute pixel difference, in [0, 1]."""
    return float((a - b).abs().mean())


def _picture(policy: Policy, run: Run, groups: PromptGroups, noise: Noise) -> Tensor:
    """The policy's own deterministic picture, (3, H, W) float32 in [0, 1] on the CPU."""
    final = rollout(policy, groups, policy.family.levels(run.rollout.steps), range(0), noise, 1).final
    with torch.no_grad():
        return policy.family.decode(final)[0].cpu()


def _annotate(file: Path, run: Run) -> None:
    """Put the base model and the config into the safetensors metadata."""
    with safe_open(file, "pt") as handle:
        tensors, metadata = {k: handle.get_tensor(k) for k in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
    metadata |= {"base_model": str(run.model.path), "t2irl_config": json.dumps(run.model_dump(mode="json"))}
    save_file(tensors, file, metadata)


def _card(run: Run, result: Exported) -> str:
    rewards = ", ".join(f"{name} ({config.type}, weight {config.weight:g})" for name, config in run.rewards.items())
    tuning = "lora" if run.policy.tune.type == "lora" else "full-fine-tuning"
    return (
        f"---\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [text-to-image, {tuning}, t2irl]\n---\n\n"
        f"# Fine-tuned {run.model.path.name}\n\nTrained with {run.algorithm.type} on: {rewards}. "
        f"{run.iterations} iterations of {run.rollout.prompts} prompts x {run.rollout.group_size} images.\n\n"
        f"```python\n{result.snippet}\n```\n\n"
        f"Checked after training: largest pixel difference to the policy {result.max_difference_to_policy:.2g}, "
        f"to the base model {result.difference_to_base:.2g} (pixels in [0, 1]).\n"
    )


def as_dict(result: Exported) -> dict[str, object]:
    """For summary.json."""
    return asdict(result)
