"""FLUX.2 klein: any folder that Flux2KleinPipeline loads, base or distilled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from t2irl.errors import ConfigError
from t2irl.models.base import Sizes
from t2irl.pipelines.family import PipelineFamily
from t2irl.pipelines.flow import even, flow_levels
from t2irl.pipelines.loading import vae_scale
from t2irl.types import TextEmbeds

DEFAULT_SIZE = 128
"""Side of the decoder's latents when no resolution is asked for, as in the stock pipeline."""


class Flux2Klein(PipelineFamily):
    """Double and single stream blocks on squares of 2 x 2 latents, each one a latent of the denoiser, and tokens of a Qwen3.

    Latents are scaled by the running moments of the decoder's batch norm.
    """

    class Config(PipelineFamily.Config):
        """Settings. `rollout.guidance_scale` is classifier-free guidance; a distilled folder is made for 1."""

        type: Literal["flux2_klein"] = "flux2_klein"
        max_sequence_length: int = Field(512, ge=1, le=512)
        """Text tokens. The model attends to the padding too, so this is part of the function that it computes: use the same
        value wherever its pictures are compared."""

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_qkv_mlp_proj",
    )  # fmt: skip
    pipelines = ("Flux2KleinPipeline",)
    encoders = {"text_encoder": "tokenizer"}

    @property
    def pixels_per_latent(self) -> int:
        """A latent here is a square of the decoder's."""
        return 2 * self.pipe.vae_scale_factor

    def size_rule(self) -> tuple[int, int, int, int | None]:
        """Any multiple of a latent."""
        pixels = DEFAULT_SIZE * self.pipe.vae_scale_factor
        return self.denoiser.config.in_channels, pixels, self.pixels_per_latent, None

    def encode_prompts(self, prompts: list[str]) -> TextEmbeds:
        """Three hidden layers side by side."""
        length = self.config.max_sequence_length
        tokens, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=length)
        return TextEmbeds(tokens, tokens.new_empty(len(tokens), 0))

    def denoise(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity."""
        words = self.pipe._prepare_text_ids(text.tokens[:1]).to(self.device)
        places = self.pipe._prepare_latent_ids(latents[:1]).to(self.device)
        tokens = self.denoiser(
            hidden_states=latents.to(self.dtype).flatten(2).transpose(1, 2), timestep=(t * 1000).to(self.dtype) / 1000,
            guidance=None, encoder_hidden_states=text.tokens, txt_ids=words.expand(len(t), -1, -1),
            img_ids=places.expand(len(t), -1, -1), return_dict=False,
        )[0]  # fmt: skip
        return tokens.transpose(1, 2).reshape(latents.shape)

    def guide(self, v_null: Tensor, v_text: Tensor, guidance: float) -> Tensor:
        """Refused for a distilled folder, whose stock pipeline would ignore it."""
        if self.pipe.config.is_distilled:
            raise ConfigError(f"rollout.guidance_scale = {guidance:g}: {self.config.path} is distilled; use 1")
        return super().guide(v_null, v_text, guidance)

    def levels(self, steps: int) -> Tensor:
        """Even levels, shifted by the size of the picture and the number of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        patches = self.latent_shape[1] * self.latent_shape[2]
        mu = compute_empirical_mu(patches, steps)
        return flow_levels(self.pipe.scheduler, steps, patches, self.device, even(steps), mu)

    def unpack(self, latents: Tensor) -> Tensor:
        """The stock pipeline takes the denoiser's latents and gives the decoder's."""
        return self.from_vae(latents)

    def to_vae(self, latents: Tensor) -> Tensor:
        """By the moments, then squares apart."""
        mean, std = self._moments(latents)
        return self.pipe._unpatchify_latents(latents * std + mean)

    def from_vae(self, latents: Tensor) -> Tensor:
        """The inverse."""
        mean, std = self._moments(latents)
        return (self.pipe._patchify_latents(latents) - mean) / std

    def _moments(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        mean, variance = (x.view(1, -1, 1, 1).to(latents) for x in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    def call_arguments(self, pipe: Any, prompt: str, guidance: float, negative: str) -> dict[str, Any]:
        """The stock pipeline takes no negative text, only an encoded one; without, it is the empty one."""
        length = {"max_sequence_length": self.config.max_sequence_length}
        unwanted = (
            {"negative_prompt_embeds": pipe.encode_prompt(negative, **length)[0]} if negative and guidance != 1 else {}
        )
        return {"prompt": prompt, "guidance_scale": guidance} | unwanted | length

    def snippet_text(self, prompt: str, guidance: float, negative: str) -> list[str]:
        """The same, encoded where it is used."""
        words, length = super().snippet_text(prompt, guidance, ""), self.config.max_sequence_length
        if negative and guidance != 1:
            words += [f"negative_prompt_embeds=pipe.encode_prompt({negative!r}, max_sequence_length={length})[0]"]
        return words

    @classmethod
    def sizes(cls, config: Any, networks: Mapping[str, Mapping[str, Any]]) -> Sizes | None:
        """Double and single blocks alike."""
        denoiser, scale = networks[cls.part], 2 * vae_scale(networks)
        side = (config.resolution or DEFAULT_SIZE * scale // 2) // scale
        return Sizes.of_transformer(
            latent=denoiser["in_channels"] * side**2,
            pixels=3 * (side * scale) ** 2,
            text=config.max_sequence_length * denoiser["joint_attention_dim"],
            tokens=side**2 + config.max_sequence_length,
            width=denoiser["num_attention_heads"] * denoiser["attention_head_dim"],
            layers=denoiser["num_layers"] + denoiser["num_single_layers"],
        )
