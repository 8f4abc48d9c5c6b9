"""What the families refuse: folders of another kind, schedulers that mean something else, sizes that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from t2irl import registry
from t2irl.errors import ConfigError, DataError
from t2irl.models.base import ModelFamily
from t2irl.types import TextEmbeds
from tests.families import CASES

Folder = Callable[..., Path]
CPU = torch.device("cpu")


def family(folder: Path, name: str, **changes: Any) -> ModelFamily:
    """A family on the CPU."""
    settings = {**CASES[name].model, "path": folder, **changes}
    config = registry.find("models", settings["type"]).Config.model_validate(settings)
    return registry.build("models", config, CPU)


def edit(file: Path, **changes: Any) -> None:
    """Change a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def put_scheduler(folder: Path, kind: type) -> None:
    """Another scheduler."""
    kind().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", kind.__name__])


def set_schedule(folder: Path, **changes: Any) -> None:
    """Change the scheduler's settings."""
    edit(folder / "scheduler/scheduler_config.json", **changes)


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "another pipeline": ("flux_dev", lambda f: edit(f / "model_index.json", _class_name="SanaPipeline"), "holds a SanaPipeline, but model.type: flux needs a FluxPipeline"),
    "no tokenizer": ("qwen_image", lambda f: shutil.rmtree(f / "tokenizer"), "the folder tokenizer"),
    "no weights": ("sdxl", lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "does not load"),
    "flux with heun": ("flux_dev", lambda f: put_scheduler(f, FlowMatchHeunDiscreteScheduler), "FlowMatchHeunDiscreteScheduler; use FlowMatchEulerDiscreteScheduler"),
    "sd with flow": ("sd15", lambda f: put_scheduler(f, FlowMatchEulerDiscreteScheduler), "FlowMatchEulerDiscreteScheduler; use DDIMScheduler or EulerDiscreteScheduler"),
    "pictures predicted": ("sd21", lambda f: set_schedule(f, prediction_type="sample"), "prediction_type 'sample' is not supported; known: epsilon, v_prediction"),
    "noise from pure noise": ("sd21", lambda f: set_schedule(f, prediction_type="epsilon", rescale_betas_zero_snr=True), "set it to false"),
    "karras": ("sdxl", lambda f: set_schedule(f, use_karras_sigmas=True), "sets use_karras_sigmas, which is not supported; set it to false"),
    "thresholding": ("sd21", lambda f: set_schedule(f, thresholding=True), "sets thresholding"),
    "stochastic": ("z_image", lambda f: set_schedule(f, stochastic_sampling=True), "sets stochastic_sampling"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_named(tiny_folder: Folder, tmp_path: Path, case: str) -> None:
    name, spoil, words = BAD[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(name), folder)
    family(folder, name)
    spoil(folder)
    with pytest.raises(DataError) as caught:
        family(folder, name)
    assert str(caught.value).startswith(f"model.path = {folder}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "asked", "use"),
    [
        ("flux_dev", 18, 16),
        ("qwen_image", 1, 4),
        ("sdxl", 17, 16),
        ("sd15", 30, 32),
        ("z_image", 7, 8),
        ("flux2_klein", 6, 8),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tiny_folder: Folder, name: str, asked: int, use: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.resolution = {asked}: must be a multiple of 4; use {use}"):
        family(tiny_folder(name), name, resolution=asked)
    assert family(tiny_folder(name), name, resolution=use).latent_shape[1] in (use // 2, use // 4)


def test_a_distilled_klein_refuses_guidance(tiny_folder: Folder) -> None:
    model = family(tiny_folder("flux2_klein", distilled=True), "flux2_klein")
    text, latents = model.text(["a red circle"]), torch.zeros(1, *model.latent_shape)
    with torch.no_grad():
        assert bool(model.velocity(latents, torch.ones(1), text, None, 1).isfinite().all())
        with pytest.raises(ConfigError, match=r"rollout\.guidance_scale = 2: .* is distilled; use 1"):
            model.velocity(latents, torch.ones(1), text, text, 2)


def test_texts_of_different_lengths() -> None:
    """Rows are padded to the longest when they meet, and lose what nobody needs when they part."""

    def of(*lengths: int) -> TextEmbeds:
        longest = max(lengths)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        tokens = (
            torch.randn(len(lengths), longest, 3, generator=torch.Generator().manual_seed(longest)) * mask[..., None]
        )
        return TextEmbeds(tokens, tokens.new_empty(len(lengths), 0), mask)

    both = TextEmbeds.cat([of(2), of(5, 3)])
    assert both.mask is not None
    assert both.tokens.shape == (3, 5, 3)
    assert both.mask.sum(1).tolist() == [2, 5, 3]
    assert torch.equal(both.tokens[0, :2], of(2).tokens[0])
    assert not both.tokens[0, 2:].any()
    parted = TextEmbeds.cat([both[[0, 2]]])
    assert torch.equal(parted.tokens, both.tokens[[0, 2], :3])
    assert torch.equal(both[1:2].trimmed().tokens, both.tokens[1:2])
    half = both.to(torch.float16)
    assert half.tokens.dtype == torch.float16
    assert half.mask is not None and half.mask.dtype == torch.bool
    plain = TextEmbeds(torch.ones(2, 4, 3), torch.ones(2, 1))
    assert plain.trimmed() is plain
    assert TextEmbeds.cat([plain, plain]).mask is None
