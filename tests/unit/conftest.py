"""A random CLIP and some pictures for the tests of rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from t2irl import registry
from t2irl.rewards.base import Reward
from t2irl.shapes.captions import parse_caption, sample_captions
from t2irl.shapes.render import SIZE, render, sample_scene
from t2irl.types import PromptGroups
from tests.adversaries import write_dino, write_references
from tests.artifacts import write_classifier
from tests.deqa import write_deqa
from tests.dreamsim import write_ensemble
from tests.judges import write_qwen
from tests.preferences import write_preference
from tests.reward_server import serving
from tests.reward_weights import head_weights, write_hps, write_image_reward

NEEDS: dict[str, dict[str, Any]] = {
    "adaptive_reference": {"every": 10},
    "diversity_logdet": {"allow_on_failures": True},
    "gated_kl": {"auxiliaries": ["other"]},
    "sft": {"references": {"folder": "pictures"}},
}
"""What a plugin's config cannot be without, besides single values."""
BESIDE: dict[str, dict[str, Any]] = {
    "adaptive_reference": {"regularizers": {"pull": {"type": "kl", "anchor": "mine"}}},
    "gated_kl": {"rewards": {"other": {"type": "vividness", "weight": 0}}},
}
"""What must stand in a run beside an entry `mine` of a plugin."""


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP in the format of assets/tiny-clip: float16 weights, a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": len(symbols) - 2, "eos_token_id": len(symbols) - 1, "pad_token_id": len(symbols) - 1}
    text = shared | special | {"vocab_size": len(symbols), "max_position_embeddings": 77}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config=shared | {"image_size": SIZE, "patch_size": 8}, projection_dim=16
    )
    CLIPModel(config).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures() -> tuple[Tensor, PromptGroups]:
    """48 pictures, float in [0, 1], every third drawn for another caption; 24 prompts of two images each."""
    rng = np.random.default_rng(21)
    prompts = sample_captions(24, rng)
    shown = [prompts[(i + 7 * (i % 3 == 0)) % 24] for i in range(48)]
    drawn = np.stack([render(sample_scene(caption, rng)) for caption in shown])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    return images, PromptGroups.of([c.text for c in prompts], [i % 24 for i in range(48)], [i // 24 for i in range(48)])


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Dinov2Model for 64 x 64 pixels."""
    return write_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL for 64 x 64 pixels."""
    return write_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def special(
    tmp_path_factory: pytest.TempPathFactory, qwen_folder: Path, clip_folder: Path, dino_folder: Path
) -> Iterator[dict[str, dict[str, Any]]]:
    """What rewards need that take another folder than a CLIP or a DINO."""
    classifier = {"path": write_classifier(tmp_path_factory.mktemp("classifier"))}
    head = tmp_path_factory.mktemp("aesthetic") / "head.pth"
    torch.save(head_weights(16), head)
    with serving(tmp_path_factory.mktemp("served"), {"vivid": {"type": "vividness"}}) as server:
        yield {
            "remote": {"url": server.url},
            "clip_score": {"path": clip_folder},
            "pickscore": {"path": clip_folder},
            "hpsv2": {"path": write_hps(tmp_path_factory.mktemp("hps"), clip_folder)},
            "aesthetic": {"path": clip_folder, "head": head},
            "image_reward": {"path": write_image_reward(tmp_path_factory.mktemp("image_reward"))},
            "deqa": {"path": write_deqa(tmp_path_factory.mktemp("deqa")), "precision": "fp32"},
            "dreamsim": {"path": write_ensemble(tmp_path_factory.mktemp("dreamsim"))},
            "artifact": classifier,
            "artifact_adaptive": classifier | {"labeller": {"type": "vividness"}},
            "preference": {"path": write_preference(tmp_path_factory.mktemp("preference"), dino_folder, clip_folder)},
            "artifact_judge": {"path": qwen_folder, "precision": "fp32", "answer_mass": 0},
            "pairwise_judge": {"path": qwen_folder, "precision": "fp32", "answer_mass": 0},
        }


@pytest.fixture(scope="session")
def reference_index(tmp_path_factory: pytest.TempPathFactory, pictures: tuple[Tensor, PromptGroups]) -> Path:
    """Four reference images of each prompt of `pictures`."""
    rng = np.random.default_rng(5)
    drawn = {text: [render(sample_scene(parse_caption(text), rng)) for _ in range(4)] for text in pictures[1].prompts}
    return write_references(tmp_path_factory.mktemp("references"), drawn)


@pytest.fixture
def make(
    clip_folder: Path,
    dino_folder: Path,
    reference_index: Path,
    pictures: tuple[Tensor, PromptGroups],
    special: dict[str, dict[str, Any]],
) -> Callable[..., Reward]:
    """Build a reward by name on the CPU, ready for the prompts of `pictures`."""

    def build(name: str, **settings: Any) -> Reward:
        fields = registry.find("rewards", name).Config.model_fields
        if name in special:
            settings = special[name] | settings
        elif "path" in fields:
            settings = {"path": clip_folder if "clip" in name else dino_folder} | settings
        if "references" in fields and "frozen" not in settings:
            settings = {"references": {"index": reference_index}} | settings
        if "reencode" in fields:
            settings = {"reencode": False} | settings
        config = registry.find("rewards", name).Config.model_validate({"type": name} | settings)
        reward = registry.build("rewards", config, torch.device("cpu"))
        reward.prepare(pictures[1].prompts, None)  # no reward here asks the model for anything
        return reward

    return build


@pytest.fixture
def spoilt(pictures: tuple[Tensor, PromptGroups]) -> tuple[Tensor, PromptGroups]:
    """Rollout images that differ from reference images: blurred and grainy, on the 8-bit grid."""
    images = torch.nn.functional.avg_pool2d(pictures[0], 5, 1, 2, count_include_pad=False)
    images = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return images.clamp(0, 1).mul(255).round() / 255, pictures[1]
