"""Stable Diffusion XL: any folder that StableDiffusionXLPipeline loads."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from t2irl.pipelines.diffusion import DiffusionFamily
from t2irl.pipelines.family import unwanted
from t2irl.types import TextEmbeds


class SDXL(DiffusionFamily):
    """A U-Net with the tokens of two CLIPs, the pooled vector of the second, and the size of the picture as numbers."""

    class Config(DiffusionFamily.Config):
        """Settings. An empty `rollout.negative_prompt` is what the folder says it is: zeros in the released models, not the
        encoding of an empty text.
        """

        type: Literal["sdxl"] = "sdxl"

    pipelines = ("StableDiffusionXLPipeline",)
    encoders = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    unused = ("image_encoder", "feature_extractor")

    def encode_prompts(self, prompts: list[str]) -> TextEmbeds:
        """Tokens and pooled vector."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return TextEmbeds(tokens, pooled)

    def null(self, negative: str) -> TextEmbeds:
        """Zeros for an empty text if the folder says so."""
        text = super().null(negative)
        if negative or not self.pipe.config.force_zeros_for_empty_prompt:
            return text
        return TextEmbeds(torch.zeros_like(text.tokens), torch.zeros_like(text.pooled))

    def conditions(self, text: TextEmbeds) -> dict[str, Any]:
        """Pooled text; original size, crop and target size as in a call of the stock pipeline without these."""
        pixels = self.latent_shape[1] * self.pipe.vae_scale_factor
        numbers = text.pooled.new_tensor([pixels, pixels, 0, 0, pixels, pixels])
        return {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": numbers.expand(len(text.pooled), 6)}}

    def to_vae(self, latents: Tensor) -> Tensor:
        """Also for decoders that come with a mean and a standard deviation of each channel."""
        return self._affine(super().to_vae, latents, lambda x, mean, std, scale: x * std / scale + mean)

    def from_vae(self, latents: Tensor) -> Tensor:
        """The inverse."""
        return self._affine(super().from_vae, latents, lambda x, mean, std, scale: (x - mean) * scale / std)

    def _affine(self, plain: Any, latents: Tensor, change: Any) -> Tensor:
        c = self.pipe.vae.config
        if c.latents_mean is None or c.latents_std is None:
            return plain(latents)
        mean, std = (latents.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (c.latents_mean, c.latents_std))
        return change(latents, mean, std, c.scaling_factor)

    def call_arguments(self, pipe: Any, prompt: str, guidance: float, negative: str) -> dict[str, Any]:
        """Prompts as text; what stands for an empty one is the pipeline's own business."""
        text = unwanted(guidance, negative) if negative else {}
        return {"prompt": prompt} | text | {"guidance_scale": guidance}
