"""What the policy's own model makes of reference images, and a warning when that is something else."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from t2irl import registry
from t2irl.models.base import ModelFamily
from t2irl.reencoding import Reencoded
from t2irl.references import ReferenceImages
from t2irl.shapes.captions import sample_captions
from t2irl.shapes.render import sample_scene
from t2irl.shapes.styles import STYLES, style_of
from t2irl.shapes.verify import read


def family(path: str) -> ModelFamily:
    kind = registry.find("models", "sd3")
    config = kind.Config.model_validate({"type": "sd3", "path": path, "precision": "fp32", "max_sequence_length": 0})
    return registry.build("models", config, torch.device("cpu"))


def drawings(folder: Path, style: str) -> tuple[ReferenceImages, list[Path]]:
    rng, files = np.random.default_rng(5), []
    for number, caption in enumerate(sample_captions(24, rng)):
        files.append(folder / f"{style}{number}.png")
        Image.fromarray(STYLES[style](sample_scene(caption, rng))).save(files[-1])
    return ReferenceImages({"all": tuple(files)}), files


def in_style(model: ModelFamily, images: ReferenceImages, files: list[Path], style: str) -> float:
    redrawn = torch.stack(Reencoded(images, model, True, "reward x").pictures(files, 64))
    return sum(style_of(*row) == style for row in read(redrawn)) / len(files)


@pytest.mark.parametrize("style", ["outlined", "pastel"])
def test_a_model_of_several_styles_can_draw_them(tmp_path: Path, style: str) -> None:
    images, files = drawings(tmp_path, style)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_style(family("assets/tiny-sd3-styles"), images, files, style) > 0.8


def test_a_model_that_cannot_draw_a_style_is_named(tmp_path: Path) -> None:
    images, files = drawings(tmp_path, "outlined")
    with pytest.warns(UserWarning, match=r"reward x: .* leave \d\d\.\d dB of these reference images \(22 or more"):
        assert in_style(family("assets/tiny-sd3"), images, files, "outlined") < 0.2


def test_known_pictures_bring_no_warning(tmp_path: Path) -> None:
    images, files = drawings(tmp_path, "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_style(family("assets/tiny-sd3"), images, files, "plain") == 1


def test_a_model_of_several_styles_draws_them_unasked() -> None:
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained("assets/tiny-sd3-styles", dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    texts = [c.text for c in sample_captions(48, np.random.default_rng(2), heldout=True)]
    call = dict(num_inference_steps=10, guidance_scale=1.0, max_sequence_length=0, output_type="pt")
    images = pipe(texts, generator=torch.Generator().manual_seed(1), **call).images
    drawn = [style_of(*row) for row in read(images)]
    assert drawn.count("plain") > 16 and drawn.count("pastel") > 4
