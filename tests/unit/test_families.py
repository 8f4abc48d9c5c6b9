"""Model families against the stock pipelines of diffusers, on tiny checkpoints in the genuine format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from t2irl.check import read_folder
from t2irl.errors import ConfigError
from t2irl.policy import Policy
from t2irl.rollout import Noise, rollout
from t2irl.types import PromptGroups
from tests.families import CASES
from tests.invariants.toy import toy_parts, toy_run

Folder = Callable[..., Path]
PROMPTS = ("a red circle", "a large blue square on the night sky")
UNWANTED = "two green triangles"
STEPS = 4
SIDE = {"sana": 32}
"""Of a picture, if not 16."""
NEW = [name for name in CASES if name != "sd3"]


def policy(folder: Path, name: str, guidance: float = 1.0, negative: str = UNWANTED, **model: Any) -> Policy:
    """A policy of all weights, so that nothing is added to the denoiser."""
    settings = {**CASES[name].model, "path": folder, **model}
    sampling = {"guidance_scale": guidance, "negative_prompt": negative}
    return toy_parts(toy_run({"model": settings, "rollout": sampling, "policy": {"tune": {"type": "full"}}})).policy


def stock(folder: Path, name: str) -> Any:
    """The pipeline as anyone loads it; Stable Diffusion 1.5 and Sana with a scheduler of single steps for their own."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    if name == "sd15":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if name == "sana":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guided(pipe: Any, name: str, guidance: float, negative: str, count: int = 1) -> dict[str, Any]:
    """The stock pipeline's arguments for classifier-free guidance, written out for each family."""
    unwanted = {} if guidance == 1 else {"negative_prompt": [negative] * count if count > 1 else negative}
    if name.startswith("flux_"):
        dev = {"guidance_scale": 2.5} if name == "flux_dev" else {}
        return {"true_cfg_scale": guidance, "max_sequence_length": 12, **dev, **unwanted}
    if name == "qwen_image":
        return {"true_cfg_scale": guidance, **unwanted}
    if name == "sana":
        return {"guidance_scale": guidance, "max_sequence_length": 24, "use_resolution_binning": False, **unwanted}
    if name == "z_image":
        return {"guidance_scale": guidance - 1, **unwanted}
    if name == "flux2_klein":
        embeds = pipe.encode_prompt([negative] * count, max_sequence_length=24)[0]
        unwanted = {"negative_prompt_embeds": embeds} if unwanted else {}
        return {"guidance_scale": guidance, "max_sequence_length": 24, **unwanted}
    return {"guidance_scale": guidance, **unwanted}


def sample(drawer: Policy, groups: PromptGroups, steps: int = STEPS) -> tuple[Tensor, Tensor, Tensor]:
    """Initial noise, final latents and uint8 pictures of the deterministic rollout."""
    noise = Noise(3, "grid")
    made = rollout(drawer, groups, drawer.family.levels(steps), range(0), noise, len(groups))
    return noise.draw(groups, 1, drawer.family.latent_shape)[:, 0], made.final, made.images


def assert_near(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("other_size", "guidance"), [(False, 3.0), (True, 1.0)])
@pytest.mark.parametrize("name", NEW)
def test_rollout_is_the_stock_pipelines(tiny_folder: Folder, name: str, other_size: bool, guidance: float) -> None:
    folder = tiny_folder(name)
    size = SIDE.get(name, 16) * (2 if other_size else 1)
    drawer, pipe = policy(folder, name, guidance, resolution=size), stock(folder, name)
    latents, final, images = sample(drawer, PromptGroups.of(PROMPTS, [0], [0]))
    arguments = {
        "latents": drawer.family.pack(latents), "num_inference_steps": STEPS, "height": size, "width": size,
        **guided(pipe, name, guidance, UNWANTED),
    }  # fmt: skip
    theirs = drawer.family.unpack(pipe(prompt=PROMPTS[0], output_type="latent", **arguments).images)
    assert final.shape == theirs.shape
    assert_near(final, theirs)
    picture = pipe(prompt=PROMPTS[0], output_type="pt", **arguments).images[0]
    torch.testing.assert_close(drawer.family.decode(final)[0], picture, rtol=0, atol=1e-5)
    assert images.shape == (1, 3, size, size)
    assert float(picture.std()) > 0.01
    changed = {**arguments, **guided(pipe, name, guidance, PROMPTS[1])}
    other = drawer.family.unpack(pipe(prompt=PROMPTS[0], output_type="latent", **changed).images)
    assert torch.equal(other, theirs) == (guidance == 1)


@pytest.mark.parametrize("name", NEW)
def test_a_batch_of_prompts_is_the_stock_pipelines(tiny_folder: Folder, name: str) -> None:
    """Prompts of different lengths, one of them twice; the unconditional branch is one for all."""
    folder = tiny_folder(name)
    drawer, pipe = policy(folder, name, 3.0), stock(folder, name)
    groups = PromptGroups.of(PROMPTS, [0, 1, 1], [0, 0, 1])
    latents, final, _ = sample(drawer, groups)
    theirs = pipe(
        prompt=groups.texts, latents=drawer.family.pack(latents), num_inference_steps=STEPS, height=SIDE.get(name, 16), width=SIDE.get(name, 16),
        output_type="latent", **guided(pipe, name, 3.0, UNWANTED, len(groups)),
    ).images  # fmt: skip
    assert_near(final, drawer.family.unpack(theirs))
    assert float((final[1] - final[2]).abs().max()) > 0.1


