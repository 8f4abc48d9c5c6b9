"""Reference images: indexes, the checks at the start, reading, cached features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from t2irl.errors import DataError
from t2irl.references import FeatureCache, ReferenceImages
from t2irl.utils import distributed

CAT, DOG = "a cat", "a dog"


def save(file: Path, color: tuple[int, ...] = (200, 40, 40), mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Path:
    """A picture of one colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color if len(color) > 1 else color[0]).save(file)
    return file


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Two pictures of a cat, one of a dog."""
    for name in ("c0.png", "c1.png", "d0.png"):
        save(tmp_path / name)
    return write(tmp_path / "index.json", {CAT: ["c0.png", "c1.png"], DOG: ["d0.png"]})


def write(file: Path, content: Any) -> Path:
    """A JSON file."""
    file.write_text(json.dumps(content))
    return file


def load(prompts: tuple[str, ...] = (CAT, DOG), may_lack: bool = False, **config: Any) -> ReferenceImages:
    """As a reward does it."""
    return ReferenceImages.load(ReferenceImages.Config.model_validate(config), prompts, "refs", may_lack)


# ------------------------------------------------------------------------------------------------------------- lookup
def test_json_and_json_lines_say_the_same(index: Path, tmp_path: Path) -> None:
    lines = tmp_path / "sub" / "index.jsonl"
    lines.parent.mkdir()
    entries = [{"prompt": f" {CAT} ", "files": ["c0.png", "c1.png"]}, {"prompt": DOG, "files": ["d0.png"]}]
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    one, other = load(index=index), load(index=lines, root=tmp_path)
    assert one.of(CAT) == other.of(CAT) == (tmp_path / "c0.png", tmp_path / "c1.png")
    assert one.of(DOG) == (tmp_path / "d0.png",) and one.of("a bird") == ()


def test_a_folder_serves_every_prompt(index: Path, tmp_path: Path) -> None:
    save(tmp_path / "below" / "e.png")
    style = load(folder=tmp_path)
    assert style.of(CAT) == style.of(DOG) and len(style.of(CAT)) == 4
    assert len(load(folder=tmp_path, per_prompt=3).of(CAT)) == 3
    with pytest.raises(DataError, match=r"refs\.folder = .*: 4 pictures, at_least = 5"):
        load(folder=tmp_path, at_least=5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures there"):
        load(folder=tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        load(folder=tmp_path / "nowhere")


def test_limits(index: Path) -> None:
    assert len(load(index=index, per_prompt=1).of(CAT)) == 1
    with pytest.raises(DataError, match="no reference images for the prompt 'a dog' among its first 1"):
        load(index=index, limit=1)
    assert load(index=index, limit=1, may_lack=True).of(DOG) == ()
    with pytest.raises(DataError, match="1 reference images for 'a dog', at_least = 2"):
        load(index=index, at_least=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "neither is there"),
        ({"index": "a", "folder": "b"}, "both is there"),
        ({"folder": "b", "root": "c"}, "`root` belongs to an `index`"),
        ({"folder": "b", "limit": 2}, "`limit` belongs to an `index`"),
        ({"index": "a", "per_prompt": 1, "at_least": 2}, "per_prompt = 1 is below at_least = 2"),
        ({"index": "a", "per_prompt": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ReferenceImages.Config.model_validate(config)


# ------------------------------------------------------------------------------------------------------------- checks
def test_all_problems_are_told_at_once(index: Path, tmp_path: Path) -> None:
    write(index, {CAT: ["c0.png", "c0.png", "gone.png"], DOG: []})
    (tmp_path / "c0.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as found:
        load(prompts=(CAT, DOG, "a bird"), index=index)
    text = str(found.value)
    for part in (
        f"refs.index = {index}: c0.png stands twice for 'a cat'",
        f"{tmp_path / 'gone.png'}: no such file",
        f"{tmp_path / 'c0.png'}: cannot be read as a picture",
        "no reference images for the prompt 'a dog'",
        "no reference images for the prompt 'a bird'",
    ):
        assert part in text


def test_long_lists_of_problems_are_cut(index: Path) -> None:
    with pytest.raises(DataError, match=r"and 12 more") as found:
        load(prompts=tuple(f"prompt {n}" for n in range(20)), index=index)
    assert len(str(found.value).splitlines()) == 9


def deep(file: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(file)


def cut(file: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: save(file, (0, 0, 0, 0), "RGBA"), r"transparency \(RGBA\); put it on a background"),
        (lambda file: save(file, (0, 0), "LA"), r"transparency \(LA\)"),
        (deep, "more than 8 bits a channel"),
        (cut, r"cut short \(a PNG without its end\)"),
    ],
)
def test_pictures_that_cannot_serve_are_refused(index: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(index.parent / "d0.png")
    with pytest.raises(DataError, match=rf"d0\.png: .*{message}"):
        load(index=index)


def test_gray_pictures_are_read_as_rgb_with_a_note(index: Path) -> None:
    save(index.parent / "d0.png", (77,), "L")
    with pytest.warns(UserWarning, match="1 pictures are L, such as"):
        images = load(index=index)
    assert images.picture(images.of(DOG)[0]).eq(77).all() and len(images.notes) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "[]", r'expected \{"a prompt": \["a file", \.\.\.\]'),
        ("a.json", '{"a cat": "c0.png"}', "the entry of 'a cat' is not a text with a list of file names"),
        ("a.json", '{"a cat": ["c0.png"], "a cat": ["c1.png"]}', "'a cat' stands there twice"),
        ("a.jsonl", '{"prompt": "a cat"}', "line 1: expected"),
        ("a.jsonl", '{"prompt": "a cat", "files": []}\n\n', "line 2: is not JSON"),
    ],
)
def test_bad_indexes_are_refused(index: Path, name: str, content: str, message: str) -> None:
    (index.parent / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load(index=index.parent / name)


def test_a_missing_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file .*make_references\.py"):
        load(index=tmp_path / "index.json")


def test_what_is_missing_on_another_process_fails_here_too(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, ["refs: /node1/d0.png: no such file"]])
    with pytest.raises(DataError, match=r"/node1/d0\.png: no such file"):
        load(index=index)


def test_a_bad_index_does_not_keep_the_others_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: told.append(mine) or [mine])
    with pytest.raises(DataError):
        load(index=tmp_path / "index.json")
    assert len(told) == 1 and "no such file" in told[0][0]


# ------------------------------------------------------------------------------------------------------------ reading
def test_pictures_are_fitted_and_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "turned.png", exif=exif)
    images = load(folder=tmp_path)
    plain, turned = images.of(CAT)
    assert images.picture(plain).shape == (3, 4, 12) and images.picture(turned).shape == (3, 12, 4)
    middle = images.picture(plain, 4)
    assert middle.dtype == torch.uint8 and middle.shape == (3, 4, 4) and middle.eq(255).all()
    assert images.picture(plain, 8).shape == (3, 8, 8)
    assert torch.equal(images.picture(plain), torch.from_numpy(pixels).permute(2, 0, 1))


# -------------------------------------------------------------------------------------------------------------- cache
def test_features_are_computed_once_and_kept_by_content(index: Path, tmp_path: Path) -> None:
    images = load(index=index)
    calls: list[int] = []

    def encode(pictures: Tensor) -> tuple[Tensor, ...]:
        calls.append(len(pictures))
        return pictures.mean((2, 3)), pictures.flatten(2)

    def cache(name: str = "one", folder: Path | None = tmp_path / "cache") -> FeatureCache:
        return FeatureCache(encode, name, images.pictures, folder)

    save(tmp_path / "c1.png", (10, 20, 30))
    first = cache()
    files = [*images.of(CAT), *images.of(DOG), *images.of(CAT)]
    found = first.of(files)
    assert [x.shape for x in found] == [(5, 3), (5, 3, 64)]
    assert calls == [8] and first.computed == 2  # c0 and d0 are the same picture; a batch is always filled up
    assert torch.allclose(found[0][1] * 255, torch.tensor([10.0, 20.0, 30.0]))
    assert all(torch.equal(a, b) for a, b in zip(first.of(files), found, strict=True)) and len(calls) == 1
    again = cache()
    assert all(torch.equal(a, b) for a, b in zip(again.of(files), found, strict=True))
    assert len(calls) == 1 and again.computed == 0
    cache("another network").of(files)
    assert len(calls) == 2
    cache(folder=None).of(files)
    assert len(calls) == 3
    save(tmp_path / "c0.png", (1, 2, 3))  # the content counts, not the name
    fresh = FeatureCache(encode, "one", load(index=index).pictures, tmp_path / "cache")
    assert torch.allclose(fresh.of(files[:1])[0] * 255, torch.tensor([[1.0, 2.0, 3.0]])) and len(calls) == 4


def test_a_damaged_cache_is_computed_anew(index: Path, tmp_path: Path) -> None:
    images = load(index=index)
    for expected in (1, 1, 0):
        cache = FeatureCache(lambda x: (x.mean((2, 3)),), "n", images.pictures, tmp_path / "cache")
        cache.of(images.of(DOG))
        assert cache.computed == expected
        if expected and not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            next((tmp_path / "cache").rglob("*.safetensors")).write_bytes(b"cut")
