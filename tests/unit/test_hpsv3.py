"""HPSv3 on a small Qwen2-VL under the names of the published file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from reward_models.hpsv3 import REWARD_TOKEN, HpsV3Scorer
from reward_models.judges import to_pictures
from t2irl.errors import DataError
from t2irl.rewards.hpsv3 import Hpsv3
from t2irl.types import PromptGroups
from tests.judges import SPECIAL, qwen_tokenizer

CPU = torch.device("cpu")


def write_hpsv3(folder: Path) -> Qwen2VLForConditionalGeneration:
    """The folder, and the network in it, whose head of words is not used."""
    tokenizer = qwen_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    tokenizer.pad_token = "<|im_end|>"
    text = {
        "vocab_size": len(tokenizer) + 7, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0},
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
    }  # fmt: skip
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 8,
        "initializer_range": 0.3,
    }
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "question.txt").write_text(f"Does it show {{text_prompt}}? {REWARD_TOKEN}\n")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer) + 1  # cut to the words that there are, and the new one
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    weights = {}
    for key, value in model.state_dict().items():  # as transformers 4.45 named them
        key = re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", key))
        weights[key] = value.clone()
    for place, wide, narrow in ((0, 32, 1024), (3, 1024, 16), (5, 16, 2)):
        weights[f"rm_head.{place}.weight"] = torch.randn(narrow, wide) / wide**0.5
        weights[f"rm_head.{place}.bias"] = torch.randn(narrow) * 0.1
    save_file(weights, folder / "HPSv3.safetensors")
    return model


def test_it_is_the_head_on_the_reward_token(tmp_path: Path) -> None:
    """By the whole network of transformers, a picture at a time, and three matrices; prompts of several lengths in a batch."""
    model = write_hpsv3(tmp_path)
    scorer = HpsV3Scorer.load(tmp_path, CPU, torch.float32, pixels=32 * 32)
    images = torch.rand(3, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    texts = ["a cat", f"two dogs on a hill {REWARD_TOKEN}", ""]
    mean, std = scorer.score(to_pictures(images), texts)
    w = load_file(tmp_path / "HPSv3.safetensors")
    for k, picture in enumerate(to_pictures(images)):
        seen = scorer.image_processor(images=[picture], return_tensors="pt")
        assert seen["image_grid_thw"].tolist() == [[1, 4, 4]]  # 40 x 24 is brought to 1024 pixels in whole tiles of 16
        row = scorer._words(texts[k])
        assert row.count(scorer.special) == 1 == row.count(scorer.pad)
        place = row.index(scorer.pad)
        ids = torch.tensor([row[:place] + [scorer.pad] * 4 + row[place + 1 :]])
        typed = {"mm_token_type_ids": (ids == scorer.pad).int()} if scorer._typed else {}
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True, **seen, **typed).hidden_states[-1]
        x = states[0, ids[0].tolist().index(scorer.special)]
        for layer in (0, 3, 5):
            x = w[f"rm_head.{layer}.weight"] @ x + w[f"rm_head.{layer}.bias"]
            x = x.relu() if layer < 5 else x
        torch.testing.assert_close(torch.stack([mean[k], std[k].log()]), x, rtol=1e-3, atol=1e-3)
    assert len(mean.unique()) == 3


def test_the_reward_and_its_caution(tmp_path: Path) -> None:
    write_hpsv3(tmp_path)
    images, groups = torch.rand(2, 3, 32, 32), PromptGroups.of(["a cat"], [0, 0], [0, 1])
    plain, careful = (Hpsv3(Hpsv3.Config(path=tmp_path, precision="fp32", caution=c), CPU) for c in (0, 2))
    for reward in (plain, careful):
        reward.scorer.image_processor = HpsV3Scorer.load(tmp_path, CPU, torch.float32, 1024).image_processor
    mean, std = plain.scorer.score(to_pictures(images), groups.texts)
    assert torch.equal(plain.score(images, groups), mean) and (std > 0).all()
    torch.testing.assert_close(careful.score(images, groups), mean - 2 * std)


def test_a_folder_that_is_not_hpsv3(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"lacks HPSv3.safetensors, config.json, preprocessor_config.json, question.txt"
    ):
        Hpsv3(Hpsv3.Config(path=tmp_path), CPU)
    write_hpsv3(tmp_path)
    (tmp_path / "question.txt").write_text("Is it good?")
    with pytest.raises(DataError, match=r"question.txt should hold \{text_prompt\} and <\|Reward\|> once each"):
        Hpsv3(Hpsv3.Config(path=tmp_path), CPU)
    write_hpsv3(tmp_path)
    weights = load_file(tmp_path / "HPSv3.safetensors")
    del weights["visual.blocks.0.norm1.bias"]
    save_file(weights, tmp_path / "HPSv3.safetensors")
    with pytest.raises(DataError, match=r"(?s)does not fit this Qwen2-VL: .*norm1.bias"):
        Hpsv3(Hpsv3.Config(path=tmp_path), CPU)
