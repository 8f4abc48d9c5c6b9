"""Text cache, guidance, gradient checkpointing and precision of the SD3 family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2irl.models.base import ModelFamily
from t2irl.models.sd3 import SD3
from t2irl.pipelines import family as pipelines
from t2irl.types import TextEmbeds
from tests.invariants.toy import a_batch, toy_parts, toy_run

Folder = Callable[..., Path]
CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a large blue square", "a photo")
LENGTH = 4


def family(folder: Path, **settings: Any) -> SD3:
    """The family on the CPU."""
    return SD3(SD3.Config(path=folder, **{"max_sequence_length": LENGTH, **settings}), CPU)


def inputs(model: ModelFamily, count: int = 3) -> tuple[Tensor, Tensor, TextEmbeds]:
    """Latents, noise levels and text of `count` images."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(count, *model.latent_shape, generator=generator)
    return latents, torch.linspace(1, 0.2, count), model.text(PROMPTS[:count])


# ---------------------------------------------------------------------------------------------------------- text cache
def test_each_prompt_is_encoded_once(sd3_folder: Folder) -> None:
    model = family(sd3_folder())
    first = model.text([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert model.work["encoded_prompts"] == 2
    assert torch.equal(first.tokens[0], first.tokens[2])
    again = model.text([PROMPTS[2], PROMPTS[1]])
    assert model.work["encoded_prompts"] == 3
    assert torch.equal(again.tokens[1], first.tokens[1])
    assert torch.equal(again.pooled, model.encode([PROMPTS[2], PROMPTS[1]]).pooled)


def test_the_cache_forgets_what_was_used_longest_ago(sd3_folder: Folder) -> None:
    model = family(sd3_folder(), text_cache=2)
    a, b, c = PROMPTS
    encoded = []
    for asked in ([a], [b], [a], [c], [a], [b], [c, b, a]):
        before = model.work["encoded_prompts"]
        text = model.text(asked)
        encoded.append(model.work["encoded_prompts"] - before)
        assert torch.equal(text.tokens, model.encode(asked).tokens)
        assert torch.equal(text.pooled, model.encode(asked).pooled)
    # c pushes b out (a was used after it), b then c out; three prompts at once work with room for two.
    assert encoded == [1, 1, 0, 1, 0, 1, 1]


def test_no_cache(sd3_folder: Folder) -> None:
    model = family(sd3_folder(), text_cache=0)
    for _ in range(2):
        text = model.text([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
        assert torch.equal(text.tokens, model.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]]).tokens)
    assert model.work["encoded_prompts"] == 4


# ------------------------------------------------------------------------------------------------------------ guidance
def test_guidance_is_one_call_of_twice_the_images(sd3_folder: Folder) -> None:
    model = family(sd3_folder())
    latents, t, text = inputs(model)
    null = model.text([""])
    with torch.no_grad():
        conditional, free = model.denoise(latents, t, text), model.denoise(latents, t, null[[0, 0, 0]])
        model.work.clear()
        guided = model.velocity(latents, t, text, null, 4.5)
        assert model.work["denoiser_forward_calls"] == 1
        assert model.work["denoiser_forward_images"] == 6
        torch.testing.assert_close(guided, free + 4.5 * (conditional - free), rtol=1e-4, atol=1e-5)
        assert float((guided - conditional).abs().max()) > 1e-2
        assert torch.equal(model.velocity(latents, t, text, null, 1.0), conditional)
        assert model.work["denoiser_forward_images"] == 9


def test_pictures_are_decoded_in_parts_of_bounded_size(sd3_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(sd3_folder())
    latents = inputs(model)[0]
    sizes: list[int] = []
    model.pipe.vae.decoder.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    with torch.no_grad():
        whole = model.decode(latents)
        monkeypatch.setattr(pipelines, "PIXELS_AT_ONCE", 2 * 16 * 16)
        parts = model.decode(latents)
    assert sizes == [3, 2, 1]
    assert whole.shape == (3, 3, 16, 16)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------- gradient checkpointing
def gradients(folder: Path, checkpointing: bool) -> tuple[list[Tensor], int]:
    """Gradients of all weights for a scalar of the velocity, and how often the first block ran."""
    model = family(folder, gradient_checkpointing=checkpointing)
    model.denoiser.requires_grad_(True)
    calls: list[int] = []
    model.denoiser.transformer_blocks[0].attn.register_forward_pre_hook(lambda module, given: calls.append(1))
    latents, t, text = inputs(model)
    model.velocity(latents, t, text, model.text([""]), 2.0).square().mean().backward()
    assert model.work["denoiser_backward_images"] == model.work["denoiser_forward_images"] == 6
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.denoiser.parameters()], len(calls)


@pytest.mark.parametrize("settings", [{}, {"qk_norm": "rms_norm", "dual_attention": (0,)}], ids=["sd3", "sd3.5"])
def test_gradient_checkpointing_gives_the_same_gradients(sd3_folder: Folder, settings: dict[str, Any]) -> None:
    folder = sd3_folder(**settings)
    (plain, ran), (frugal, ran_twice) = gradients(folder, False), gradients(folder, True)
    assert (ran, ran_twice) == (1, 2)
    assert sum(bool(g.any()) for g in plain) > 0.9 * len(plain)
    for a, b in zip(plain, frugal, strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_sixteen_bits(sd3_folder: Folder, precision: str, tune: str) -> None:
    """Frozen weights and text have 16 bits; trained weights, velocities, log-densities, gradients and pictures 32."""
    folder, half = sd3_folder(t5=True), {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    rank = {"rank": 4, "alpha": 8} if tune == "lora" else {}
    changes = {
        "model": {"type": "sd3", "path": folder, "max_sequence_length": LENGTH, "precision": precision},
        "policy": {"tune": {"type": tune, **rank}}, "rollout": {"prompts": 2, "group_size": 2, "batch_size": 4},
    }  # fmt: skip
    run = toy_run(changes)
    policy = toy_parts(run).policy
    model, names = policy.family, set(policy.trained)
    for name, parameter in model.denoiser.named_parameters():
        assert parameter.dtype == (torch.float32 if name in names else half), name
    assert next(model.pipe.text_encoder_3.parameters()).dtype == half
    assert model.pipe.vae.dtype == torch.float32
    assert model.text(["a red circle"]).tokens.dtype == model.text(["a red circle"]).pooled.dtype == half
    batch = a_batch(run, toy_parts(run))
    prediction = policy.predict(batch)
    assert prediction.velocity.dtype == prediction.log_prob.dtype == batch.x.dtype == torch.float32
    prediction.log_prob.sum().backward()
    assert {p.grad.dtype for p in policy.trained.values() if p.grad is not None} == {torch.float32}
    exact = family(folder).velocity(batch.x, batch.t, family(folder).text(["a red circle"] * len(batch.t)), None, 1)
    close = model.velocity(batch.x, batch.t, policy.text(["a red circle"] * len(batch.t)), None, 1)
    error = ((close - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 0.03
    pictures = model.decode(batch.x)
    assert pictures.dtype == torch.float32
    assert torch.equal(pictures, family(folder).decode(batch.x))


def test_decoder_of_sixteen_bits(sd3_folder: Folder) -> None:
    folder = sd3_folder()
    model, exact = family(folder, vae_precision="bf16"), family(folder)
    assert model.pipe.vae.dtype == torch.bfloat16
    assert model.denoiser.dtype == torch.float32
    latents = inputs(model)[0]
    found, expected = model.decode(latents), exact.decode(latents)
    assert found.dtype == torch.float32
    assert 1e-5 < float((found - expected).abs().mean()) < 0.02
