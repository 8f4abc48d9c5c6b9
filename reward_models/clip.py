"""CLIP as a judge: the cosine between a picture and a text."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from reward_models.clip_weights import clip_from_open_clip, read_weights
from reward_models.pixels import fit_square

TEXT_CACHE = 16_384
"""Text features kept, one row per text."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of pixels, in every CLIP of OpenAI and LAION."""
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Either set is enough."""


class ClipScorer:
    """A frozen CLIP, in float32 unless told otherwise, with its tokenizer and its one preprocessing.

    Scores are differentiable with respect to the images; the weights are frozen. Features of texts are computed once and
    kept.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.model = model.to(dtype).requires_grad_(False).eval().to(device)
        self.tokenizer, self.device, self.dtype = tokenizer, device, dtype
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        self.size: int = model.config.vision_config.image_size
        self.fit = fit_square
        """How pictures become squares."""
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def load(cls, folder: str | Path, device: torch.device, dtype: torch.dtype = torch.float32) -> ClipScorer:
        """Read a transformers CLIPModel folder. Raises OSError or ValueError saying what is missing or wrong."""
        folder = Path(folder)
        missing = [name for name in ("config.json", "preprocessor_config.json") if not (folder / name).is_file()]
        if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
            missing.append("a tokenizer (vocab.json and merges.txt)")
        if missing:
            raise FileNotFoundError(f"not a CLIP model folder: it lacks {', '.join(missing)}")
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "clip":
            raise ValueError(f"config.json says model_type = {kind!r}, but this judge needs 'clip'")
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        absent = [key for key in ("image_mean", "image_std") if len(settings.get(key) or ()) != 3]
        if absent:
            raise ValueError(f"preprocessor_config.json needs three numbers for {' and '.join(absent)}")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(_load_model(folder), tokenizer, settings["image_mean"], settings["image_std"], device, dtype)

    @classmethod
    def load_open_clip(
        cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, quick_gelu: bool = False
    ) -> ClipScorer:
        """Read a folder with one file of open_clip's weights and a tokenizer. Raises OSError or ValueError."""
        files = sorted(f for f in folder.glob("*") if f.suffix in (".pt", ".pth", ".bin", ".safetensors"))
        if len(files) != 1:
            found = ", ".join(f.name for f in files) or "none"
            raise FileNotFoundError(f"expected one file of weights (.pt, .pth, .bin, .safetensors), found {found}")
        if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
            raise FileNotFoundError(
                "it lacks a tokenizer: vocab.json and merges.txt of any CLIP in transformers format"
            )
        model = clip_from_open_clip(read_weights(files[0]), quick_gelu)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(model, tokenizer, MEAN, STD, device, dtype)

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by before a softmax; about 100 for trained models."""
        return float(self.model.logit_scale.detach().float().exp())

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> (B, 3, size, size) normalised: short side resized, centre cut out."""
        images = self.fit(images.to(self.device).float(), self.size)
        return (images - self.mean) / self.std

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B, 3, H, W) in [0, 1]."""
        return self.seen_features(self.preprocess(images))

    def seen_features(self, pixels: Tensor) -> Tensor:
        """The same of pictures that are preprocessed already."""
        pooled = self.model.vision_model(pixel_values=pixels.to(self.dtype)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D). Texts longer than the model's context are cut."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            length = self.model.config.text_config.max_position_embeddings
            # One fixed length: a text's features do not depend on its neighbours.
            ids = self.tokenizer(
                new, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            pooled = self.model.text_model(input_ids=ids.to(self.device)).pooler_output
            self._texts.update(zip(new, F.normalize(self.model.text_projection(pooled).float(), dim=-1), strict=True))
        rows = torch.stack([self._texts[text] for text in texts])
        while len(self._texts) > TEXT_CACHE:
            self._texts.popitem(last=False)
        return rows

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine in [-1, 1] of each image with its text: (B,) float32. Raises ValueError when their numbers differ."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images but {len(texts)} texts; every image needs its own")
        return (self.image_features(images) * self.text_features(texts)).sum(-1)


def _load_model(folder: Path) -> CLIPModel:
    """The network with all its weights. Raises ValueError when some are absent or do not fit."""
    try:
        model, report = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights cannot be read: {error}") from error
    if report["missing_keys"]:
        raise ValueError(
            f"the weights lack {len(report['missing_keys'])} tensors, such as {sorted(report['missing_keys'])[0]}"
        )
    return model
