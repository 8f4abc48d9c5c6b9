"""Vision backbones: from a picture to a vector of the whole (CLS) and one of each patch.

The features that training and scoring use are the same by construction: there is one preprocessing, one forward pass and
one `l2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.fingerprint import fingerprint
from reward_models.pixels import fit_square
from reward_models.vision_loaders import Network, load_network


@dataclass(frozen=True)
class Features:
    """What a backbone says of B pictures. D is the backbone's width times the number of chosen layers."""

    cls: Tensor
    """(B, D) float32: the picture as a whole."""
    patches: Tensor
    """(B, N, D) float32: its patches, row by row."""

    def __len__(self) -> int:
        return len(self.cls)

    def __getitem__(self, rows: Any) -> Features:
        return Features(self.cls[rows], self.patches[rows])

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Pictures of several, in order."""
        return Features(torch.cat([p.cls for p in parts]), torch.cat([p.patches for p in parts]))


def l2(features: Features) -> Features:
    """Every vector at unit length."""
    return Features(F.normalize(features.cls, dim=-1), F.normalize(features.patches, dim=-1))


class VisionBackbone(nn.Module):
    """A vision transformer, always in evaluation mode, of which the last blocks may be trained.

    Features are differentiable with respect to the images and to the trained blocks.
    """

    width: int
    """Length of a feature vector: the network's width times the number of chosen layers."""
    patch_size: int
    """Side of a patch in pixels."""
    size: int
    """Side of the square that the network sees, in pixels."""
    blocks: tuple[nn.Module, ...]
    """The transformer blocks, first to last."""
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Network,
        device: torch.device,
        layers: Sequence[int] = (-1,),
        trainable_blocks: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        """See `load`."""
        super().__init__()
        count = len(network.blocks)
        wrong = [n for n in layers if not -count <= n < count]
        if wrong or not layers:
            raise ValueError(f"layers = {list(layers)}: the network has {count} blocks, so use {-count} to {count - 1}")
        if len({n % count for n in layers}) < len(layers):
            raise ValueError(f"layers = {list(layers)}: a layer stands there twice")
        if not 0 <= trainable_blocks <= count:
            raise ValueError(f"trainable_blocks = {trainable_blocks}: the network has {count} blocks")
        self.model = network.model.eval().requires_grad_(False).to(device, torch.float32)
        self.blocks, self._network = tuple(network.blocks), network
        self._chosen = tuple(n % count for n in layers)
        self.width, self.patch_size, self.size = network.width * len(layers), network.patch_size, network.size
        self.trainable_blocks = trainable_blocks
        frozen, trained = self.blocks[: count - trainable_blocks], self.blocks[count - trainable_blocks :]
        for block in trained:
            block.requires_grad_(True)
        if frozen and dtype != torch.float32:
            for block in frozen:
                _cast_inputs(block.to(dtype), dtype)  # every one: rotary embeddings reach each block by themselves
            _cast_inputs(trained[0] if trained else network.norm, torch.float32)
        self.register_buffer("mean", torch.tensor(network.mean, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(network.std, device=device).view(1, 3, 1, 1), persistent=False)
        self._fingerprint: str | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device,
        layers: Sequence[int] = (-1,),
        trainable_blocks: int = 0,
        size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> VisionBackbone:
        """Read a model folder: transformers, timm or open_clip, see `vision_loaders`.

        `layers`: blocks whose outputs are taken, after the final normalisation, and joined; negative ones count from the
        end. `trainable_blocks`: so many last blocks are trained, in float32. `size`: side of the input in pixels, None for
        the folder's own. `dtype`: of the frozen blocks, which are nearly all of the network. Raises OSError or ValueError saying what is missing or wrong.
        """
        return cls(load_network(Path(folder), size), device, layers, trainable_blocks, dtype)

    def train(self, mode: bool = True) -> VisionBackbone:
        """Evaluation mode in any case: what is trained on and what is scored with are the same function."""
        return super().train(False)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, float32, by name; none when the backbone is frozen."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> (B, 3, size, size) normalised."""
        images = fit_square(images.to(self.mean.device).float(), self.size)
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Features:
        """Features of images (B, 3, H, W) in [0, 1]."""
        network, found = self._network, dict[int, Tensor]()

        def keep(place: int) -> Any:
            return lambda module, args, output: found.__setitem__(place, _tensor(output))

        hooks = [self.blocks[n].register_forward_hook(keep(n)) for n in self._chosen]
        try:
            network.run(self.preprocess(images))
        finally:
            for hook in hooks:
                hook.remove()
        whole, patches = [], []
        for place in self._chosen:
            tokens = network.norm(found[place].float())
            whole.append(tokens[:, 0] if network.pool is None else network.pool(tokens))
            patches.append(tokens[:, network.prefix :])
        return Features(torch.cat(whole, -1), torch.cat(patches, -1))

    def fingerprint(self) -> str:
        """Names the function from pictures to features: weights, layers, size. Raises ValueError for a trained backbone."""
        if self.trainable_blocks:
            raise ValueError("a backbone that is trained has no fixed features")
        if self._fingerprint is None:
            settings = (self._chosen, self.size, self._network.mean, self._network.std)
            self._fingerprint = fingerprint(settings, self.model.state_dict())
        return self._fingerprint


def _tensor(output: Any) -> Tensor:
    """A block's hidden states; some versions of some libraries wrap them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _cast_inputs(module: nn.Module, dtype: torch.dtype) -> None:
    """Have floating tensors cast before they enter a module."""

    def cast(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(cast, value))
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return cast(args), {name: cast(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(hook, with_kwargs=True)
