"""Runs with a reward that learns: through the command line, stopped, continued, exported, used again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from t2irl.evaluation.glossary import lookup
from t2irl.models.sd3 import SD3
from t2irl.shapes.captions import sample_captions
from t2irl.shapes.render import render, sample_scene
from tests.adversaries import write_dino, write_references
from tests.end_to_end.runs import PLUGINS, TRAIN, assert_same_run, metrics, saved, train

HELDOUT = [f"thing {k}" for k in range(5)]


@pytest.fixture
def adversarial(config: Path, tmp_path: Path) -> Path:
    """The config of a run whose only reward is an adversary, which keeps every second rollout for itself."""
    rng = np.random.default_rng(0)
    pictures = {t: [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(2)] for t in (*TRAIN, *HELDOUT)}
    references = {"index": str(write_references(tmp_path / "references", pictures))}
    path = str(write_dino(tmp_path / "dino", 16))
    tree = yaml.safe_load(config.read_text())
    tree["rewards"] = {
        "dino": {
            "type": "adversarial_dino", "path": path, "references": references, "lr": 1e-3, "reencode": True, "heldout": 0.3,
            "turns": {"type": "fixed", "learn": 1, "rest": 1, "skip_policy": True},
            "replay": {"size": 10, "add": 4, "share": 0.5},
        }
    }  # fmt: skip
    posthoc = {"type": "posthoc_discriminator", "path": path, "references": references, "reencode": True}
    tree["heldout_rewards"] = {"posthoc": posthoc, "bright": {"type": f"{PLUGINS}:Brightness"}}
    tree["evaluation"]["images"] = 20
    (tmp_path / "heldout.txt").write_text("\n".join(HELDOUT) + "\n")
    config.write_text(yaml.safe_dump(tree))
    return config


def test_stopped_and_continued_is_uninterrupted(adversarial: Path, run_dir: Path) -> None:
    """The adversary, its moments, its turn and the pictures it remembers, to the last bit; and what the run then shows."""
    assert train(adversarial, "--iterations=2") == 0
    assert train(adversarial, "--iterations=5") == 0
    assert train(adversarial, "--iterations=5", f"--run_dir={run_dir.with_name('whole')}") == 0
    assert_same_run(run_dir, run_dir.with_name("whole"), 5)
    state = saved(run_dir, 5)
    assert state.clock["update"] == 4 and state.clock["iteration"] == 5  # two iterations were the policy's
    dino = state.state["rewards"]["dino"]
    assert dino["turns"]["iteration"] == 5 and len(dino["replay"]["rows"]) == 10
    lines = metrics(run_dir)
    assert [line["reward/dino/learned"] for line in lines[1:]] == [1, 0, 1, 0, 1]
    assert ["policy/grad_norm" in line for line in lines[1:]] == [False, True, False, True, False]
    assert ["reward/dino/loss" in line for line in lines[1:]] == [True, False, True, False, True]
    for line in lines:
        assert [name for name in line if name not in ("iteration", "time") and lookup(name) is None] == []
        assert 0 <= line["heldout/posthoc"] <= 1
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["updates"] == 4 and summary["seconds"]["adversary"] > 0
    assert (run_dir / "report.html").is_file()


def test_an_exported_adversary_is_a_reward_of_another_run(adversarial: Path, run_dir: Path) -> None:
    assert train(adversarial, "--iterations=1") == 0
    out = run_dir / "export" / "rewards" / "dino"
    assert sorted(p.name for p in out.iterdir()) == ["adversary.json", "adversary.safetensors"]
    frozen = ["--rewards.dino.references=null", f"--rewards.dino.frozen={out}", "--iterations=1"]
    other = run_dir.with_name("other")
    assert train(adversarial, *frozen, f"--run_dir={other}") == 0
    line = metrics(other)[1]
    assert "reward/dino/learned" not in line and "policy/grad_norm" in line and "reward/dino/mean" in line
    assert not (other / "export" / "rewards").exists() and "dino" not in saved(other, 1).state["rewards"]


def test_a_missing_reference_image_stops_the_run_before_it_begins(
    adversarial: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Path(yaml.safe_load(adversarial.read_text())["rewards"]["dino"]["references"]["index"])
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != TRAIN[4]}))
    assert train(adversarial) == 2
    assert TRAIN[4] in capsys.readouterr().err
    assert not (run_dir / "metrics.jsonl").exists()


def test_the_policys_image_encoder_is_the_inverse_of_its_decoder() -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([render(sample_scene(caption, rng)) for caption in sample_captions(4, rng)])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2)
    family = SD3(SD3.Config(path=Path("assets/tiny-sd3"), max_sequence_length=0), torch.device("cpu"))
    assert family.encodes_images
    redrawn = family.redrawn(images)
    error = (redrawn.double() - images.double()).square().mean() / 255**2
    assert redrawn.dtype == torch.uint8 and 0 < error < 0.01  # above 20 dB
    assert torch.equal(redrawn, family.redrawn(images))  # no noise
    with torch.no_grad():
        latents = family.encode_images(images.float() / 255)
    assert latents.shape == (4, *family.latent_shape) and 0.3 < latents.std() < 3
