"""Sana: any folder that SanaPipeline loads."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2irl.models.base import Sizes
from t2irl.pipelines.family import PipelineFamily, unwanted
from t2irl.pipelines.flow import flow_levels
from t2irl.types import TextEmbeds


class Sana(PipelineFamily):
    """Linear attention on latents of a decoder that scales by 32, with the tokens of a Gemma.

    A prompt follows an instruction that asks for a better prompt; the instruction's tokens are dropped after encoding, all but the
    first. The unconditional branch has no instruction. The released folders have a multistep scheduler, whose steps have no
    density: the Euler scheduler with the same shift takes its place.
    """

    class Config(PipelineFamily.Config):
        """Settings."""

        type: Literal["sana"] = "sana"
        max_sequence_length: int = Field(300, ge=2)
        """Text tokens at most; what is longer is cut."""

    lora_targets = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")  # fmt: skip
    pipelines = ("SanaPipeline",)
    encoders = {"text_encoder": "tokenizer"}

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self._nulls: dict[str, TextEmbeds] = {}

    def prepare(self) -> None:
        """Put the Euler scheduler in the place of a multistep one for flows."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        settings = self.pipe.scheduler.config
        if settings.get("use_flow_sigmas"):
            self.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=settings["flow_shift"])

    def size_rule(self) -> tuple[int, int, int, int | None]:
        """Any multiple of 32 pixels, which the stock pipeline insists on, and of a latent."""
        settings, scale = self.denoiser.config, self.pipe.vae_scale_factor
        return settings.in_channels, settings.sample_size * scale, math.lcm(32, scale * settings.patch_size), None

    def encode_prompts(self, prompts: list[str]) -> TextEmbeds:
        """After the stock pipeline's own instruction."""
        instruction = inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default
        tokens, mask, _, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, complex_human_instruction=instruction,
            max_sequence_length=self.config.max_sequence_length,
        )  # fmt: skip
        return TextEmbeds(tokens, tokens.new_empty(len(tokens), 0), mask.bool())

    @torch.no_grad()
    def null(self, negative: str) -> TextEmbeds:
        """Without the instruction."""
        if negative not in self._nulls:
            self.work["encoded_prompts"] += 1
            with self.at_work(*self.encoders):
                _, _, tokens, mask = self.pipe.encode_prompt(
                    "", True, negative, device=self.device, max_sequence_length=self.config.max_sequence_length
                )
            self._nulls[negative] = TextEmbeds(tokens, tokens.new_empty(1, 0), mask.bool()).trimmed()
        return self._nulls[negative]

    def denoise(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity."""
        return self.denoiser(
            latents.to(self.dtype), encoder_hidden_states=text.tokens, encoder_attention_mask=text.mask,
            timestep=t * 1000 * self.denoiser.config.timestep_scale, return_dict=False,
        )[0]  # fmt: skip

    def levels(self, steps: int) -> Tensor:
        """The Euler scheduler's own, with the folder's shift."""
        return flow_levels(self.pipe.scheduler, steps, 0, self.device)

    def to_vae(self, latents: Tensor) -> Tensor:
        """The decoder has a scale and no shift."""
        return latents / self.pipe.vae.config.scaling_factor

    def from_vae(self, latents: Tensor) -> Tensor:
        """The inverse."""
        return latents * self.pipe.vae.config.scaling_factor

    def vae_encode(self, pictures: Tensor) -> Tensor:
        """It has no distribution either."""
        return self.pipe.vae.encode(pictures).latent

    def call_arguments(self, pipe: Any, prompt: str, guidance: float, negative: str) -> dict[str, Any]:
        """Prompts as text, and the size that was asked for instead of one of a list."""
        rest = {"use_resolution_binning": False, "max_sequence_length": self.config.max_sequence_length}
        return {"prompt": prompt} | unwanted(guidance, negative) | {"guidance_scale": guidance} | rest

    def snippet_setup(self) -> list[str]:
        """The scheduler that the model was trained with."""
        shift = self.pipe.scheduler.config.shift
        return [
            "from diffusers import FlowMatchEulerDiscreteScheduler",
            f"pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift})",
        ]

    @classmethod
    def sizes(cls, config: Any, networks: Mapping[str, Mapping[str, Any]]) -> Sizes | None:
        """Of the longest text that is allowed; text tokens take part in attention only."""
        denoiser, scale = networks[cls.part], 2 ** (len(networks["vae"]["encoder_block_out_channels"]) - 1)
        side = (config.resolution or denoiser["sample_size"] * scale) // scale
        return Sizes.of_transformer(
            latent=denoiser["in_channels"] * side**2,
            pixels=3 * (side * scale) ** 2,
            text=config.max_sequence_length * denoiser["caption_channels"],
            tokens=(side // denoiser["patch_size"]) ** 2 + config.max_sequence_length,
            width=denoiser["num_attention_heads"] * denoiser["attention_head_dim"],
            layers=denoiser["num_layers"],
        )
