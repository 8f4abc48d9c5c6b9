"""Stable Diffusion 3 and 3.5: any folder that StableDiffusion3Pipeline loads, with or without each text encoder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from t2irl.errors import ConfigError, DataError
from t2irl.models.base import DTYPES, ModelFamily
from t2irl.types import TextEmbeds

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
"""CLIP-L, CLIP-G, T5: each text encoder and its tokenizer, by their names in the pipeline."""
PIXELS_AT_ONCE = 2**21
"""Pixels in one call of the image decoder: two images of 1024 x 1024, 512 of 64 x 64."""


class SD3(ModelFamily):
    """The MMDiT family with CLIP-L, CLIP-G and T5 text encoders."""

    class Config(ModelFamily.Config):
        """Settings."""

        type: Literal["sd3"] = "sd3"
        max_sequence_length: int = Field(256, ge=0, le=512)
        """T5 tokens that follow the CLIP tokens (zeros without a T5 encoder, as in the stock pipeline). Part of the function
        that the model computes: use the same value wherever its pictures are compared. With 0 a T5 encoder is not loaded."""

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.dtype = DTYPES[config.precision]
        self.pipe = load_pipeline(config, self.dtype, DTYPES[config.vae_precision])
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval().to(device)
        self.denoiser = self.pipe.transformer
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.latent_shape = self._latent_shape()

    def _latent_shape(self) -> tuple[int, int, int]:
        settings, scale = self.denoiser.config, self.pipe.vae_scale_factor
        pixels = self.config.resolution or settings.sample_size * scale
        unit = scale * settings.patch_size
        largest = settings.pos_embed_max_size * unit
        if pixels % unit or pixels > largest:
            near = min(max(round(pixels / unit), 1) * unit, largest)
            raise ConfigError(
                f"model.resolution = {pixels}: must be a multiple of {unit} and at most {largest}; use {near}"
            )
        return settings.in_channels, pixels // scale, pixels // scale

    def encode(self, prompts: Sequence[str]) -> TextEmbeds:
        """CLIP-L and CLIP-G tokens side by side, then T5's; a missing encoder gives zeros of its width.

        One prompt at a time: what a prompt gives must not depend, in the last bit, on the prompts that come with it, or a
        resumed run, whose cache is empty, would not repeat the run that was stopped.
        """
        return TextEmbeds.cat([encode_prompts(self.pipe, [p], self.config.max_sequence_length) for p in prompts])

    def denoise(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity; the timestep is the noise level times the scheduler's 1000."""
        timestep = t * self.pipe.scheduler.config.num_train_timesteps
        return self.denoiser(
            hidden_states=latents.to(self.dtype), timestep=timestep, encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled, return_dict=False,
        )[0]  # fmt: skip

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1]."""
        vae = self.pipe.vae
        pixels = (latents.shape[-1] * self.pipe.vae_scale_factor) ** 2
        latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        parts = [vae.decode(x, return_dict=False)[0].float() for x in latents.split(max(PIXELS_AT_ONCE // pixels, 1))]
        return torch.cat(parts).mul(0.5).add(0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """The mode of the encoder's distribution, in the scale that the denoiser works on."""
        vae = self.pipe.vae
        parts = [
            vae.encode((x * 2 - 1).to(vae.dtype)).latent_dist.mode().float()
            for x in images.split(max(PIXELS_AT_ONCE // images[0, 0].numel(), 1))
        ]
        return (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor

    def levels(self, steps: int) -> Tensor:
        """The scheduler's sigmas, static or dynamic shift."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        extra, c = {}, scheduler.config
        if c.use_dynamic_shifting:
            patches = (self.latent_shape[1] // self.denoiser.config.patch_size) ** 2
            extra["mu"] = calculate_shift(patches, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
        scheduler.set_timesteps(steps, device=self.device, **extra)
        return scheduler.sigmas.to(self.device, torch.float32)

    def save_lora(self, folder: Path, weights: dict[str, Tensor]) -> Path:
        """`pytorch_lora_weights.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        type(self.pipe).save_lora_weights(folder, transformer_lora_layers=weights, safe_serialization=True)
        return folder / "pytorch_lora_weights.safetensors"

    def save_denoiser(self, folder: Path) -> Path:
        """A `transformer` folder."""
        target = folder / "transformer"
        self.denoiser.save_pretrained(target, safe_serialization=True)
        return target

    def sample_pipeline(
        self, trained: Path | None, prompt: str, latents: Tensor, steps: int, guidance: float, negative: str
    ) -> Tensor:
        """One image by a StableDiffusion3Pipeline whose transformer is loaded anew.

        Text encoders and image decoder, which no training touches, are those in memory: a second T5 may not fit.
        """
        shared = {name: part for name, part in self.pipe.components.items() if name != "transformer"}
        whole = trained is not None and trained.is_dir()
        source = trained if whole else self.config.path / "transformer"
        with quiet(hints=False):
            fresh = type(self.denoiser).from_pretrained(source, torch_dtype=self.dtype)
            pipe = type(self.pipe).from_pretrained(self.config.path, transformer=fresh.to(self.device), **shared)
            if trained is not None and not whole:
                pipe.load_lora_weights(trained.parent, weight_name=trained.name)
        pipe.set_progress_bar_config(disable=True)
        pixels = latents.shape[-1] * pipe.vae_scale_factor
        final = pipe(
            **prompt_arguments(pipe, prompt, negative, self.config.max_sequence_length), height=pixels, width=pixels,
            latents=latents.to(self.device, self.dtype), num_inference_steps=steps, guidance_scale=guidance,
            # The stock pipeline cannot feed latents of one dtype to a decoder of another.
            output_type="latent",
        ).images  # fmt: skip
        with torch.no_grad():
            return self.decode(final.float())[0].cpu()

    def loading_snippet(self, trained: Path, prompt: str, steps: int, guidance: float, negative: str) -> str:
        """For StableDiffusion3Pipeline."""
        whole = trained.is_dir()
        classes = f"{'SD3Transformer2DModel, ' * whole}StableDiffusion3Pipeline"
        base, dtype, length = str(self.config.path), f"torch_dtype={self.dtype}", self.config.max_sequence_length
        reads = reads_text(self.pipe)
        lines = ["import torch", f"from diffusers import {classes}"]
        if not reads:
            lines += ["from t2irl.models.sd3 import prompt_arguments  # encodes what the pipeline itself cannot"]
        lines += [""]
        if whole:
            lines += [f"transformer = SD3Transformer2DModel.from_pretrained({str(trained)!r}, {dtype})"]
        parts = "transformer=transformer, " * whole + "".join(f"{name}=None, " for name in absent(self.pipe.components))
        lines += [f"pipe = StableDiffusion3Pipeline.from_pretrained({base!r}, {parts}{dtype})"]
        if not whole:
            lines += [f"pipe.load_lora_weights({str(trained.parent)!r}, weight_name={trained.name!r})"]
        if self.device.type != "cpu":
            lines += [f"pipe.to({self.device.type!r})"]
        unwanted = f"negative_prompt={negative!r}, " if negative and guidance != 1 else ""
        text = f"{prompt!r}, {unwanted}max_sequence_length={length}"
        if not reads:
            text = f"**prompt_arguments(pipe, {prompt!r}, {negative!r}, {length})"
        size = f", height={self.config.resolution}, width={self.config.resolution}" if self.config.resolution else ""
        lines += [
            f"image = pipe({text},",
            f"             num_inference_steps={steps}, guidance_scale={guidance}{size}).images[0]",
        ]
        return "\n".join([*lines, 'image.save("picture.png")'])


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str], max_sequence_length: int) -> TextEmbeds:
    """What `StableDiffusion3Pipeline.encode_prompt` gives, for pipelines without some of the text encoders as well."""
    device, dtype = next((e.device, e.dtype) for e in (getattr(pipe, name) for name in ENCODERS) if e is not None)
    settings, count = pipe.transformer.config, len(prompts)
    clips = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    lengths = [tokenizer.model_max_length for tokenizer, _ in clips if tokenizer is not None]
    length = lengths[0] if lengths else pipe.tokenizer_max_length
    missing = settings.pooled_projection_dim - sum(e.config.projection_dim for _, e in clips if e is not None)
    tokens, pooled = [], []
    for tokenizer, encoder in clips:
        if encoder is None:
            tokens.append(torch.zeros(count, length, missing, device=device, dtype=dtype))
            pooled.append(torch.zeros(count, missing, device=device, dtype=dtype))
            missing = 0  # of two absent encoders the first stands for both
        else:
            output = encoder(_ids(tokenizer, prompts, length).to(device), output_hidden_states=True)
            tokens.append(output.hidden_states[-2])
            pooled.append(output[0])
    rows = [F.pad(torch.cat(tokens, -1), (0, settings.joint_attention_dim - sum(x.shape[-1] for x in tokens)))]
    if pipe.text_encoder_3 is not None:
        rows.append(pipe.text_encoder_3(_ids(pipe.tokenizer_3, prompts, max_sequence_length).to(device))[0])
    else:
        rows.append(torch.zeros(count, max_sequence_length, settings.joint_attention_dim, device=device, dtype=dtype))
    return TextEmbeds(torch.cat([r.to(dtype) for r in rows], 1), torch.cat(pooled, -1).to(dtype))


def _ids(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """Token ids (P, length), cut or padded."""
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def reads_text(pipe: Any) -> bool:
    """Whether a pipeline takes prompts as text: the stock code needs both CLIP encoders for that."""
    return pipe.text_encoder is not None and pipe.text_encoder_2 is not None


def prompt_arguments(pipe: Any, prompt: str, negative: str, max_sequence_length: int) -> dict[str, Any]:
    """Arguments that tell a StableDiffusion3Pipeline its prompts: as text, or encoded where it cannot do that itself."""
    if reads_text(pipe):
        return {"prompt": prompt, "negative_prompt": negative, "max_sequence_length": max_sequence_length}
    text = encode_prompts(pipe, [prompt, negative], max_sequence_length)
    return {
        "prompt_embeds": text.tokens[:1], "pooled_prompt_embeds": text.pooled[:1],
        "negative_prompt_embeds": text.tokens[1:], "negative_pooled_prompt_embeds": text.pooled[1:],
    }  # fmt: skip


def load_pipeline(config: SD3.Config, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
    """A StableDiffusion3Pipeline from a local folder. Raises DataError naming what is missing or wrong."""
    from diffusers import StableDiffusion3Pipeline

    path = config.path
    index = _read_index(path)
    left_out = absent(index)
    if set(ENCODERS) <= set(left_out):
        raise DataError(f"model.path = {path}: there is no text encoder, so pictures cannot follow prompts")
    if config.max_sequence_length == 0:
        left_out += ["text_encoder_3", "tokenizer_3"]
        if set(ENCODERS) <= set(left_out):
            raise ConfigError(
                f"model.max_sequence_length = 0: T5 is the only text encoder of {path}; use 1 to 512, 256 is usual"
            )
    arguments = {"torch_dtype": {"default": dtype, "vae": vae_dtype}, **dict.fromkeys(left_out)}
    try:
        with quiet():
            pipe = StableDiffusion3Pipeline.from_pretrained(path, local_files_only=True, **arguments)
    # diffusers, transformers, tokenizers and safetensors each report a bad file in their own way.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"model.path = {path}: the pipeline does not load: {error}") from error
    _check_parts(path, pipe)
    return pipe


def absent(parts: Mapping[str, Any]) -> list[str]:
    """Text encoders and tokenizers that a pipeline's components, or the entries of a model_index.json, do without.

    diffusers loads a folder that says so only if it is told again: `from_pretrained(folder, text_encoder_3=None, ...)`.
    """
    return [name for name in (*ENCODERS, *ENCODERS.values()) if parts.get(name) in (None, [None, None])]


def _read_index(path: Path) -> dict[str, Any]:
    """model_index.json. Refuses a folder that is no SD3 pipeline, or lacks a part that its index promises."""
    file = path / "model_index.json"
    if not file.is_file():
        raise DataError(
            f"model.path = {path}: no diffusers pipeline here (model_index.json is missing). Expected a folder such as assets/tiny-sd3"
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"model.path = {path}: model_index.json is not readable JSON ({error})") from error
    if not isinstance(index, dict) or index.get("_class_name") != "StableDiffusion3Pipeline":
        name = index.get("_class_name") if isinstance(index, dict) else index
        raise DataError(f"model.path = {path}: holds a {name}, but model.type: sd3 needs a StableDiffusion3Pipeline")
    for name, entry in index.items():
        # Without its folder a tokenizer would load all the same, with an empty vocabulary.
        if isinstance(entry, list) and entry and entry[0] is not None and not (path / name).is_dir():
            raise DataError(f"model.path = {path}: the folder {name}, which model_index.json names, is missing")
    return index


def _check_parts(path: Path, pipe: Any) -> None:
    """Refuse a pipeline that loads but cannot do its work."""
    for encoder, tokenizer in ENCODERS.items():
        parts = (getattr(pipe, encoder), getattr(pipe, tokenizer))
        if (parts[0] is None) != (parts[1] is None):
            raise DataError(
                f"model.path = {path}: {encoder} and {tokenizer} belong together, but model_index.json has only one"
            )
        if parts[1] is not None and parts[1]("a").input_ids == parts[1]("b").input_ids:
            raise DataError(f"model.path = {path}: {tokenizer} has no vocabulary; its files are missing or empty")
    scheduler = pipe.scheduler
    if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        raise DataError(
            f"model.path = {path}: scheduler is a {type(scheduler).__name__}; use FlowMatchEulerDiscreteScheduler"
        )
    for option in ("invert_sigmas", "stochastic_sampling"):
        if scheduler.config.get(option):
            raise DataError(
                f"model.path = {path}: scheduler/scheduler_config.json sets {option}, which is not supported; set it to false"
            )


@contextmanager
def quiet(hints: bool = True) -> Iterator[None]:
    """No loading bars of diffusers and transformers, which would break into the run's own progress display.

    Without `hints` diffusers does not say either that a LoRA holds nothing for the text encoders.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown, verbosity = transformers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if not hints:
        diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions say dtype, older ones know torch_dtype only
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        if shown:
            diffusers_logging.enable_progress_bar()
            transformers_logging.enable_progress_bar()
