"""Model families against the stock pipelines of diffusers, on tiny checkpoints in the genuine format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from t2irl.policy import Policy
from t2irl.rollout import Noise, rollout
from t2irl.types import PromptGroups
from tests.families import CASES
from tests.invariants.toy import toy_parts, toy_run

Folder = Callable[..., Path]
PROMPTS = ("a red circle", "a large blue square on the night sky")
UNWANTED = "two green triangles"
STEPS = 4
NEW = [name for name in CASES if name != "sd3"]


def policy(folder: Path, name: str, guidance: float = 1.0, negative: str = UNWANTED, **model: Any) -> Policy:
    """A policy of all weights, so that nothing is added to the denoiser."""
    settings = {**CASES[name].model, "path": folder, **model}
    sampling = {"guidance_scale": guidance, "negative_prompt": negative}
    return toy_parts(toy_run({"model": settings, "rollout": sampling, "policy": {"tune": {"type": "full"}}})).policy


def stock(folder: Path, name: str) -> Any:
    """The pipeline as anyone loads it; Stable Diffusion 1.5 with the DDIM scheduler for its own multistep one."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    if name == "sd15":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guided(name: str, guidance: float, negative: str, count: int = 1) -> dict[str, Any]:
    """The stock pipeline's arguments for classifier-free guidance, written out for each family."""
    unwanted = {} if guidance == 1 else {"negative_prompt": [negative] * count if count > 1 else negative}
    if name.startswith("flux"):
        dev = {"guidance_scale": 2.5} if name == "flux_dev" else {}
        return {"true_cfg_scale": guidance, "max_sequence_length": 12, **dev, **unwanted}
    if name == "qwen_image":
        return {"true_cfg_scale": guidance, **unwanted}
    return {"guidance_scale": guidance, **unwanted}


def sample(drawer: Policy, groups: PromptGroups, steps: int = STEPS) -> tuple[Tensor, Tensor, Tensor]:
    """Initial noise, final latents and uint8 pictures of the deterministic rollout."""
    noise = Noise(3, "grid")
    made = rollout(drawer, groups, drawer.family.levels(steps), range(0), noise, len(groups))
    return noise.draw(groups, 1, drawer.family.latent_shape)[:, 0], made.final, made.images


def assert_near(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("resolution", [None, 24])
@pytest.mark.parametrize("name", NEW)
def test_rollout_is_the_stock_pipelines(
    tiny_folder: Folder, name: str, resolution: int | None, guidance: float
) -> None:
    folder = tiny_folder(name)
    drawer, pipe = (
        policy(folder, name, guidance, **({"resolution": resolution} if resolution else {})),
        stock(folder, name),
    )
    latents, final, images = sample(drawer, PromptGroups.of(PROMPTS, [0], [0]))
    size = resolution or 16
    arguments = {
        "latents": drawer.family.pack(latents), "num_inference_steps": STEPS, "height": size, "width": size,
        **guided(name, guidance, UNWANTED),
    }  # fmt: skip
    theirs = drawer.family.unpack(pipe(PROMPTS[0], output_type="latent", **arguments).images)
    assert final.shape == theirs.shape
    assert_near(final, theirs)
    picture = pipe(PROMPTS[0], output_type="pt", **arguments).images[0]
    torch.testing.assert_close(drawer.family.decode(final)[0], picture, rtol=0, atol=1e-5)
    assert images.shape == (1, 3, size, size)
    assert float(picture.std()) > 0.01
    changed = {**arguments, **guided(name, guidance, PROMPTS[1])}
    other = drawer.family.unpack(pipe(PROMPTS[0], output_type="latent", **changed).images)
    assert torch.equal(other, theirs) == (guidance == 1)
