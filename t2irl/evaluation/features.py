"""Features of pictures for diversity and distances; every batch is computed once and kept."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward_models.dreamsim import DreamSim
from reward_models.vision import VisionBackbone
from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.diversity import coarse_pixels
from t2irl.evaluation.generate import bar
from t2irl.evaluation.settings import Evaluated, Fidelity, Lpips, Perceptual, Pixels, Vision
from t2irl.evaluation.store import Drawn, Store, read_picture, settings_key
from t2irl.geometry import even_chunks
from t2irl.models.base import DTYPES
from t2irl.utils import distributed
from t2irl.utils.tracking import write_atomic

BATCH = 64
"""Pictures in one call of an extractor."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LAYERS = {"inception-v3-compat": "2048", "vgg16": "fc2_relu", "clip-vit-b-32": "clip", "dinov2-vit-l-14": "dinov2"}
"""The layer of each of torch-fidelity's extractors that distances are usual with."""
Extract = Callable[[Tensor], Tensor]
"""(B, 3, H, W) uint8 -> (B, D)."""


def extractor(name: str, config: Vision | Fidelity | Pixels | Perceptual, device: torch.device) -> Extract:
    """The function that a setting describes. Raises DataError or ConfigError for one that cannot be had."""
    if isinstance(config, Pixels):
        return coarse_pixels
    if isinstance(config, Fidelity):
        return _fidelity(name, config, device)
    try:
        if isinstance(config, Perceptual):
            network = DreamSim.load(config.path, device, config.variant, DTYPES[config.precision])
            return lambda images: network.embed(images.to(device).float().div(255))
        return vision(config, device)
    except (OSError, ValueError) as error:
        raise DataError(f"features.{name}.path = {config.path}: {error}") from error


def vision(config: Vision, device: torch.device) -> Extract:
    """Features of a vision transformer. Raises OSError or ValueError where the folder holds none."""
    backbone = VisionBackbone.load(config.path, device, size=config.size, dtype=DTYPES[config.precision])

    def extract(images: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [backbone(images[rows].to(device).float().div(255)) for rows in even_chunks(len(images), BATCH)]
        return torch.cat([found.cls if config.token == "cls" else found.patches.mean(1) for found in parts])

    return extract


def looker(path: Path | None, device: torch.device) -> Extract:
    """What a run's monitors compare pictures by: `monitors.features`. Raises DataError for a folder that holds no backbone."""
    if path is None:
        return lambda images: coarse_pixels(images.cpu())
    try:
        return vision(Vision(path=path), device)
    except (OSError, ValueError) as error:
        raise DataError(f"monitors.features = {path}: {error}") from error


def _fidelity(name: str, config: Fidelity, device: torch.device) -> Extract:
    try:
        from torch_fidelity.utils import create_feature_extractor  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"features.{name}: type fidelity needs `pip install torch-fidelity` ({error})") from error
    weights = None if config.weights is None else str(config.weights)
    try:
        made: Any = create_feature_extractor(
            config.name, [LAYERS[config.name]], cuda=device.type == "cuda", feature_extractor_weights_path=weights
        )
    except (OSError, RuntimeError, AssertionError) as error:  # no network, or another network's weights
        raise DataError(f"features.{name}: torch-fidelity cannot load {config.name}: {error}") from error
    return lambda images: made(images.to(device))[0]


class Features:
    """Rows of features of the pictures of every row of the table, (P, n, D) float32, and of reference images, (N, D)."""

    def __init__(self, settings: Evaluated, store: Store, name: str, device: torch.device):
        self.settings, self.store, self.name, self.device = settings, store, name, device
        self.config = settings.features[name]
        self._folder = store.out / "features" / settings_key(name, self.config)
        self._extract: Extract | None = None

    def compute(self, rows: Sequence[Drawn]) -> None:
        """Compute what is missing of this process's share."""
        for row in rows:
            keys = self.store.keys
            self._batches(
                f"{row.label}: {self.name}",
                row.folder,
                len(keys),
                lambda part, r=row: list(self.store.load(r, self.store.keys[part])),
            )
        if self.settings.reference_images is not None:
            files = reference_files(self.settings.reference_images)
            self._batches(
                f"reference images: {self.name}", _reference_key(self.settings.reference_images), len(files),
                lambda part: [read_picture(file) for file in files[part]],
            )  # fmt: skip

    def of(self, row: Drawn) -> np.ndarray:
        """(P, n, D) of a row's pictures."""
        flat = self._read(row.folder, len(self.store.keys))
        return flat.reshape(len(self.store.prompts), self.store.images, -1)

    def references(self, folder: Path) -> np.ndarray:
        """(N, D) of the pictures of a folder."""
        return self._read(_reference_key(folder), len(reference_files(folder)))

    def _file(self, key: str, part: slice, count: int) -> Path:
        return self._folder / key / f"{part.start:06d}-{part.stop:06d}-{count:06d}.npy"

    def _batches(self, text: str, key: str, count: int, load: Callable[[slice], list[Tensor]]) -> None:
        mine = even_chunks(count, BATCH)[distributed.rank() :: distributed.world_size()]
        todo = [part for part in mine if not self._file(key, part, count).is_file()]
        if not todo:
            return
        with bar(text, len(todo)) as advance, torch.no_grad():
            for part in todo:
                self._extract = self._extract or extractor(self.name, self.config, self.device)
                pictures = load(part)
                # Reference images may be of different sizes.
                alike = len({p.shape for p in pictures}) == 1
                inputs = [torch.stack(pictures)] if alike else [p[None] for p in pictures]
                rows = torch.cat([self._extract(x).float().cpu() for x in inputs])
                data = io.BytesIO()
                np.save(data, rows.numpy())
                file = self._file(key, part, count)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, data.getvalue())
                advance()

    def _read(self, key: str, count: int) -> np.ndarray:
        return np.concatenate([np.load(self._file(key, part, count)) for part in even_chunks(count, BATCH)])


def reference_files(folder: Path) -> list[Path]:
    """The pictures below a folder, in order. Raises DataError if there are fewer than two."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
    if len(files) < 2:
        raise DataError(
            f"reference_images = {folder}: holds {len(files)} pictures ({', '.join(ENDINGS)}); expected many"
        )
    return files


def _reference_key(folder: Path) -> str:
    """Names a set of files: other files, or other sizes, are another set."""
    listing = " ".join(f"{f.relative_to(folder)}:{f.stat().st_size}" for f in reference_files(folder))
    return settings_key("reference_images", str(folder), listing)


def lpips_pairs(config: Lpips, device: torch.device) -> Callable[[Tensor], float]:
    """Mean LPIPS over all pairs of pictures (n, 3, H, W) uint8. Raises ConfigError where it is not installed."""
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"lpips: needs `pip install lpips` ({error})") from error
    network: Any = lpips.LPIPS(net=config.net, verbose=False).eval().to(device)

    def measure(images: Tensor) -> float:
        x = images.to(device).float().div(127.5).sub(1)
        x = torch.nn.functional.interpolate(x, size=(config.size,) * 2, mode="bicubic", antialias=True).clamp(-1, 1)
        first, second = torch.triu_indices(len(x), len(x), 1)
        with torch.no_grad():
            parts = [
                network(x[a], x[b]).flatten() for a, b in zip(first.split(BATCH), second.split(BATCH), strict=True)
            ]
        return float(torch.cat(parts).double().mean()) if len(first) else float("nan")

    return measure
