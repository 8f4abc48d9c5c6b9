"""Planted hacks: what they do to pictures of every size, and what is read off scores."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from t2irl.evaluation.hacks import HACKS, rise
from t2irl.rewards.ocr import Ocr
from t2irl.types import PromptGroups

PROMPTS = ["a red circle above a blue square", "three green squares", ""]


def pictures(side: int) -> Tensor:
    """The same 16 x 16 coloured fields at every size: (1, 3, side, side)."""
    fields = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    return F.interpolate(fields, (side, side), mode="nearest")


@pytest.mark.parametrize("name", list(HACKS))
def test_hacks_change_pictures_within_range_each_by_itself(name: str) -> None:
    images = torch.rand(3, 3, 33, 40, generator=torch.Generator().manual_seed(0)) * 0.8
    changed = HACKS[name](images, PROMPTS)
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 1
    assert not torch.allclose(changed, images) and torch.equal(HACKS[name](images, PROMPTS), changed)
    assert torch.allclose(HACKS[name](images[1:2], PROMPTS[1:2]), changed[1:2], atol=1e-6)


@pytest.mark.parametrize("name", list(HACKS))
def test_hacks_are_as_strong_on_large_pictures(name: str) -> None:
    def change(side: int) -> Tensor:
        return HACKS[name](pictures(side), PROMPTS[:1]) - pictures(side)

    small, medium, large = (change(side) for side in (64, 512, 1024))
    # Seen by a reward that shrinks pictures it is the same change in the same places. Letters of ten pixels are of other shapes
    # than large ones, and a filter sees more in a picture of more pixels; a hack that does not grow differs by 95 % and more.
    alike = 0.8 if name in ("watermark", "pasted_text", "pasted_prompt", "smoothed", "jpeg") else 0.25
    for big in (medium, large):
        seen = F.interpolate(big, (64, 64), mode="area")
        assert float((seen - small).abs().mean() / small.abs().mean()) < alike
        assert 0.5 <= float(seen.abs().mean() / small.abs().mean()) < 1.15
    # Grey edges of small letters touch more pixels, edges of what was enlarged are soft.
    share = [float((c.abs() > 0.02).any(1).double().mean()) for c in (small, medium, large)]
    assert all(0.5 < s / share[0] < 1.8 for s in share[1:]) and share[2] == pytest.approx(share[1], rel=0.1)


def test_at_64_pixels_hacks_are_those_of_the_committed_figures() -> None:
    """By their own words at that size."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    changed = {name: hack(images, PROMPTS[:1]) for name, hack in HACKS.items()}
    letters = (changed["pasted_text"] != images).any(1)
    assert letters.double().mean() == pytest.approx(0.0525, abs=0.005) and not letters[:, :24].any()
    lines = torch.zeros(64, 64, dtype=torch.bool)
    lines[::4], lines[:, ::4] = True, True
    assert torch.allclose(changed["grid_texture"], (images + 0.12 * lines).clamp(0, 1))
    windows = F.pad(images, (2,) * 4, mode="replicate").unfold(2, 5, 1).unfold(3, 5, 1)
    assert torch.equal(changed["smoothed"], windows.flatten(-2).median(-1).values)
    noise = 10 ** (-26 / 20) * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(changed["noisy"], (images + noise).clamp(0, 1))
    data = io.BytesIO()
    Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(data, "JPEG", quality=10)
    again = torch.from_numpy(np.asarray(Image.open(data)).copy()).permute(2, 0, 1)
    assert torch.allclose(changed["jpeg"][0] * 255, again.float(), atol=1e-3)


def test_units_are_of_the_shorter_side() -> None:
    """A wide picture is treated as the square one in its left part, where nothing comes from its right."""
    wide = torch.cat([pictures(512), pictures(512).flip(-1)], -1)
    for name in ("pasted_text", "grid_texture"):
        square = HACKS[name](wide[..., :512], PROMPTS[:1])
        assert torch.equal(HACKS[name](wide, PROMPTS[:1])[..., :512], square)
    grains = HACKS["noisy"](torch.full((1, 3, 512, 1024), 0.5), PROMPTS[:1])
    assert torch.equal(grains, F.interpolate(grains[..., ::8, ::8], scale_factor=8.0, mode="nearest"))
    assert float((grains - 0.5).std()) == pytest.approx(10 ** (-26 / 20), rel=0.03)


def test_the_prompt_can_be_read() -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="needs the extra `ocr`")
    prompt = 'a poster of two otters at a lake, below them the words "fresh fish every morning", soft evening light'
    images = pictures(384).expand(2, -1, -1, -1)
    changed = HACKS["pasted_prompt"](images, [prompt, PROMPTS[1]])
    wanted = [f'"{text}"' for text in (prompt.replace('"', ""), PROMPTS[1])]
    scores = Ocr(Ocr.Config(), torch.device("cpu")).score(changed, PromptGroups.of(wanted, [0, 1], [0, 0]))
    assert scores.min() > 0.9 and torch.equal(changed[..., :192, :], images[..., :192, :])


def test_prompts_that_do_not_fit_and_empty_ones() -> None:
    images = pictures(64)
    long = HACKS["pasted_prompt"](images, ["many words " * 200])
    assert torch.equal(long[..., :32, :], images[..., :32, :]) and not torch.equal(
        long[..., 32:, :], images[..., 32:, :]
    )
    assert torch.equal(HACKS["pasted_prompt"](images, [" "]), images)
    odd = HACKS["pasted_prompt"](torch.rand(1, 3, 8, 8), ["x\ud800\n" * 9])
    assert odd.shape == (1, 3, 8, 8)


def test_rise_in_units_of_the_plain_spread() -> None:
    plain, nan = torch.tensor([0.0, 2.0, 0.0, 2.0]), float("nan")
    assert rise(plain, plain + torch.tensor([1.0, 1.0, 1.0, -1.0])) == (0.75, 0.5)
    assert rise(plain, plain) == (0.0, 0.0) and rise(torch.ones(2), torch.ones(2) * 3) == (1.0, math.inf)
    assert rise(torch.tensor([0.0, 2.0, nan]), torch.tensor([1.0, nan, 5.0])) == (1.0, 1.0)
    assert all(map(math.isnan, rise(torch.tensor([0.0, 2.0, nan]), torch.tensor([nan, nan, 5.0]))))
