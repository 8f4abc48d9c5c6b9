"""DeQA-Score on a small mPLUG-Owl2 under the published names, against the same network written otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reward_models.deqa import AFTER, BEFORE, MEAN, STD, DeqaScorer
from reward_models.vlm_scores import LEVELS
from t2irl.errors import DataError
from t2irl.rewards.deqa import Deqa
from t2irl.types import PromptGroups
from tests.deqa import SIZE, Oracle, tokenizer, weights, write_deqa

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deqa(tmp_path_factory.mktemp("deqa"))


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(2))


def test_the_score_is_the_expected_level(folder: Path) -> None:
    """Five words' probabilities after the published sentence; a picture alone scores as among others."""
    scorer, words = DeqaScorer.load(folder, CPU, torch.float32), tokenizer()
    images = pictures(3, SIZE, SIZE)
    oracle = Oracle(weights(len(words)))
    before, after = words(BEFORE).input_ids, words(AFTER).input_ids[1:]
    assert before[0] == words.bos_token_id != after[0]
    logits = oracle.logits(before, oracle.picture(scorer.preprocess(images)), after)
    first = [words(word).input_ids[1] for word in LEVELS]
    assert [words.convert_ids_to_tokens(k) for k in first] == ["▁e", "▁g", "▁f", "▁p", "▁b"]
    expected = logits[:, first].softmax(-1) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    found = scorer.score(images)
    assert found.dtype == torch.float32 and len(found.unique()) == 3
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(scorer.score(images[1:2]), found[1:2], rtol=0, atol=1e-5)


def test_pictures_become_squares_as_published(folder: Path) -> None:
    """Grey beside the picture until it is a square, then Pillow's bicubic resize."""
    noise = np.random.default_rng(3).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((140, 93), Image.Resampling.BILINEAR)
    square = Image.new("RGB", (140, 140), tuple(int(255 * x) for x in MEAN))  # type: ignore[arg-type]
    square.paste(picture, (0, (140 - 93) // 2))
    small = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    theirs = (torch.from_numpy(small) - torch.tensor(MEAN)) / torch.tensor(STD)
    images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    scorer = DeqaScorer.load(folder, CPU, torch.float32)
    ours = scorer.preprocess(images)[0].permute(1, 2, 0)
    assert (ours - theirs).abs().max() < 1.5 / 255 / min(STD)  # Pillow rounds to 8 bits twice
    upright = scorer.preprocess(images.transpose(2, 3))[0].permute(2, 1, 0)
    torch.testing.assert_close(upright, ours, rtol=0, atol=1e-5)


def test_words_and_picture_have_weights_of_their_own(folder: Path, tmp_path: Path) -> None:
    """Each copy of a doubled module matters: the first for words, the second for the tokens of the picture."""
    images, expected = (
        pictures(2, SIZE, SIZE),
        DeqaScorer.load(folder, CPU, torch.float32).score(pictures(2, SIZE, SIZE)),
    )
    shutil.copytree(folder, tmp_path / "copy")
    for name in (
        "model.layers.0.self_attn.v_proj.multiway.0.weight",
        "model.layers.1.input_layernorm.multiway.1.weight",
    ):
        (file,) = (f for f in folder.glob("*.safetensors") if name in load_file(f))
        tensors = load_file(file)
        save_file(tensors | {name: 3 * tensors[name]}, tmp_path / "copy" / file.name)
        changed = DeqaScorer.load(tmp_path / "copy", CPU, torch.float32).score(images)
        assert (changed - expected).abs().min() > 1e-3
        shutil.copy(file, tmp_path / "copy")


def test_the_reward(folder: Path, tmp_path: Path) -> None:
    """Half precision agrees roughly; weights in one file of torch are read as well; the prompt does not matter."""
    images = pictures(4, 40, 64)
    one, other = (PromptGroups.of([text], [0] * 4, list(range(4))) for text in ("a cat", "a dog"))
    reward = Deqa(Deqa.Config(path=folder, precision="fp32"), CPU)
    scores = reward.score(images, one)
    assert torch.equal(reward.score(images, other), scores) and ((scores > 1) & (scores < 5)).all()
    shutil.copytree(folder, tmp_path / "torch", ignore=shutil.ignore_patterns("*safetensors*"))
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}  # files of older versions have them
    torch.save(tensors | extra, tmp_path / "torch" / "pytorch_model.bin")
    assert torch.equal(Deqa(Deqa.Config(path=tmp_path / "torch", precision="fp32"), CPU).score(images, one), scores)
    half = Deqa(Deqa.Config(path=folder), CPU).score(images, one)
    assert half.dtype == torch.float32 and (half - scores).abs().max() < 0.3


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, where: Path = tmp_path / "copy") -> None:
        with pytest.raises(DataError, match=f"reward deqa: path = .*{message}"):
            Deqa(Deqa.Config(path=where), CPU)

    refused("lacks config.json, tokenizer.model, its weights", tmp_path / "none")
    shutil.copytree(folder, tmp_path / "copy")
    shard = tmp_path / "copy" / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    shard.unlink()
    refused(r"lacks model-00002-of-00002\.safetensors")
    save_file(dict(list(tensors.items())[1:]), shard)
    refused(r"the weights do not fit config.json: Error.*\n.*Missing key")
    save_file(tensors, shard)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    refused("model_type = 'llama', but DeQA-Score is an mplug_owl2")
    shutil.copy(folder / "config.json", tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").rename(tmp_path / "copy" / "tokenizer.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"pip install 't2irl\[deqa\]'")