@pytest.mark.parametrize("name", NEW)
def test_pictures_survive_the_image_encoder_and_each_prompt_is_encoded_once(tiny_folder: Folder, name: str) -> None:
    """The encoder's latents are in the decoder's scale: one more round changes far less than another scale would."""
    family = policy(tiny_folder(name), name).family
    latents = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(family.from_vae(family.to_vae(latents)), latents, rtol=1e-4, atol=1e-5)
        pictures = family.decode(latents)
        encoded = family.encode_images(pictures)
    networks = {part: network.config for part, network in read_folder(family.config.path).networks.items()}
    sizes = type(family).sizes(family.config, networks)  # what `check` is told
    assert sizes is not None
    assert (sizes.latent, sizes.pixels) == (latents[0].numel(), pictures[0].numel())
    assert encoded.shape == latents.shape
    assert encoded.dtype == torch.float32
    family.work.clear()
    both = family.text([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert family.work["encoded_prompts"] == 2
    assert torch.equal(both.tokens[0], both.tokens[2])
    assert sizes.text >= both.tokens[0].numel()
    again = family.text([PROMPTS[1], PROMPTS[0]])
    assert family.work["encoded_prompts"] == 2
    assert torch.equal(again.tokens, both.tokens[[1, 0]])
    if both.mask is not None:
        assert both.mask.sum(1).tolist() == again.mask.sum(1).tolist()[::-1] + both.mask[2:].sum(1).tolist()
        short = family.text([PROMPTS[0]])
        assert short.tokens.shape[1] == int(both.mask[0].sum()) < both.tokens.shape[1]
        assert not both.tokens[0, short.tokens.shape[1] :].any()


SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim to 0": ("sd21", {"set_alpha_to_one": True}),
    "ddim of noise": ("sd21", {"prediction_type": "epsilon"}),
    "ddim trailing": ("sd21", {"timestep_spacing": "trailing"}),
    "ddim from pure noise": ("sd21", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    "v with pndm": ("sd15", {"prediction_type": "v_prediction"}),
    "euler trailing": ("sdxl", {"timestep_spacing": "trailing"}),
    "euler linspace": ("sdxl", {"timestep_spacing": "linspace"}),
    "euler of v": ("sdxl", {"prediction_type": "v_prediction"}),
    "euler to the first": ("sdxl", {"final_sigmas_type": "sigma_min"}),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedules_of_discrete_timesteps(tiny_folder: Folder, case: str) -> None:
    """Spacing, end, prediction: final latents are the stock pipeline's; 5 steps, so that linspace has fractions."""
    name, changes = SCHEDULES[case]
    folder = tiny_folder(name, **changes)
    drawer, pipe = policy(folder, name, 2.0), stock(folder, name)
    latents, final, _ = sample(drawer, PromptGroups.of(PROMPTS, [0], [0]), 5)
    theirs = pipe(
        prompt=PROMPTS[0],
        latents=latents,
        num_inference_steps=5,
        output_type="latent",
        **guided(pipe, name, 2.0, UNWANTED),
    ).images
    levels = drawer.family.levels(5)
    assert bool((levels.diff() < 0).all())
    assert (levels[0] == 1) == (case == "ddim from pure noise")
    assert (levels[-1] == 0) == ((name == "sdxl" and case != "euler to the first") or case == "ddim to 0")
    assert_near(final, theirs)


def test_timesteps_of_the_schedule_are_whole(tiny_folder: Folder) -> None:
    """Each of the 1000 levels gives its own timestep to the bit; between two it lies between."""
    for name in ("sd15", "sd21", "sdxl"):
        family = policy(tiny_folder(name), name).family
        assert torch.equal(family.timestep(family.table), torch.arange(1000.0))
        between = family.timestep((family.table[1:] + family.table[:-1]) / 2) - torch.arange(999.0)
        assert bool(((between > 0.2) & (between < 0.8)).all())
        assert family.highest_level == float(family.table[-1]) == pytest.approx(0.936, abs=1e-3)


def test_an_empty_negative_prompt_of_sdxl_is_zeros(tiny_folder: Folder) -> None:
    """As a call of the stock pipeline without one."""
    folder = tiny_folder("sdxl")
    drawer, pipe = policy(folder, "sdxl", 3.0, negative=""), stock(folder, "sdxl")
    latents, final, _ = sample(drawer, PromptGroups.of(PROMPTS, [0], [0]))
    common = {"latents": latents, "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    assert_near(final, pipe(prompt=PROMPTS[0], **common).images)
    assert float((final - pipe(prompt=PROMPTS[0], negative_prompt="", **common).images).abs().max()) > 1e-2


def test_the_instruction_of_qwen_image_is_dropped(tiny_folder: Folder) -> None:
    """Tokens are the prompt's and the end of the conversation; the 34 of the instruction are not there."""
    family = policy(tiny_folder("qwen_image"), "qwen_image").family
    pipe = family.pipe
    whole = pipe.tokenizer(pipe.prompt_template_encode.format(PROMPTS[0]), return_tensors="pt").input_ids
    text = family.text([PROMPTS[0]])
    assert text.tokens.shape[1] == whole.shape[1] - 34
    cut = policy(tiny_folder("qwen_image"), "qwen_image", max_sequence_length=5).family.text([PROMPTS[0]])
    assert torch.equal(cut.tokens, text.tokens[:, :5])


def test_two_kinds_of_guidance_of_flux(tiny_folder: Folder) -> None:
    """The embedded one is an input of dev and refused for schnell; the other is classifier-free."""
    folder = tiny_folder("flux_dev")
    groups = PromptGroups.of(PROMPTS, [0], [0])
    final = {g: sample(policy(folder, "flux_dev", embedded_guidance=g), groups)[1] for g in (None, 2.5, 3.5)}
    assert torch.equal(final[None], final[3.5])
    assert float((final[2.5] - final[3.5]).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match=r"model\.embedded_guidance = 2\.5: .* takes no guidance as input"):
        policy(tiny_folder("flux_schnell"), "flux_schnell", embedded_guidance=2.5)
