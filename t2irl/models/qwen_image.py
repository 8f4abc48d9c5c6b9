"""Qwen-Image: any folder that QwenImagePipeline loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from t2irl.models.base import Sizes
from t2irl.pipelines.family import PipelineFamily, unwanted
from t2irl.pipelines.flow import even, flow_levels, pack, unpack
from t2irl.types import TextEmbeds

DEFAULT_SIZE = 128
"""Side of the latents when no resolution is asked for, as in the stock pipeline."""


class QwenImage(PipelineFamily):
    """Double stream blocks on 2 x 2 squares of latents and the tokens of a Qwen2.5-VL.

    A prompt is put into a conversation, whose first 34 tokens, the instruction, are dropped after encoding. Texts keep their
    length: those of a batch are padded to the longest and masked.
    """

    class Config(PipelineFamily.Config):
        """Settings. `rollout.guidance_scale` is classifier-free guidance, `true_cfg_scale` of the stock pipeline, whose result
        has the length of the conditional branch in each token, as there.
        """

        type: Literal["qwen_image"] = "qwen_image"
        max_sequence_length: int = Field(512, ge=1, le=1024)
        """Text tokens at most; what is longer is cut."""

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    pipelines = ("QwenImagePipeline",)
    encoders = {"text_encoder": "tokenizer"}

    def size_rule(self) -> tuple[int, int, int, int | None]:
        """Any multiple of a square of latents."""
        scale = self.pipe.vae_scale_factor
        return self.denoiser.config.in_channels // 4, DEFAULT_SIZE * scale, 2 * scale, None

    def encode_prompts(self, prompts: list[str]) -> TextEmbeds:
        """The last hidden states behind the instruction."""
        tokens, mask = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.config.max_sequence_length
        )
        mask = tokens.new_ones(tokens.shape[:2]) if mask is None else mask
        return TextEmbeds(tokens, tokens.new_empty(len(tokens), 0), mask.bool())

    def denoise(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity. Where no text is padded there is no mask, as in the stock pipeline."""
        b, _, h, w = latents.shape
        assert text.mask is not None, "texts of this family have masks"
        tokens = self.denoiser(
            hidden_states=pack(latents.to(self.dtype)), timestep=(t * 1000).to(self.dtype) / 1000,
            encoder_hidden_states=text.tokens, encoder_hidden_states_mask=None if bool(text.mask.all()) else text.mask,
            img_shapes=[[(1, h // 2, w // 2)]] * b, return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens, h, w)

    def guide(self, v_null: Tensor, v_text: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance that keeps the length of each token's conditional velocity."""
        conditional, guided = pack(v_text), pack(super().guide(v_null, v_text, guidance))
        length = conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * length, *v_text.shape[2:])

    def levels(self, steps: int) -> Tensor:
        """Even levels, shifted by the size of the picture and stretched to the scheduler's last one."""
        return flow_levels(self.pipe.scheduler, steps, (self.latent_shape[1] // 2) ** 2, self.device, even(steps))

    def pack(self, latents: Tensor) -> Tensor:
        """Squares of 2 x 2."""
        return pack(latents)

    def unpack(self, latents: Tensor) -> Tensor:
        """Back."""
        return unpack(latents, *self.latent_shape[1:])

    def to_vae(self, latents: Tensor) -> Tensor:
        """By the mean and standard deviation of each channel."""
        mean, std = self._moments(latents)
        return latents * std + mean

    def from_vae(self, latents: Tensor) -> Tensor:
        """The inverse."""
        mean, std = self._moments(latents)
        return (latents - mean) / std

    def _moments(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.pipe.vae.config
        mean, std = (latents.new_tensor(x).view(1, -1, 1, 1) for x in (settings.latents_mean, settings.latents_std))
        return mean, std

    def vae_decode(self, latents: Tensor) -> Tensor:
        """The decoder is one for videos; a picture is its first and only frame."""
        return super().vae_decode(latents.unsqueeze(2))[:, :, 0]

    def vae_encode(self, pictures: Tensor) -> Tensor:
        """The same."""
        return super().vae_encode(pictures.unsqueeze(2))[:, :, 0]

    def call_arguments(self, pipe: Any, prompt: str, guidance: float, negative: str) -> dict[str, Any]:
        """Prompts as text."""
        length = {"max_sequence_length": self.config.max_sequence_length}
        return {"prompt": prompt} | unwanted(guidance, negative) | {"true_cfg_scale": guidance} | length

    @classmethod
    def sizes(cls, config: Any, networks: Mapping[str, Mapping[str, Any]]) -> Sizes | None:
        """Of the longest text that is allowed."""
        denoiser, scale = networks[cls.part], 2 ** len(networks["vae"]["temperal_downsample"])
        side = (config.resolution or DEFAULT_SIZE * scale) // scale
        return Sizes.of_transformer(
            latent=denoiser["in_channels"] // 4 * side**2,
            pixels=3 * (side * scale) ** 2,
            text=config.max_sequence_length * denoiser["joint_attention_dim"],
            tokens=(side // 2) ** 2 + config.max_sequence_length,
            width=denoiser["num_attention_heads"] * denoiser["attention_head_dim"],
            layers=denoiser["num_layers"],
        )
