"""Stable Diffusion 1.x and 2.x: any folder that StableDiffusionPipeline loads."""

from __future__ import annotations

from typing import Any, Literal

from t2irl.pipelines.diffusion import DiffusionFamily
from t2irl.pipelines.family import unwanted
from t2irl.types import TextEmbeds


class StableDiffusion(DiffusionFamily):
    """A U-Net with the tokens of one CLIP; predicts noise, or v in the 768 px model of 2.x. No safety checker is loaded."""

    class Config(DiffusionFamily.Config):
        """Settings."""

        type: Literal["sd"] = "sd"

    pipelines = ("StableDiffusionPipeline",)
    encoders = {"text_encoder": "tokenizer"}
    unused = ("safety_checker", "feature_extractor", "image_encoder")

    def left_out(self, index: Any) -> dict[str, Any]:
        """The safety checker's absence must be asked for twice."""
        return super().left_out(index) | {"requires_safety_checker": False}

    def encode_prompts(self, prompts: list[str]) -> TextEmbeds:
        """CLIP's tokens."""
        tokens, _ = self.pipe.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return TextEmbeds(tokens, tokens.new_empty(len(tokens), 0))

    def call_arguments(self, pipe: Any, prompt: str, guidance: float, negative: str) -> dict[str, Any]:
        """Prompts as text."""
        return {"prompt": prompt} | unwanted(guidance, negative) | {"guidance_scale": guidance}
