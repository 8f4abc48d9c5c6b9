"""A model family that is one class of diffusers pipelines: loading, decoding, saving, drawing with the stock code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from t2irl.errors import ConfigError
from t2irl.models.base import DTYPES, ModelFamily
from t2irl.pipelines.loading import check_encoders, check_scheduler, load, quiet, read_index
from t2irl.types import TextEmbeds

PIXELS_AT_ONCE = 2**21
"""Pixels in one call of the image decoder: two images of 1024 x 1024, 512 of 64 x 64."""


class PipelineFamily(ModelFamily):
    """What a family adds: `encode_prompts`, `denoise`, `levels`, `size_rule`, `call_arguments`, and where its latents or its
    image decoder are peculiar, the hooks for these.
    """

    class Config(ModelFamily.Config):
        """Settings that every pipeline has."""

        offload: Literal["none", "text", "all"] = "none"
        """What rests in host memory and is on the GPU only while it works: nothing, the text encoders, or the image decoder as
        well. Pictures and learning stay the same to the bit."""

    pipelines: tuple[str, ...]
    """Names of the diffusers classes that a folder may hold."""
    encoders: Mapping[str, str]
    """Each text encoder and its tokenizer, by their names in the pipeline."""
    part = "transformer"
    """The denoiser's name in the pipeline."""
    unused: tuple[str, ...] = ()
    """Parts of the pipeline that are not loaded."""
    schedulers: tuple[str, ...] = ("FlowMatchEulerDiscreteScheduler",)
    """Schedulers whose steps are those of the ODE here."""
    switched_off: tuple[str, ...] = ("invert_sigmas", "stochastic_sampling")
    """Options of these schedulers that would make them something else."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.dtype = DTYPES[config.precision]
        index = read_index(config.path, config.type, self.pipelines)
        precision = {"default": self.dtype, "vae": DTYPES[config.vae_precision]}
        self.pipe = self.load(index, torch_dtype=precision, **self.left_out(index))
        self.prepare()
        check_encoders(config.path, self.pipe, self.encoders)
        check_scheduler(config.path, self.pipe.scheduler, self.schedulers, self.switched_off)
        self.resting = self._resting()
        for name, part in self.pipe.components.items():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval().to("cpu" if name in self.resting else device)
        self.denoiser = getattr(self.pipe, self.part)
        self.denoiser_class = type(self.denoiser)  # FSDP gives it another one
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.latent_shape = self._latent_shape()

    # ------------------------------------------------------------------------------------------------- for a family to say
    def encode_prompts(self, prompts: list[str]) -> TextEmbeds:
        """What the stock pipeline makes of prompts, all in one call."""
        raise NotImplementedError

    def size_rule(self) -> tuple[int, int, int, int | None]:
        """Channels of the latents, pixels of a picture's side by default, its unit, and its limit (None: no limit)."""
        raise NotImplementedError

    def call_arguments(self, pipe: Any, prompt: str, guidance: float, negative: str) -> dict[str, Any]:
        """Arguments that tell the stock pipeline its prompts and its guidance."""
        raise NotImplementedError

    @property
    def pixels_per_latent(self) -> int:
        """Along a side."""
        return self.pipe.vae_scale_factor

    def left_out(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `from_pretrained` for parts that are not loaded."""
        return {name: None for name in self.unused if name in index}

    def load(self, index: Mapping[str, Any], **arguments: Any) -> Any:
        """The pipeline with its weights."""
        return load(self.config.path, index, **arguments)

    def prepare(self) -> None:
        """Change the pipeline before it is checked and used."""

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) in the layout that the stock pipeline takes and gives."""
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return latents

    def to_vae(self, latents: Tensor) -> Tensor:
        """Latents in the scale of the image decoder."""
        settings = self.pipe.vae.config
        return latents / settings.scaling_factor + (settings.shift_factor or 0)

    def from_vae(self, latents: Tensor) -> Tensor:
        """The inverse of `to_vae`."""
        settings = self.pipe.vae.config
        return (latents - (settings.shift_factor or 0)) * settings.scaling_factor

    def vae_decode(self, latents: Tensor) -> Tensor:
        """One call of the image decoder: pictures in [-1, 1]."""
        return self.pipe.vae.decode(latents, return_dict=False)[0]

    def vae_encode(self, pictures: Tensor) -> Tensor:
        """One call of the image encoder on pictures in [-1, 1]: the mode of its distribution."""
        return self.pipe.vae.encode(pictures).latent_dist.mode()

    def snippet_setup(self) -> list[str]:
        """Lines of the loading snippet between loading and drawing."""
        return []

    def snippet_imports(self) -> list[str]:
        """Lines of the loading snippet after its imports."""
        return []

    def snippet_text(self, prompt: str, guidance: float, negative: str) -> list[str]:
        """The arguments of `call_arguments` as Python."""
        arguments = self.call_arguments(self.pipe, prompt, guidance, negative)
        return [f"{name}={value!r}" for name, value in arguments.items()]

    # --------------------------------------------------------------------------------------------------- what follows of it
    def _latent_shape(self) -> tuple[int, int, int]:
        channels, default, unit, largest = self.size_rule()
        pixels, scale = self.config.resolution or default, self.pixels_per_latent
        if pixels % unit or (largest is not None and pixels > largest):
            near = max(round(pixels / unit), 1) * unit
            limit = "" if largest is None else f" and at most {largest}"
            use = near if largest is None else min(near, largest)
            raise ConfigError(f"model.resolution = {pixels}: must be a multiple of {unit}{limit}; use {use}")
        return channels, pixels // scale, pixels // scale

    def _resting(self) -> tuple[str, ...]:
        """Parts that are in host memory while idle."""
        texts = tuple(name for name in self.encoders if getattr(self.pipe, name) is not None)
        return {"none": (), "text": texts, "all": (*texts, "vae")}[self.config.offload]

    @contextmanager
    def at_work(self, *names: str) -> Iterator[None]:
        """Inside, these parts of the pipeline are on the device."""
        moved = [getattr(self.pipe, name) for name in names if name in self.resting]
        try:
            for part in moved:
                self.work["moved_parts"] += 1
                part.to(self.device)
            yield
        finally:
            for part in moved:
                part.to("cpu")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextEmbeds:
        """What the stock pipeline gives.

        One prompt at a time: what a prompt gives must not depend, in the last bit, on the prompts that come with it, or a
        resumed run, whose cache is empty, would not repeat the run that was stopped.
        """
        # The stock code says of every long prompt, each time, that it was cut.
        with quiet(hints=False), self.at_work(*self.encoders):
            return TextEmbeds.cat([self.encode_prompts([p]) for p in prompts])

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1]."""
        pixels = (latents.shape[-1] * self.pixels_per_latent) ** 2
        latents = self.to_vae(latents).to(self.pipe.vae.dtype)
        with self.at_work("vae"):
            parts = [self.vae_decode(x).float() for x in latents.split(max(PIXELS_AT_ONCE // pixels, 1))]
        return torch.cat(parts).mul(0.5).add(0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Without noise, in the scale that the denoiser works on."""
        pieces = images.split(max(PIXELS_AT_ONCE // images[0, 0].numel(), 1))
        with self.at_work("vae"):
            parts = [self.vae_encode((x * 2 - 1).to(self.pipe.vae.dtype)).float() for x in pieces]
        return self.from_vae(torch.cat(parts))

    def save_lora(self, folder: Path, weights: dict[str, Tensor]) -> Path:
        """`pytorch_lora_weights.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        layers = {f"{self.part}_lora_layers": weights}
        type(self.pipe).save_lora_weights(folder, **layers, safe_serialization=True)
        return folder / "pytorch_lora_weights.safetensors"

    def save_denoiser(self, folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
        """A folder named as the denoiser's in a pipeline."""
        target = folder / self.part
        denoiser = self.denoiser if weights is None else self._made_of(weights)
        denoiser.save_pretrained(target, safe_serialization=True)
        return target

    def _made_of(self, weights: dict[str, Tensor]) -> Any:
        """A denoiser with these parameters, which are not copied."""
        with torch.device("meta"):
            fresh = self.denoiser_class.from_config(self.denoiser.config)
        buffers = dict(self.denoiser.named_buffers())
        saved = {name: buffers.get(name, weights.get(name)) for name in fresh.state_dict()}
        fresh.load_state_dict(saved, assign=True)
        return fresh

    def sample_pipeline(
        self, trained: Path | None, prompt: str, latents: Tensor, steps: int, guidance: float, negative: str
    ) -> Tensor:
        """One image by a stock pipeline whose denoiser is loaded anew.

        Text encoders and image decoder, which no training touches, are those in memory: a second T5 may not fit.
        """
        shared = {name: part for name, part in self.pipe.components.items() if name != self.part}
        whole = trained is not None and trained.is_dir()
        source = trained if whole else self.config.path / self.part
        with quiet(hints=False):
            fresh = self.denoiser_class.from_pretrained(source, torch_dtype=self.dtype).to(self.device)
            pipe = type(self.pipe).from_pretrained(self.config.path, **{self.part: fresh}, **shared)
            if trained is not None and not whole:
                pipe.load_lora_weights(trained.parent, weight_name=trained.name)
        pipe.set_progress_bar_config(disable=True)
        pixels = latents.shape[-1] * self.pixels_per_latent
        with quiet(hints=False), self.at_work(*self.resting):
            final = pipe(
                **self.call_arguments(pipe, prompt, guidance, negative), height=pixels, width=pixels,
                latents=self.pack(latents.to(self.device, self.dtype)), num_inference_steps=steps,
                # The stock pipeline cannot feed latents of one dtype to a decoder of another.
                output_type="latent",
            ).images  # fmt: skip
        with torch.no_grad():
            return self.decode(self.unpack(final.float()))[0].cpu()

    def loading_snippet(self, trained: Path, prompt: str, steps: int, guidance: float, negative: str) -> str:
        """For the class of the folder's pipeline."""
        whole, loader, dtype = trained.is_dir(), type(self.pipe).__name__, f"torch_dtype={self.dtype}"
        denoiser, size = self.denoiser_class.__name__, self.config.resolution
        lines = [
            "import torch",
            f"from diffusers import {f'{denoiser}, ' * whole}{loader}",
            *self.snippet_imports(),
            "",
        ]
        if whole:
            lines += [f"{self.part} = {denoiser}.from_pretrained({str(trained)!r}, {dtype})"]
        missing = (name for name in self._tellable() if self.pipe.components[name] is None)
        parts = f"{self.part}={self.part}, " * whole + "".join(f"{name}=None, " for name in missing)
        lines += [f"pipe = {loader}.from_pretrained({str(self.config.path)!r}, {parts}{dtype})"]
        if not whole:
            lines += [f"pipe.load_lora_weights({str(trained.parent)!r}, weight_name={trained.name!r})"]
        lines += self.snippet_setup()
        if self.device.type != "cpu":
            lines += [f"pipe.to({self.device.type!r})"]
        more = [f"num_inference_steps={steps}", *([f"height={size}, width={size}"] if size else [])]
        lines += [f"image = pipe({', '.join(self.snippet_text(prompt, guidance, negative))},"]
        lines += [f"             {', '.join(more)}).images[0]", 'image.save("picture.png")']
        return "\n".join(lines)

    def _tellable(self) -> list[str]:
        """Parts of which `from_pretrained` must be told that they are not there: text encoders and tokenizers."""
        return [*self.encoders, *self.encoders.values()]


def unwanted(guidance: float, negative: str) -> dict[str, str]:
    """The stock pipelines' argument for the unconditional branch, if there is one."""
    return {} if guidance == 1 else {"negative_prompt": negative}
