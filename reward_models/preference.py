"""What people prefer, learned from pairs: a head on frozen features whose differences are log-odds (Bradley-Terry).

It looks with a vision backbone, which is blind to the prompt, with a CLIP, which reads it, or with both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from reward_models.clip import ClipScorer
from reward_models.folders import read_folder
from reward_models.heads import PatchHead
from reward_models.vision import VisionBackbone

WEIGHTS, SETTINGS, CARD = "preference.safetensors", "preference.json", "README.md"


@dataclass(frozen=True)
class Design:
    """What a model is made of, besides its weights."""

    backbone: str | None = None
    """Folder of the vision backbone, relative to the model's; None: none."""
    clip: str | None = None
    """Folder of the CLIP, relative to the model's; None: none."""
    layers: tuple[int, ...] = (-1,)
    """Blocks of the vision backbone whose outputs are looked at."""
    size: int | None = None
    """Side of the vision backbone's input in pixels; None: its own."""
    hidden: int = 64
    """Hidden width of the head."""
    temperature: float = 1.0
    """Scores are divided by it, so that the sigmoid of a difference is the share of raters to expect."""
    offset: float = 0.0
    """Mean score of the pictures that were learned from, which is taken away: 0 is an average picture."""


class PreferenceModel(nn.Module):
    """See the module. Backbones are frozen; the head is trained on features that are brought to mean 0 and deviation 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, design: Design, backbone: VisionBackbone | None, clip: ClipScorer | None, device: torch.device):
        super().__init__()
        if backbone is None and clip is None:
            raise ValueError("a preference model needs a vision backbone, a CLIP, or both; neither is there")
        self.design, self.backbone, self.clip, self.device = design, backbone, clip, device
        self.width = (2 * backbone.width if backbone else 0) + (3 * clip.model.config.projection_dim if clip else 0)
        self.head = PatchHead(self.width, design.hidden)
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("std", torch.ones(self.width))
        self.to(device)

    @property
    def reads_prompts(self) -> bool:
        """Whether scores depend on the prompt."""
        return self.clip is not None

    @torch.no_grad()
    def features(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(B, width) float32 of pictures (B, 3, H, W) in [0, 1] and their prompts."""
        parts: list[Tensor] = []
        if self.backbone is not None:
            seen = self.backbone(images)
            parts += [F.normalize(seen.cls, dim=-1), F.normalize(seen.patches, dim=-1).mean(1)]
        if self.clip is not None:
            picture, text = self.clip.image_features(images), self.clip.text_features(texts)
            # The products tell how well picture and prompt fit, direction by direction.
            parts += [picture, text, picture * text]
        return torch.cat(parts, -1).float()

    def judge(self, features: Tensor) -> Tensor:
        """Scores (B,) of features, before calibration."""
        return self.head((features - self.mean) / self.std)

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(B,) float32; between two pictures of a prompt the sigmoid of the difference is the share that prefers the first."""
        raw = self.judge(self.features(images.to(self.device).float(), texts))
        return (raw - self.design.offset) / self.design.temperature

    # ---------------------------------------------------------------------------------------------------------- files
    @classmethod
    def load(cls, folder: Path, device: torch.device) -> PreferenceModel:
        """Read a folder that `save` wrote. Raises OSError or ValueError saying what is missing or wrong."""
        design, weights = read_folder(folder, "a preference model", WEIGHTS, SETTINGS, Design, device)
        model = build(design, folder, device)
        own, given = ({n: tuple(x.shape) for n, x in part.items()} for part in (model.kept(), weights))
        if own != given:
            odd = sorted(n for n in own.keys() | given.keys() if own.get(n) != given.get(n))[0]
            raise ValueError(f"the weights differ, such as {odd}: {given.get(odd)} given, {own.get(odd)} needed")
        for name, value in model.kept().items():
            value.data.copy_(weights[name])
        return model.requires_grad_(False)

    def kept(self) -> dict[str, Tensor]:
        """What is saved, by name: the head and the statistics of the features."""
        return {**{f"head.{n}": p for n, p in self.head.named_parameters()}, "mean": self.mean, "std": self.std}

    def save(self, folder: Path, card: str) -> None:
        """Write weights, settings and card."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: x.detach().cpu().contiguous() for n, x in self.kept().items()}, folder / WEIGHTS)
        (folder / SETTINGS).write_text(json.dumps(vars(self.design), indent=1) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")


def build(design: Design, folder: Path, device: torch.device) -> PreferenceModel:
    """A model with a fresh head, whose backbones are found from `folder`. Raises OSError or ValueError."""
    backbone = clip = None
    if design.backbone is not None:
        backbone = VisionBackbone.load(folder / design.backbone, device, design.layers, size=design.size)
    if design.clip is not None:
        clip = ClipScorer.load(folder / design.clip, device)
    return PreferenceModel(design, backbone, clip, device)
