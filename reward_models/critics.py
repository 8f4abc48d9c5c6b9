"""Networks that judge pictures in two parts: a frozen one, `embed`, and one that learns, `judge`. `score` is the reward.

What the loss looks at and what the reward is come from the same function, unless they are told to differ.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.clip import ClipScorer
from reward_models.heads import PatchHead
from reward_models.vision import VisionBackbone

Norm = Literal["none", "l2"]
Tensors = tuple[Tensor, ...]


class DinoCritic:
    """A frozen backbone and one head for the picture as a whole (`global`) and for its patches (`local`).

    `patches`: how many random patches of a picture are looked at, drawn with replacement; None for all. Weights are of the
    mean logit of the picture and of its patches.

    Features of a second picture after those of the first, (whole, patches, whole, patches), make it a judge of pairs: the head,
    which is then twice as wide, sees the product and the distance of the two, and of each patch and the most alike one there.
    """

    has_zero = True

    def __init__(
        self,
        backbone: VisionBackbone,
        head: PatchHead,
        score_weights: tuple[float, float],
        loss_weights: tuple[float, float],
        norm: Norm = "l2",
        score_norm: Norm = "l2",
        patches: int | None = None,
    ):
        self.backbone, self.head, self.patches = backbone, head, patches
        self.pairs = head.first.in_features == 2 * backbone.width
        self.score_weights = score_weights
        self.norm: Norm = norm
        self.score_norm: Norm = score_norm
        self.loss_weights = {name: w for name, w in zip(("global", "local"), loss_weights, strict=True) if w}
        self.trained = dict(head.named_parameters())

    def embed(self, images: Tensor) -> Tensors:
        """Features of the whole (B, D) and of the patches (B, N, D), of pictures (B, 3, H, W) in [0, 1]."""
        features = self.backbone(images)
        return features.cls, features.patches

    def judge(self, features: Tensors, texts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Logits for the loss: `global` (B, 1) and `local` (B, patches). Texts are not looked at."""
        return self._logits(features, seeds, self.norm)

    def score(self, features: Tensors, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Weighted mean logits, (B,)."""
        logits = self._logits(features, seeds, self.score_norm)
        return sum(w * x.mean(1) for w, x in zip(self.score_weights, logits.values(), strict=True))  # type: ignore[return-value]

    def _logits(self, features: Tensors, seeds: Sequence[int], norm: Norm) -> dict[str, Tensor]:
        whole, patches, *beside = features
        if self.patches is not None:
            patches = patches[torch.arange(len(patches))[:, None], self._places(seeds, patches.shape[1])]
        if norm == "l2":
            whole, patches, *beside = (F.normalize(x, dim=-1) for x in (whole, patches, *beside))
        if beside:
            whole, patches = relation(whole, beside[0]), relation(patches, most_alike(patches, beside[1]))
        return {"global": self.head(whole)[:, None], "local": self.head(patches)}

    def _places(self, seeds: Sequence[int], count: int) -> Tensor:
        """Patches to look at, (B, patches); each picture's own seed, so that scores do not depend on its neighbours."""
        generator, rows = torch.Generator(), []
        for seed in seeds:
            generator.manual_seed(seed)
            rows.append(torch.randint(count, (self.patches or 0,), generator=generator))
        return torch.stack(rows)

    def fingerprint(self) -> str:
        """Names the frozen part: a hash of its weights, layers and size."""
        return self.backbone.fingerprint()

    def settings(self) -> dict[str, Any]:
        """What the score depends on."""
        return {
            "backbone": self.fingerprint(), "hidden": self.head.first.out_features,
            "spectral_norm": self.head.spectral_norm, "score_norm": self.score_norm,
            "score_weights": list(self.score_weights), "patches": self.patches,
        } | ({"pairs": True} if self.pairs else {})  # fmt: skip


def relation(one: Tensor, other: Tensor) -> Tensor:
    """What two vectors (..., D) have to do with each other: product and absolute difference, (..., 2 D)."""
    return torch.cat([one * other, (one - other).abs()], -1)


def most_alike(patches: Tensor, others: Tensor) -> Tensor:
    """For each of the patches (B, N, D) the one of `others` (B, M, D) with the largest cosine: (B, N, D)."""
    nearest = (patches.detach() @ F.normalize(others, dim=-1).transpose(1, 2)).argmax(-1, keepdim=True)
    return others.gather(1, nearest.expand(-1, -1, others.shape[-1]))


class ClipCritic:
    """CLIP, or a preference model built on it such as PickScore, whose last image blocks learn. All else is frozen.

    The score is exp(logit_scale) x cosine / scale.
    """

    loss_weights = {"score": 1.0}
    has_zero = False

    def __init__(self, scorer: ClipScorer, blocks: int, scale: float, dtype: torch.dtype = torch.float32):
        vision = scorer.model.vision_model
        layers = vision.encoder.layers
        if not 1 <= blocks <= len(layers):
            raise ValueError(
                f"tune_layers = {blocks}: the image tower has {len(layers)} blocks, so use 1 to {len(layers)}"
            )
        self.scorer, self.blocks, self.scale, self.dtype = scorer, blocks, scale, dtype
        self.front = _with_layers(vision.encoder, layers[: len(layers) - blocks])
        self.back = _with_layers(vision.encoder, layers[len(layers) - blocks :])
        # Parameters, one by one: a flag set on a module freezes nothing.
        self.back.layers.to(dtype).requires_grad_(True)
        self.trained = {f"layers.{name}": p for name, p in self.back.layers.named_parameters()}
        self.factor = float(scorer.model.logit_scale.exp())

    def embed(self, images: Tensor) -> Tensors:
        """Hidden states before the blocks that learn, (B, tokens, width), of pictures (B, 3, H, W) in [0, 1]."""
        vision = self.scorer.model.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(self.scorer.preprocess(images)))
        return (self.front(inputs_embeds=hidden).last_hidden_state,)

    def judge(self, features: Tensors, texts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
        """`score`: exp(logit_scale) x cosine, (B, 1)."""
        model = self.scorer.model
        hidden = self.back(inputs_embeds=features[0].to(self.dtype)).last_hidden_state
        pooled = model.vision_model.post_layernorm(hidden[:, 0].float())
        pictures = F.normalize(model.visual_projection(pooled), dim=-1)
        return {"score": self.factor * (pictures * self.scorer.text_features(texts)).sum(-1, keepdim=True)}

    def score(self, features: Tensors, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The reward, (B,)."""
        return self.judge(features, texts, seeds)["score"][:, 0] / self.scale

    def fingerprint(self) -> str:
        """Names the frozen part: a hash of all weights that do not learn."""
        digest, trained = hashlib.sha256(), {id(p) for p in self.trained.values()}
        for name, weights in self.scorer.model.named_parameters():
            if id(weights) not in trained:
                digest.update(f"{name} {tuple(weights.shape)}".encode())
                digest.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def settings(self) -> dict[str, Any]:
        """What the score depends on."""
        return {"frozen": self.fingerprint(), "tune_layers": self.blocks, "scale": self.scale}


def _with_layers(encoder: nn.Module, layers: nn.ModuleList) -> Any:
    """The encoder with some of its layers; parameters are shared."""
    part = copy.copy(encoder)
    part._modules = dict(encoder._modules)
    part.layers = layers
    return part
