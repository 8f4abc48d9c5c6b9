"""Stable Diffusion 3 and 3.5: any folder that StableDiffusion3Pipeline loads, with or without each text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2irl.errors import ConfigError, DataError
from t2irl.models.base import Sizes
from t2irl.pipelines.family import PipelineFamily
from t2irl.pipelines.flow import flow_levels
from t2irl.pipelines.loading import vae_scale
from t2irl.types import TextEmbeds

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
"""CLIP-L, CLIP-G, T5: each text encoder and its tokenizer, by their names in the pipeline."""


class SD3(PipelineFamily):
    """The MMDiT family with CLIP-L, CLIP-G and T5 text encoders."""

    class Config(PipelineFamily.Config):
        """Settings."""

        type: Literal["sd3"] = "sd3"
        max_sequence_length: int = Field(256, ge=0, le=512)
        """T5 tokens that follow the CLIP tokens (zeros without a T5 encoder, as in the stock pipeline). Part of the function
        that the model computes: use the same value wherever its pictures are compared. With 0 a T5 encoder is not loaded."""

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    pipelines = ("StableDiffusion3Pipeline",)
    encoders = ENCODERS

    def left_out(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """Text encoders that the folder does without, which must be said again, and T5 where no room is left for it."""
        path, names = self.config.path, absent(index)
        if set(ENCODERS) <= set(names):
            raise DataError(f"model.path = {path}: there is no text encoder, so pictures cannot follow prompts")
        if self.config.max_sequence_length == 0:
            names += ["text_encoder_3", "tokenizer_3"]
            if set(ENCODERS) <= set(names):
                raise ConfigError(
                    f"model.max_sequence_length = 0: T5 is the only text encoder of {path}; use 1 to 512, 256 is usual"
                )
        return dict.fromkeys(names)

    def size_rule(self) -> tuple[int, int, int, int | None]:
        """Up to the size of the position embedding."""
        settings, scale = self.denoiser.config, self.pipe.vae_scale_factor
        unit = scale * settings.patch_size
        return settings.in_channels, settings.sample_size * scale, unit, settings.pos_embed_max_size * unit

    def encode_prompts(self, prompts: list[str]) -> TextEmbeds:
        """CLIP-L and CLIP-G tokens side by side, then T5's; a missing encoder gives zeros of its width."""
        return encode_prompts(self.pipe, prompts, self.config.max_sequence_length)

    def denoise(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity; the timestep is the noise level times the scheduler's 1000."""
        timestep = t * self.pipe.scheduler.config.num_train_timesteps
        return self.denoiser(
            hidden_states=latents.to(self.dtype), timestep=timestep, encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled, return_dict=False,
        )[0]  # fmt: skip

    def levels(self, steps: int) -> Tensor:
        """The scheduler's sigmas, static or dynamic shift."""
        patches = (self.latent_shape[1] // self.denoiser.config.patch_size) ** 2
        return flow_levels(self.pipe.scheduler, steps, patches, self.device)

    def call_arguments(self, pipe: Any, prompt: str, guidance: float, negative: str) -> dict[str, Any]:
        """Prompts as text, or encoded where the pipeline cannot do that itself."""
        return prompt_arguments(pipe, prompt, negative, self.config.max_sequence_length) | {"guidance_scale": guidance}

    def snippet_imports(self) -> list[str]:
        """The function that encodes what the pipeline itself cannot."""
        needed = "from t2irl.models.sd3 import prompt_arguments  # encodes what the pipeline itself cannot"
        return [] if reads_text(self.pipe) else [needed]

    def snippet_text(self, prompt: str, guidance: float, negative: str) -> list[str]:
        """The same."""
        if reads_text(self.pipe):
            return super().snippet_text(prompt, guidance, negative)
        length = self.config.max_sequence_length
        return [f"**prompt_arguments(pipe, {prompt!r}, {negative!r}, {length})", f"guidance_scale={guidance}"]

    @classmethod
    def sizes(cls, config: Any, networks: Mapping[str, Mapping[str, Any]]) -> Sizes | None:
        """From the settings of the transformer, the image decoder and the first CLIP."""
        denoiser, scale = networks[cls.part], vae_scale(networks)
        side = (config.resolution or denoiser["sample_size"] * scale) // scale
        length = networks.get("text_encoder", {}).get("max_position_embeddings", 77) + config.max_sequence_length
        image, width = (
            (side // denoiser["patch_size"]) ** 2,
            denoiser["num_attention_heads"] * denoiser["attention_head_dim"],
        )
        # A second attention to the image, as in SD3.5 medium, keeps two fifths of what a layer does, as measured.
        second = 2 * image * width * len(denoiser.get("dual_attention_layers") or ()) // 5
        return Sizes(
            latent=denoiser["in_channels"] * side**2,
            pixels=3 * (side * scale) ** 2,
            text=length * denoiser["joint_attention_dim"] + denoiser["pooled_projection_dim"],
            layer=(image + length) * width,
            kept=(image + length) * width * denoiser["num_layers"] + second,
        )


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


def absent(parts: Mapping[str, Any]) -> list[str]:
    """Text encoders and tokenizers that a pipeline's components, or the entries of a model_index.json, do without.

    diffusers loads a folder that says so only if it is told again: `from_pretrained(folder, text_encoder_3=None, ...)`.
    """
    return [name for name in (*ENCODERS, *ENCODERS.values()) if parts.get(name) in (None, [None, None])]
