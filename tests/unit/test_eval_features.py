"""Features of an evaluation's pictures: computed once, shared, of pictures of any size."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reward_models.vision import VisionBackbone
from t2irl.errors import ConfigError, DataError
from t2irl.evaluation import features
from t2irl.evaluation.features import Features, extractor, lpips_pairs, reference_files
from t2irl.evaluation.settings import Evaluated, Fidelity, Lpips, Pixels, Vision
from t2irl.evaluation.store import Drawn, Store
from t2irl.evaluation.suites.base import Prompt

CPU = torch.device("cpu")
ROW = Drawn("run", "iteration 1", "deployment", "run/iteration_1/deployment", 1, False, {}, "f")


@pytest.fixture
def evaluation(tmp_path: Path, dino_folder: Path) -> tuple[Evaluated, Store]:
    """Three prompts with two pictures each, and reference images of three sizes."""
    real = tmp_path / "real"
    (real / "below").mkdir(parents=True)
    for k, size in enumerate([(20, 30), (64, 64), (40, 24)]):
        noise = np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(noise).save(real / "below" / f"{k}.png")
    settings = Evaluated.model_validate(
        {
            "suite": {"type": "shapes"}, "features": {"pixels": {"type": "pixels"}, "dino": {"type": "vision", "path": dino_folder}},
            "reference_images": real,
        }
    )  # fmt: skip
    store = Store(tmp_path / "out", 0, [Prompt(text) for text in "abc"], 2, [ROW])
    generator = torch.Generator().manual_seed(0)
    for key in store.keys:
        store.save(ROW, key, torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator), "x")
    return settings, store


def test_features_are_those_of_the_backbone_in_the_order_of_the_pictures(
    evaluation: tuple[Evaluated, Store], dino_folder: Path
) -> None:
    settings, store = evaluation
    own = Features(settings, store, "dino", CPU)
    own.compute([ROW])
    backbone = VisionBackbone.load(dino_folder, CPU)
    with torch.no_grad():
        expected = backbone(store.load(ROW, store.keys).float().div(255)).cls
    np.testing.assert_allclose(own.of(ROW).reshape(6, -1), expected.numpy(), atol=1e-5)
    assert own.of(ROW).shape[:2] == (3, 2)
    assert settings.reference_images is not None
    assert own.references(settings.reference_images).shape == (3, expected.shape[1])


def test_what_is_there_is_not_computed_again(
    evaluation: tuple[Evaluated, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, store = evaluation
    Features(settings, store, "pixels", CPU).compute([ROW])
    monkeypatch.setattr(features, "extractor", lambda *a: pytest.fail("computed again"))
    Features(settings, store, "pixels", CPU).compute([ROW])
    next(store.out.rglob("000000-*.npy")).unlink()
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        Features(settings, store, "pixels", CPU).compute([ROW])


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"features\.v\.path = .*none"):
        extractor("v", Vision(path=tmp_path / "none"), CPU)
    with pytest.raises(DataError, match="holds 0 pictures"):
        reference_files(tmp_path)
    assert extractor("p", Pixels(), CPU)(torch.zeros(2, 3, 20, 30, dtype=torch.uint8)).shape == (2, 768)


@pytest.mark.parametrize(
    ("package", "make"),
    [("torch_fidelity", lambda: extractor("f", Fidelity(), CPU)), ("lpips", lambda: lpips_pairs(Lpips(), CPU))],
)
def test_a_missing_package_is_named(package: str, make: Any) -> None:
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(ConfigError, match=f"pip install {package.replace('_', '-')}"):
            make()
    else:
        pytest.skip(f"{package} is installed")


def test_lpips_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a random trunk, whose weights need no download: 0 for equal pictures, the mean over pairs otherwise."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    monkeypatch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))
    measure = lpips_pairs(Lpips(size=64), CPU)
    x = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    assert measure(x[[0, 0, 0]]) == pytest.approx(0, abs=1e-6)
    pairs = [measure(x[[a, b]]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert measure(x) == pytest.approx(sum(pairs) / 3, rel=1e-4) and min(pairs) > 0
    assert np.isnan(measure(x[:1]))
