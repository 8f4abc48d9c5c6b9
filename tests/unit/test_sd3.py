"""The SD3 family against the stock StableDiffusion3Pipeline, and every folder that it must refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from t2irl.errors import ConfigError, DataError
from t2irl.models.sd3 import SD3
from t2irl.policy import Policy
from t2irl.rollout import Noise, rollout
from t2irl.types import PromptGroups
from tests.invariants.toy import toy_parts, toy_run
from tests.tiny import CLIP_TOKENS, CLIP_WIDTHS, JOINT_WIDTH

Folder = Callable[..., Path]
CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a large blue square")
UNWANTED = "two green triangles"
SD35 = {"t5": True, "qk_norm": "rms_norm", "dual_attention": (0,)}
LENGTH = 12
STEPS = 4


def family(folder: Path, **settings: Any) -> SD3:
    """The family on the CPU."""
    return SD3(SD3.Config(path=folder, **{"max_sequence_length": LENGTH, **settings}), CPU)


def policy(folder: Path, guidance: float = 1.0, **settings: Any) -> Policy:
    """A policy of all weights, so that nothing is added to the denoiser."""
    model = {"type": "sd3", "path": folder, "max_sequence_length": LENGTH, **settings}
    sampling = {"guidance_scale": guidance, "negative_prompt": UNWANTED}
    return toy_parts(toy_run({"model": model, "rollout": sampling, "policy": {"tune": {"type": "full"}}})).policy


def stock(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline as anyone loads it, who must say which text encoders are not there."""
    index = json.loads((folder / "model_index.json").read_text())
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **{k: None for k, v in index.items() if v == [None, None]})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(drawer: Policy, groups: PromptGroups) -> tuple[Tensor, Tensor, Tensor]:
    """Initial noise, final latents and uint8 pictures of the deterministic rollout."""
    noise = Noise(3, "grid")
    made = rollout(drawer, groups, drawer.family.levels(STEPS), range(0), noise, len(groups))
    return noise.draw(groups, 1, drawer.family.latent_shape)[:, 0], made.final, made.images


# ------------------------------------------------------------------------------------------- parity with the stock code
@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("resolution", [None, 24])
@pytest.mark.parametrize(
    "settings",
    [{}, {"shift": 3.0}, {"dynamic_shift": True}, {"t5": True}, SD35],
    ids=["plain", "shift", "dynamic", "t5", "sd3.5"],
)
def test_rollout_is_the_stock_pipeline_to_the_last_bit(
    sd3_folder: Folder, settings: dict[str, Any], resolution: int | None, guidance: float
) -> None:
    folder = sd3_folder(**settings)
    drawer, pipe = policy(folder, guidance, resolution=resolution), stock(folder)
    latents, final, images = sample(drawer, PromptGroups.of(PROMPTS, [0], [0]))
    size = resolution or pipe.default_sample_size * pipe.vae_scale_factor
    arguments = {
        "latents": latents, "num_inference_steps": STEPS, "guidance_scale": guidance, "negative_prompt": UNWANTED,
        "max_sequence_length": LENGTH, "height": size, "width": size,
    }  # fmt: skip
    theirs = pipe(PROMPTS[0], output_type="latent", **arguments).images
    assert torch.equal(final, theirs)
    picture = pipe(PROMPTS[0], output_type="pt", **arguments).images[0]
    assert torch.equal(drawer.family.decode(final)[0], picture)
    assert torch.equal(images[0], (picture * 255).round().to(torch.uint8))
    assert images.shape == (1, 3, size, size)
    other = pipe(PROMPTS[0], output_type="latent", **{**arguments, "negative_prompt": PROMPTS[1]}).images
    assert torch.equal(other, theirs) == (guidance == 1)


