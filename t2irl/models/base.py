"""The interface of a model family, and what all families share: text cache, guidance, work counters."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from t2irl.config import Strict
from t2irl.types import TextEmbeds

if TYPE_CHECKING:
    from t2irl.sharding import Company

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TEXT_UNIT = 32
"""Blocks are compiled for each length of text: where there is a mask, for multiples of this alone."""


@dataclass(frozen=True)
class Sizes:
    """What one image needs of memory, in elements, as a model folder's JSON files tell."""

    latent: int
    """Latents of one image."""
    pixels: int
    """One RGB image."""
    text: int
    """One encoded prompt."""
    layer: int
    """Channels times tokens in the widest layer of one denoiser row."""
    kept: int
    """The same summed over all layers."""

    @classmethod
    def of_transformer(cls, latent: int, pixels: int, text: int, tokens: int, width: int, layers: int) -> Sizes:
        """Of a denoiser with equal layers."""
        return cls(latent, pixels, text, tokens * width, tokens * width * layers)


class ModelFamily:
    """One family of text-to-image models, built as `ModelFamily(config, device)`, which loads the weights.

    The denoiser is frozen here; `Policy` decides what is trained.
    """

    class Config(Strict):
        """Settings that every family has."""

        type: str
        """File name in `t2irl/models/`, or `package.module:Class`."""
        path: Path
        """Folder of a diffusers pipeline."""
        precision: Literal["fp32", "bf16", "fp16"] = "fp32"
        """Dtype of frozen weights and of the denoiser's matrix products. Trained weights, latents and log-probabilities are
        float32 in any case."""
        vae_precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of the image decoder."""
        resolution: PositiveInt | None = None
        """Side of the images in pixels; null: the model's own."""
        gradient_checkpointing: bool = False
        """Recompute activations in the backward pass: less memory, about a third more time."""
        text_cache: NonNegativeInt = 4096
        """Encoded prompts kept in host memory; each prompt in it is encoded once per run."""

    lora_targets: tuple[str, ...]
    """Linear layers that get an adapter by default."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of one image's latents."""
    denoiser: Any
    """The network whose weights are the policy: a diffusers model with `add_adapter`."""
    highest_level: float = 1.0
    """The largest noise level that the denoiser knows."""
    guidance_in_one_call: bool = True
    """Both branches of guidance in one call, or one after the other (`speed.guidance_in_one_call`)."""
    compiled: bool = False
    """Whether blocks are compiled, so that calls with and without gradient may round differently."""
    company: Company | None = None
    """Keeps denoiser calls the same on all processes where weights are spread over them."""

    def __init__(self, config: Any, device: torch.device):
        self.config, self.device = config, device
        self.work: Counter[str] = Counter()
        self._text: OrderedDict[str, TextEmbeds] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> TextEmbeds:
        """Encode prompts, one row each, on `device`."""
        raise NotImplementedError

    def denoise(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity v = x1 - x0 at noise levels `t` (B,), unguided, in any floating dtype."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) -> images (B, 3, H, W) float32 in [0, 1]."""
        raise NotImplementedError

    def encode_images(self, images: Tensor) -> Tensor:
        """The inverse of `decode`, without noise: images (B, 3, H, W) float32 in [0, 1] -> clean latents float32."""
        raise NotImplementedError

    def levels(self, steps: int) -> Tensor:
        """The model's own schedule: `steps` + 1 noise levels from about 1 to 0, float32, on `device`."""
        raise NotImplementedError

    def start(self, noise: Tensor, t: Tensor) -> Tensor:
        """Standard normal noise (B, C, h, w) -> the state at the first noise level `t`, a scalar."""
        return noise

    def finish(self, latents: Tensor, t: Tensor) -> Tensor:
        """The state at the last noise level `t`, a scalar -> clean latents."""
        return latents

    def guide(self, v_null: Tensor, v_text: Tensor, guidance: float) -> Tensor:
        """The guided velocity, both branches given in float32."""
        return v_null + guidance * (v_text - v_null)

    @classmethod
    def sizes(cls, config: Any, networks: Mapping[str, Mapping[str, Any]]) -> Sizes | None:
        """Sizes for `t2irl check`, from the model's config and the config.json of each network of its folder.

        None where that is not known. A KeyError or TypeError counts as not known too: the folder is laid out otherwise.
        """
        return None

    def save_lora(self, folder: Path, weights: dict[str, Tensor]) -> Path:
        """Write adapter weights (scale folded in) as this family's pipelines load them; returns the file."""
        raise NotImplementedError

    def save_denoiser(self, folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
        """Write the whole denoiser as this family's pipelines load it; returns its folder.

        `weights`: all of its parameters, given where each process holds a part of them only.
        """
        raise NotImplementedError

    def sample_pipeline(
        self, trained: Path | None, prompt: str, latents: Tensor, steps: int, guidance: float, negative: str
    ) -> Tensor:
        """One image by a fresh stock pipeline, (3, H, W) float32 in [0, 1] on the CPU.

        `trained`: what `save_lora` or `save_denoiser` wrote, None for the base model. `latents`: (1, C, h, w) initial noise.
        """
        raise NotImplementedError

    def loading_snippet(self, trained: Path, prompt: str, steps: int, guidance: float, negative: str) -> str:
        """Python that draws a picture with an exported file or folder."""
        raise NotImplementedError

    def null(self, negative: str) -> TextEmbeds:
        """The unconditional branch's text, one row on `device`."""
        return self.text([negative])

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> TextEmbeds:
        """Rows for `prompts` on `device`; a prompt met before comes from the cache."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._text]
        fresh: dict[str, TextEmbeds] = {}
        if new:
            self.work["encoded_prompts"] += len(new)
            rows = self.encode(new)
            fresh = {p: rows[i : i + 1].trimmed() for i, p in enumerate(new)}
        found = [fresh[p] if p in fresh else self._text[p].to(self.device) for p in prompts]
        for prompt in prompts:
            if prompt in self._text:
                self._text.move_to_end(prompt)
            elif self.config.text_cache:
                self._text[prompt] = fresh[prompt].to("cpu")
        while len(self._text) > self.config.text_cache:
            self._text.popitem(last=False)
        return TextEmbeds.cat(found)

    def velocity(
        self, latents: Tensor, t: Tensor, text: TextEmbeds, null: TextEmbeds | None, guidance: float
    ) -> Tensor:
        """Guided velocity in float32, see `guide`; 1 skips the null branch.

        `text` has a row per image, `null` one row.
        """
        if guidance == 1 or null is None:
            return self._counted(latents, t, text)
        n = len(latents)
        if not self.guidance_in_one_call:
            v_null = self._counted(latents, t, null[[0] * n])
            result = self.guide(v_null, self._counted(latents, t, text), guidance)
        else:
            rows = TextEmbeds.cat([null[[0] * n], text])
            v_null, v_text = self._counted(torch.cat([latents, latents]), torch.cat([t, t]), rows).chunk(2)
            result = self.guide(v_null, v_text, guidance)
        return result

    def _counted(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        images = len(latents)
        self.work["denoiser_forward_calls"] += 1
        self.work["denoiser_forward_images"] += images
        if self.company is None:
            result = self.compute(latents, t, text)
        else:
            result = self.company.call(lambda: self.compute(latents, t, text))
        if result.requires_grad:
            result.register_hook(lambda grad: self._count_backward(images))
        return result

    def compute(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """`denoise` in the model's precision, float32; not counted as work."""
        dtype = DTYPES[self.config.precision]
        if self.compiled:
            text = text.padded(TEXT_UNIT)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.denoise(latents, t, text).float()

    def _count_backward(self, images: int) -> None:
        self.work["denoiser_backward_images"] += images

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Clean latents -> (B, 3, H, W) uint8 on `device`, rounded as a saved picture is."""
        self.work["decoded_images"] += len(latents)
        return self._eight_bit(latents)

    @property
    def encodes_images(self) -> bool:
        """Whether `encode_images` is there."""
        return type(self).encode_images is not ModelFamily.encode_images

    @torch.no_grad()
    def redrawn(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 through the image encoder and decoder, as if the model had drawn them."""
        return self._eight_bit(self.encode_images(images.to(self.device).float().div(255)))

    def _eight_bit(self, latents: Tensor) -> Tensor:
        return self.decode(latents).mul(255).round().to(torch.uint8)
