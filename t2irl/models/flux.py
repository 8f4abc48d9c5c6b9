"""FLUX.1: dev, whose guidance is a number that the network reads, and schnell, which is distilled without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2irl.errors import ConfigError
from t2irl.models.base import Sizes
from t2irl.pipelines.family import PipelineFamily, unwanted
from t2irl.pipelines.flow import even, flow_levels, pack, unpack
from t2irl.pipelines.loading import vae_scale
from t2irl.types import TextEmbeds

DEFAULT_SIZE = 128
"""Side of the latents when no resolution is asked for, as in the stock pipeline."""


class PackedGradient(torch.autograd.Function):
    """The identity, whose gradient comes back with no gaps in memory. Changes no number.

    A single block joins its attention with its MLP, so attention gets a slice of that gradient; a double block's gets one of
    its own, for queries, keys and values of the very same layout. cuDNN's backward plan has the gradient's layout built in, while
    PyTorch looks plans up by the layouts of the other three alone (told in pytorch/pytorch #191576): the second kind of block would
    run the first kind's plan, and read past the end.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Itself."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """A copy where there are gaps."""
        return grad.contiguous()


class Flux(PipelineFamily):
    """Double and single stream blocks on 2 x 2 squares of latents, T5 tokens, and the pooled CLIP-L vector."""

    class Config(PipelineFamily.Config):
        """Settings."""

        type: Literal["flux"] = "flux"
        max_sequence_length: int = Field(512, ge=1, le=512)
        """T5 tokens. The model attends to the padding too, so this is part of the function that it computes: use the same value
        wherever its pictures are compared. Usual: 512 for dev, 256 for schnell; 128 saves a quarter of the work at 512 px."""
        embedded_guidance: float | None = Field(None, ge=0)
        """Guidance that dev was distilled to obey, an input of the network, `guidance_scale` of the stock pipeline; null: 3.5.
        schnell has no such input. This is not `rollout.guidance_scale`, which is classifier-free guidance with a second,
        unconditional branch, `true_cfg_scale` of the stock pipeline, and is 1 for this model."""

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    pipelines = ("FluxPipeline",)
    encoders = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    unused = ("image_encoder", "feature_extractor")

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        for block in self.denoiser.single_transformer_blocks:
            block.attn.register_forward_hook(lambda module, inputs, output: PackedGradient.apply(output))
        given, takes = config.embedded_guidance, self.denoiser.config.guidance_embeds
        if given is not None and not takes:
            raise ConfigError(
                f"model.embedded_guidance = {given}: {config.path} takes no guidance as input (schnell does not); leave it out"
            )
        self.embedded = (3.5 if given is None else given) if takes else None

    def size_rule(self) -> tuple[int, int, int, int | None]:
        """Any multiple of a square of latents."""
        scale = self.pipe.vae_scale_factor
        return self.denoiser.config.in_channels // 4, DEFAULT_SIZE * scale, 2 * scale, None

    def encode_prompts(self, prompts: list[str]) -> TextEmbeds:
        """T5's tokens and CLIP's pooled vector."""
        tokens, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.config.max_sequence_length
        )
        return TextEmbeds(tokens, pooled)

    def denoise(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity."""
        _, _, h, w = latents.shape
        places = self.pipe._prepare_latent_image_ids(1, h // 2, w // 2, self.device, self.dtype)
        guidance = None if self.embedded is None else torch.full_like(t, self.embedded)
        tokens = self.denoiser(
            hidden_states=pack(latents.to(self.dtype)), timestep=(t * 1000).to(self.dtype) / 1000, guidance=guidance,
            pooled_projections=text.pooled, encoder_hidden_states=text.tokens, img_ids=places,
            txt_ids=places.new_zeros(text.tokens.shape[1], 3), return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens, h, w)

    def levels(self, steps: int) -> Tensor:
        """Even levels, shifted by the size of the picture (dev) or not at all (schnell)."""
        return flow_levels(self.pipe.scheduler, steps, (self.latent_shape[1] // 2) ** 2, self.device, even(steps))

    def pack(self, latents: Tensor) -> Tensor:
        """Squares of 2 x 2."""
        return pack(latents)

    def unpack(self, latents: Tensor) -> Tensor:
        """Back."""
        return unpack(latents, *self.latent_shape[1:])

    def call_arguments(self, pipe: Any, prompt: str, guidance: float, negative: str) -> dict[str, Any]:
        """Both kinds of guidance by the stock pipeline's names."""
        classifier_free = {} if guidance == 1 else {"true_cfg_scale": guidance}
        embedded = {} if self.embedded is None else {"guidance_scale": self.embedded}
        length = {"max_sequence_length": self.config.max_sequence_length}
        return {"prompt": prompt} | unwanted(guidance, negative) | classifier_free | embedded | length

    @classmethod
    def sizes(cls, config: Any, networks: Mapping[str, Mapping[str, Any]]) -> Sizes | None:
        """Double and single blocks alike."""
        denoiser, scale = networks[cls.part], vae_scale(networks)
        side = (config.resolution or DEFAULT_SIZE * scale) // scale
        return Sizes.of_transformer(
            latent=denoiser["in_channels"] // 4 * side**2,
            pixels=3 * (side * scale) ** 2,
            text=config.max_sequence_length * denoiser["joint_attention_dim"] + denoiser["pooled_projection_dim"],
            tokens=(side // 2) ** 2 + config.max_sequence_length,
            width=denoiser["num_attention_heads"] * denoiser["attention_head_dim"],
            layers=denoiser["num_layers"] + denoiser["num_single_layers"],
        )
