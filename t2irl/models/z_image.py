"""Z-Image and Z-Image-Turbo: any folder that ZImagePipeline loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2irl.models.base import Sizes
from t2irl.pipelines.family import PipelineFamily, unwanted
from t2irl.pipelines.flow import flow_levels
from t2irl.pipelines.loading import vae_scale
from t2irl.types import TextEmbeds

DEFAULT_PIXELS = 1024
"""Side of a picture when no resolution is asked for, as in the stock pipeline."""


class ZImage(PipelineFamily):
    """A single stream over 2 x 2 squares of latents and the tokens of a Qwen3, which reads the prompt as a question to it."""

    class Config(PipelineFamily.Config):
        """Settings. `rollout.guidance_scale` counts as everywhere, 1 being none; the stock pipeline's is one less, 0 being none.
        Turbo models are made for none.
        """

        type: Literal["z_image"] = "z_image"
        max_sequence_length: int = Field(512, ge=1)
        """Text tokens at most, template included; what is longer is cut."""

    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    pipelines = ("ZImagePipeline",)
    encoders = {"text_encoder": "tokenizer"}

    def size_rule(self) -> tuple[int, int, int, int | None]:
        """Any multiple of a square of latents."""
        return self.denoiser.config.in_channels, DEFAULT_PIXELS, 2 * self.pipe.vae_scale_factor, None

    def encode_prompts(self, prompts: list[str]) -> TextEmbeds:
        """The hidden states before the last layer, without padding."""
        parts, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )  # fmt: skip
        rows = [TextEmbeds(x[None], x.new_empty(1, 0), x.new_ones(1, len(x)).bool()) for x in parts]
        return TextEmbeds.cat(rows)

    def denoise(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity. The network takes lists, counts time from noise to data, and gives the velocity's negative."""
        assert text.mask is not None, "texts of this family have masks"
        lengths = text.mask.sum(1).tolist()
        tokens = [row[:length] for row, length in zip(text.tokens, lengths, strict=True)]
        pictures = list(latents.to(self.dtype).unsqueeze(2).unbind(0))
        result = self.denoiser(pictures, (1000 - t * 1000) / 1000, tokens, return_dict=False)[0]
        return -torch.stack([x.float() for x in result]).squeeze(2)

    def levels(self, steps: int) -> Tensor:
        """The stock pipeline's even levels, shifted."""
        from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

        patches = (self.latent_shape[1] // 2) ** 2
        return flow_levels(self.pipe.scheduler, steps, patches, self.device, get_default_z_image_sigmas(steps))

    def call_arguments(self, pipe: Any, prompt: str, guidance: float, negative: str) -> dict[str, Any]:
        """Prompts as text."""
        length = {"max_sequence_length": self.config.max_sequence_length}
        return {"prompt": prompt} | unwanted(guidance, negative) | {"guidance_scale": guidance - 1} | length

    @classmethod
    def sizes(cls, config: Any, networks: Mapping[str, Mapping[str, Any]]) -> Sizes | None:
        """Of the longest text that is allowed; refiners count as layers."""
        denoiser, scale = networks[cls.part], vae_scale(networks)
        side = (config.resolution or DEFAULT_PIXELS) // scale
        return Sizes.of_transformer(
            latent=denoiser["in_channels"] * side**2,
            pixels=3 * (side * scale) ** 2,
            text=config.max_sequence_length * denoiser["cap_feat_dim"],
            tokens=(side // 2) ** 2 + config.max_sequence_length,
            width=denoiser["dim"],
            # A layer keeps 5/3 of what one of SD3 does, as measured: its MLP is gated.
            layers=(denoiser["n_layers"] + denoiser["n_refiner_layers"]) * 5 // 3,
        )
