"""Model families with random weights, made on the device from a folder's configs: nothing is downloaded or read from disk.

Text encoders are left out. A prompt's embedding is random numbers of the right shape, seeded by the prompt, so encoding costs
nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import diffusers
import torch
from torch import nn

from t2irl.models.flux import Flux
from t2irl.models.qwen_image import QwenImage
from t2irl.models.sd3 import SD3
from t2irl.pipelines.family import PipelineFamily
from t2irl.types import TextEmbeds

CLIP_TOKENS = 77
QWEN_TOKENS = 64
"""Of a prompt of usual length, after the instruction is dropped."""


class Random(PipelineFamily):
    """Weights and text embeddings of random numbers, the same ones for the same seed in every precision."""

    seed = 0
    text_tokens: int
    """Of a prompt."""
    masked = False
    """Whether text comes with a mask."""

    def left_out(self, index: Any) -> dict[str, Any]:
        """Nothing is loaded."""
        return {}

    def load(self, index: Any, torch_dtype: Any, **arguments: Any) -> Any:
        """The pipeline, its networks made where they are used."""
        kind, names = getattr(diffusers, index["_class_name"]), [n for n in index if not n.startswith("_")]
        parts: dict[str, Any] = dict.fromkeys(names)
        for name in (self.part, "vae"):
            dtype = torch_dtype.get(name, torch_dtype["default"])
            parts[name] = random_network(self.config.path / name, index[name][1], self.device, dtype, self.seed)
        parts["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(self.config.path / "scheduler")
        absent = {n: None for pair in self.encoders.items() for n in pair}
        return kind(**{n: parts[n] for n in parts if n not in self.unused} | absent)

    def encode_prompts(self, prompts: list[str]) -> TextEmbeds:
        """Normal numbers, as many as the real encoders give."""
        settings, rows = self.denoiser.config, []
        pooled = settings.get("pooled_projection_dim") or 0
        for prompt in prompts:
            drawn = torch.Generator().manual_seed(crc32(prompt.encode()))
            shape = (self.text_tokens + 1, max(settings.joint_attention_dim, pooled))
            rows.append(torch.randn(shape, generator=drawn))
        table = torch.stack(rows).to(self.device, self.dtype)
        tokens = table[:, 1:, : settings.joint_attention_dim]
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=self.device) if self.masked else None
        return TextEmbeds(tokens, table[:, 0, :pooled], mask)


class RandomSD3(Random, SD3):
    """SD3 and SD3.5."""

    def __init__(self, config: Any, device: torch.device):
        self.text_tokens = CLIP_TOKENS + config.max_sequence_length
        super().__init__(config, device)


class RandomFlux(Random, Flux):
    """FLUX.1."""

    def __init__(self, config: Any, device: torch.device):
        self.text_tokens = config.max_sequence_length
        super().__init__(config, device)


class RandomQwenImage(Random, QwenImage):
    """Qwen-Image."""

    masked = True

    def __init__(self, config: Any, device: torch.device):
        self.text_tokens = min(QWEN_TOKENS, config.max_sequence_length)
        super().__init__(config, device)


FAMILIES: dict[str, type[Random]] = {"sd3": RandomSD3, "flux": RandomFlux, "qwen_image": RandomQwenImage}
"""`model.type` -> the same with random weights."""


@contextmanager
def building(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, new modules are on a device and of a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_network(folder: Path, kind: str, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """A network from its config.json. Weights are drawn in float32, uniform up to 1 / sqrt(inputs), so that activations stay
    finite and every precision rounds the same numbers."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with building(device, dtype):
        network = getattr(diffusers, kind).from_config(config)
    drawn = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                bound = parameter[0].numel() ** -0.5
                numbers = torch.rand(parameter.shape, generator=drawn, device=device, dtype=torch.float32)
                parameter.copy_(numbers.mul_(2 * bound).sub_(bound))
            else:
                parameter.copy_(parameter.round())  # norms keep their ones, biases become 0
    return network