def test_a_batch_of_prompts_is_the_stock_pipelines(sd3_folder: Folder) -> None:
    """To 1e-5: the stock pipeline encodes the prompts together, which rounds differently."""
    folder = sd3_folder(t5=True)
    drawer, pipe = policy(folder, 4.5), stock(folder)
    groups = PromptGroups.of(PROMPTS, [0, 1, 1], [0, 0, 1])
    latents, final, _ = sample(drawer, groups)
    theirs = pipe(
        groups.texts, latents=latents, num_inference_steps=STEPS, guidance_scale=4.5, negative_prompt=[UNWANTED] * 3,
        max_sequence_length=LENGTH, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(final, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert float((final[1] - final[2]).abs().max()) > 0.1


@pytest.mark.parametrize("settings", [{}, {"t5": True}], ids=["clip", "t5"])
def test_encoding_is_the_stock_pipelines(sd3_folder: Folder, settings: dict[str, Any]) -> None:
    folder = sd3_folder(**settings)
    model, pipe = family(folder), stock(folder)
    for prompt in (*PROMPTS, "", "zebra " * 40, "Ωmega\tθ 漢字"):
        with torch.no_grad():
            tokens, _, pooled, _ = pipe.encode_prompt(prompt, None, None, max_sequence_length=LENGTH)
        found = model.encode([prompt])
        assert torch.equal(found.tokens, tokens)
        assert torch.equal(found.pooled, pooled)
    together = model.encode(PROMPTS)
    assert together.tokens.shape == (2, CLIP_TOKENS + LENGTH, JOINT_WIDTH)
    assert torch.equal(together[1:].tokens, model.encode(PROMPTS[1:]).tokens)


@pytest.mark.parametrize(
    "settings", [{}, {"shift": 3.0}, {"dynamic_shift": True}, {"dynamic_shift": True, "shift": 3.0}]
)
def test_levels_are_the_schedulers(sd3_folder: Folder, settings: dict[str, Any]) -> None:
    folder = sd3_folder(**settings)
    for resolution in (None, 32):
        model, pipe = family(folder, resolution=resolution), stock(folder)
        pipe(
            PROMPTS[0],
            num_inference_steps=7,
            guidance_scale=1,
            output_type="latent",
            height=resolution,
            width=resolution,
        )
        levels = model.levels(7)
        assert levels.dtype == torch.float32
        assert levels.shape == (8,)
        assert torch.equal(levels, pipe.scheduler.sigmas)
        torch.testing.assert_close(levels[:-1], pipe.scheduler.timesteps / 1000, rtol=1e-6, atol=0)
        assert levels[-1] == 0
        assert bool((levels.diff() < 0).all())
    moved = not torch.equal(family(folder).levels(7), levels)
    assert moved == ("dynamic_shift" in settings)  # only a dynamic shift depends on the size


def test_schedules_differ(sd3_folder: Folder) -> None:
    """The levels of the settings above are not by chance the same ones."""
    found = [tuple(family(sd3_folder(**s)).levels(7).tolist()) for s in ({}, {"shift": 3.0}, {"dynamic_shift": True})]
    assert len(set(found)) == 3


# ------------------------------------------------------------------------------------------------ missing text encoders
@pytest.mark.parametrize(
    ("drop", "t5"),
    [(("text_encoder",), False), (("text_encoder_2",), True), (("text_encoder", "text_encoder_2"), True)],
    ids=["no CLIP-L", "no CLIP-G", "T5 only"],
)
def test_missing_encoders_give_zeros_of_their_width(sd3_folder: Folder, drop: tuple[str, ...], t5: bool) -> None:
    folder = sd3_folder(drop=drop, t5=t5)
    index = json.loads((folder / "model_index.json").read_text())
    assert all(index[name] == [None, None] for name in drop)
    model, whole = family(folder), family(sd3_folder(t5=t5))
    found, expected = model.encode(PROMPTS[:1]), whole.encode(PROMPTS[:1])
    clip = model.pipe.tokenizer_max_length if len(drop) == 2 else CLIP_TOKENS
    assert found.tokens.shape == (1, clip + LENGTH, JOINT_WIDTH)
    columns = {"text_encoder": slice(0, CLIP_WIDTHS[0]), "text_encoder_2": slice(CLIP_WIDTHS[0], sum(CLIP_WIDTHS))}
    for name, part in columns.items():
        if name in drop:
            assert not found.tokens[:, :clip, part].any()
            assert not found.pooled[:, part].any()
        else:
            assert torch.equal(found.tokens[:, :clip, part], expected.tokens[:, :CLIP_TOKENS, part])
            assert torch.equal(found.pooled[:, part], expected.pooled[:, part])
    assert torch.equal(found.tokens[:, clip:], expected.tokens[:, CLIP_TOKENS:])
    assert bool(found.tokens[:, clip:].any()) == t5
    drawer = policy(folder, 2.0)
    _, first, _ = sample(drawer, PromptGroups.of(PROMPTS, [0], [0]))
    other = PromptGroups.of((PROMPTS[1],), [0], [0])
    _, second, _ = sample(drawer, other)
    assert bool(first.isfinite().all())
    assert float((first - second).abs().max()) > 1e-3  # the same noise, another prompt


def test_t5_can_be_left_out(sd3_folder: Folder) -> None:
    model = family(sd3_folder(t5=True), max_sequence_length=0)
    text, whole = model.encode(PROMPTS), family(sd3_folder(t5=True)).encode(PROMPTS)
    assert torch.equal(text.tokens, whole.tokens[:, :CLIP_TOKENS])
    assert model.pipe.text_encoder_3 is model.pipe.tokenizer_3 is None
    only_t5 = sd3_folder(t5=True, drop=("text_encoder", "text_encoder_2"))
    with pytest.raises(ConfigError, match=r"model\.max_sequence_length = 0: T5 is the only text encoder.*use 1 to 512"):
        family(only_t5, max_sequence_length=0)


# --------------------------------------------------------------------------------------------------------- bad folders
def cut(file: Path) -> None:
    """Leave half of a file, as a broken download does."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit(folder: Path, **changes: Any) -> None:
    """Change model_index.json."""
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder: Path, file: str, text: str) -> None:
    """Put something else into a file."""
    (folder / file).write_text(text)


def set_scheduler(folder: Path, **changes: Any) -> None:
    """Change the scheduler's settings."""
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def use_heun(folder: Path) -> None:
    """Another scheduler, which the stock pipeline loads as well."""
    FlowMatchHeunDiscreteScheduler().save_pretrained(folder / "scheduler")
    edit(folder, scheduler=["diffusers", "FlowMatchHeunDiscreteScheduler"])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BAD = {
    "no folder": (shutil.rmtree, "model_index.json is missing"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    "broken index": (lambda f: rewrite(f, "model_index.json", '{"_class_name": '), "not readable JSON"),
    "index in another encoding": (lambda f: (f / "model_index.json").write_bytes(b'{"a": "\xff"}'), "not readable JSON"),
    "index is a list": (lambda f: rewrite(f, "model_index.json", "[1]"), "needs a StableDiffusion3Pipeline"),
    "another pipeline": (lambda f: edit(f, _class_name="FluxPipeline"), "holds a FluxPipeline"),
    "no weights": (lambda f: (f / "transformer" / WEIGHTS).unlink(), "transformer"),
    "no text weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "text_encoder"),
    "cut weights": (lambda f: cut(f / "transformer" / WEIGHTS), "transformer"),
    "cut text weights": (lambda f: cut(f / "text_encoder/model.safetensors"), "does not load"),
    "pointer": (lambda f: rewrite(f, f"vae/{WEIGHTS}", POINTER), "git-lfs"),
    "text pointer": (lambda f: rewrite(f, "text_encoder/model.safetensors", POINTER), "does not load"),
    "broken config": (lambda f: rewrite(f, "vae/config.json", "{"), "vae/config.json"),
    "other shapes": (lambda f: rewrite(f, "text_encoder/config.json", (f / "text_encoder_2/config.json").read_text()), "not load"),
    "broken tokenizer": (lambda f: rewrite(f, "tokenizer/tokenizer_config.json", "{"), "does not load"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), "the folder tokenizer_2"),
    "empty tokenizer": (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "tokenizer"),
    "tokenizer alone": (lambda f: edit(f, text_encoder=[None, None]), "text_encoder and tokenizer belong together"),
    "null vae": (lambda f: edit(f, vae=[None, None]), "vae"),
    "unknown class": (lambda f: edit(f, transformer=["diffusers", "Nope"]), "Nope"),
    "odd entry": (lambda f: edit(f, transformer="x"), "does not load"),
    "heun": (use_heun, "FlowMatchHeunDiscreteScheduler; use FlowMatchEulerDiscreteScheduler"),
    "stochastic": (lambda f: set_scheduler(f, stochastic_sampling=True), "sets stochastic_sampling"),
    "no encoder": (
        lambda f: edit(f, **{f"{a}{b}": [None, None] for a in ("text_encoder", "tokenizer") for b in ("", "_2")}),
        "there is no text encoder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_named(sd3_folder: Folder, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd3_folder(), folder)
    spoil, word = BAD[name]
    family(folder)
    spoil(folder)
    with pytest.raises(DataError) as caught:
        family(folder)
    assert str(caught.value).startswith(f"model.path = {folder}: ")
    assert word in str(caught.value)


@pytest.mark.parametrize(("asked", "use"), [(17, 16), (1, 4), (36, 32), (1000, 32)])
def test_sizes_that_do_not_fit_are_refused(sd3_folder: Folder, asked: int, use: int) -> None:
    rule = rf"model\.resolution = {asked}: must be a multiple of 4 and at most 32; use {use}"
    with pytest.raises(ConfigError, match=rule):
        family(sd3_folder(), resolution=asked)
    assert family(sd3_folder(), resolution=use).latent_shape == (4, use // 2, use // 2)


def test_loading_bars_are_as_they_were(sd3_folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    family(sd3_folder())
    assert logging.is_progress_bar_enabled() == shown
    assert "%" not in "".join(capfd.readouterr())
