"""Models with a variance-preserving noise schedule and discrete timesteps, seen as flow models.

Such a model knows states sqrt(a) x0 + sqrt(1 - a) x1, a being the cumulative alpha of a timestep. Divided by sqrt(a) +
sqrt(1 - a) they are (1 - t) x0 + t x1 at noise level t = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)): the states of a flow model. Its
velocity x1 - x0 follows from the predicted noise or v, an Euler step of it is a DDIM step without noise, and every dynamics
means what it means elsewhere. Everything outside this file sees such states only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2irl.errors import DataError
from t2irl.models.base import Sizes
from t2irl.pipelines.family import PipelineFamily
from t2irl.pipelines.loading import vae_scale
from t2irl.types import TextEmbeds

PREDICTIONS = ("epsilon", "v_prediction")
RESIDUAL, ATTENTION = 0.4, 1.6
"""What a residual block, and a transformer layer, keep for the backward pass, in units of a layer of SD3: measured 0.33 and 1.5 in
bf16, 0.51 and 1.8 in float32, with LoRA on attention."""
OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


class DiffusionFamily(PipelineFamily):
    """A family with a U-Net. What it adds: text, and what the U-Net is told besides (`conditions`).

    A folder's EulerDiscreteScheduler is taken as it is. Any other scheduler with the same noise becomes the DDIM scheduler
    with its settings, as in all published RL trainers: steps of higher order have no transition density.
    """

    part = "unet"
    schedulers = ("DDIMScheduler", "EulerDiscreteScheduler")
    switched_off = ("thresholding", "clip_sample", *OTHER_SIGMAS)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        scheduler = self.pipe.scheduler
        kind, zero_snr = scheduler.config.prediction_type, scheduler.config.get("rescale_betas_zero_snr")
        where = f"model.path = {config.path}: scheduler/scheduler_config.json"
        if kind not in PREDICTIONS:
            raise DataError(f"{where}: prediction_type {kind!r} is not supported; known: {', '.join(PREDICTIONS)}")
        if zero_snr and kind == "epsilon":
            raise DataError(
                f"{where}: rescale_betas_zero_snr leaves nothing to predict noise from at the first timestep; set it to false"
            )
        if self.denoiser.config.time_cond_proj_dim is not None:
            raise DataError(
                f"model.path = {config.path}: the U-Net reads a guidance scale (a latent consistency model), which is not supported"
            )
        # On the CPU, as the scheduler does it: its levels must be found in the table to the bit.
        self.table = level_of(scheduler.alphas_cumprod.cpu()).to(device)
        self.highest_level = float(self.table[-1])

    def prepare(self) -> None:
        """Put the DDIM scheduler in the place of one that is neither DDIM nor Euler."""
        from diffusers import DDIMScheduler

        scheduler = self.pipe.scheduler
        if type(scheduler).__name__ not in self.schedulers and "beta_schedule" in scheduler.config:
            self.pipe.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
            self.replaced = True

    replaced = False
    """Whether the folder's scheduler is not the one that is used."""

    def conditions(self, text: TextEmbeds) -> dict[str, Any]:
        """Arguments of the U-Net besides the text's tokens."""
        return {}

    def size_rule(self) -> tuple[int, int, int, int | None]:
        """A multiple of what the U-Net halves."""
        settings, scale = self.denoiser.config, self.pipe.vae_scale_factor
        unit = scale * 2 ** (len(settings.block_out_channels) - 1)
        return settings.in_channels, settings.sample_size * scale, unit, None

    def timestep(self, t: Tensor) -> Tensor:
        """The timestep of each noise level, between two whole ones by the ratio of noise to signal, as the scheduler does it."""
        t = t.clamp(self.table[0], self.table[-1])
        high = torch.searchsorted(self.table, t).clamp(min=1)
        low, ratios = high - 1, (self.table / (1 - self.table)).double()
        part = ((t / (1 - t)).double() - ratios[low]) / (ratios[high] - ratios[low])
        # A level of the table is met exactly; with a vanishing signal the last ratio is infinite.
        return torch.where(t == self.table[high], high.double(), low + part.nan_to_num(0.0)).float()

    def denoise(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """The velocity that the predicted noise, or v, implies."""
        level = t.view(-1, 1, 1, 1)
        scale = (level**2 + (1 - level) ** 2).sqrt()
        x = latents / scale
        guess = self.denoiser(
            x.to(self.dtype), self.timestep(t), encoder_hidden_states=text.tokens, return_dict=False, **self.conditions(text)
        )[0].float()  # fmt: skip
        if self.pipe.scheduler.config.prediction_type == "epsilon":
            return (guess - latents) / (1 - level)
        return (guess + (2 * level - 1) * x) / scale

    def levels(self, steps: int) -> Tensor:
        """Those of the scheduler's timesteps, and of what it takes for the end: 0, or the first timestep's."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        if self._euler:
            ratios = scheduler.sigmas.cpu()
            return (ratios / (1 + ratios)).to(self.device, torch.float32)
        end = level_of(scheduler.final_alpha_cumprod.cpu().view(1)).to(self.device)
        return torch.cat([self.table[scheduler.timesteps], end])

    def start(self, noise: Tensor, t: Tensor) -> Tensor:
        """Noise as the scheduler scales it: with the variance of a noised picture, or of the noise in it alone."""
        alone = self._euler and self.pipe.scheduler.config.timestep_spacing != "leading"
        return noise * (t if alone else (t**2 + (1 - t) ** 2).sqrt())

    def finish(self, latents: Tensor, t: Tensor) -> Tensor:
        """As the scheduler hands it to the image decoder: DDIM the variance-preserving state, Euler x0 plus what noise is left."""
        return latents / (1 - t if self._euler else (t**2 + (1 - t) ** 2).sqrt())

    @property
    def _euler(self) -> bool:
        return type(self.pipe.scheduler).__name__ == "EulerDiscreteScheduler"

    def snippet_setup(self) -> list[str]:
        """The scheduler that the model was trained with."""
        if not self.replaced:
            return []
        return [
            "from diffusers import DDIMScheduler",
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)",
        ]

    @classmethod
    def sizes(cls, config: Any, networks: Mapping[str, Mapping[str, Any]]) -> Sizes | None:
        """Each resolution has its blocks on the way down and one more on the way up, the last one those in the middle as well."""
        denoiser, scale, text = networks[cls.part], vae_scale(networks), networks["text_encoder"]
        side = (config.resolution or denoiser["sample_size"] * scale) // scale
        widths, blocks = denoiser["block_out_channels"], 2 * denoiser["layers_per_block"] + 1
        depth = denoiser.get("transformer_layers_per_block", 1)
        depths = depth if isinstance(depth, list) else [depth] * len(widths)
        depths = [d * ("CrossAttn" in name) for d, name in zip(depths, denoiser["down_block_types"], strict=True)]
        areas = [(side // 2**k) ** 2 * width for k, width in enumerate(widths)]
        residual = sum(blocks * area for area in areas) + 2 * areas[-1]
        attention = sum(blocks * area * d for area, d in zip(areas, depths, strict=True)) + areas[-1] * max(
            depths[-1], 1
        )
        return Sizes(
            latent=denoiser["in_channels"] * side**2,
            pixels=3 * (side * scale) ** 2,
            text=text["max_position_embeddings"] * denoiser["cross_attention_dim"],
            layer=max(areas),
            kept=round(RESIDUAL * residual + ATTENTION * attention),
        )


def level_of(alphas: Tensor) -> Tensor:
    """Noise levels t of cumulative alphas, by the ratio of noise to signal as the schedulers compute it; 1 without signal."""
    ratios = ((1 - alphas) / alphas) ** 0.5
    return (ratios / (1 + ratios)).nan_to_num(1.0)
