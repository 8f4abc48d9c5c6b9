"""What a run leaves behind loads into a fresh pipeline and draws the policy's pictures, or the run says that it does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from t2irl import export as module
from t2irl.config import Run
from t2irl.errors import RunError
from t2irl.export import as_dict, export
from t2irl.policy import Policy
from t2irl.rollout import Noise, rollout
from t2irl.types import PromptGroups
from tests.invariants.toy import toy_parts, toy_run

Folder = Callable[..., Path]
PROMPT = "a red circle"
FULL = {"type": "full"}
CLIP = ("text_encoder", "text_encoder_2")


def lora(rank: int, alpha: float) -> dict[str, Any]:
    """Settings of adapters."""
    return {"type": "lora", "rank": rank, "alpha": alpha}


def trained(
    folder: Path,
    tune: Mapping[str, Any],
    strength: float = 0.3,
    model: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> tuple[Run, Policy]:
    """A policy whose trained weights and their average were moved at random, differently."""
    sd3 = {"type": "sd3", "path": folder, "max_sequence_length": 4}
    settings = model if model and "type" in model else {**sd3, **(model or {})}
    run = toy_run({"model": settings, "rollout": {"steps": 4, **sampling}, "policy": {"tune": tune}})
    policy = toy_parts(run).policy
    generator = torch.Generator().manual_seed(2)
    assert policy.average is not None
    for name, p in policy.trained.items():
        for weights in (p.data, policy.average[name]):
            weights.add_(
                strength * weights.std().nan_to_num(1).clamp(min=0.1) * torch.randn(p.shape, generator=generator)
            )
    return run, policy


def stock(folder: Path, **parts: Any) -> StableDiffusion3Pipeline:
    """A pipeline without T5, loaded as its card says."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(run: Run, policy: Policy, pipe: StableDiffusion3Pipeline) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of the same noise: by the averaged policy, by its trained weights, and by a pipeline."""
    groups, noise = PromptGroups.of([PROMPT], [0], [0]), Noise(8, "grid")
    levels, sampling = policy.family.levels(run.rollout.steps), run.rollout
    with policy.averaged():
        ours = policy.family.decode(rollout(policy, groups, levels, range(0), noise, 1).final)[0]
    live = policy.family.decode(rollout(policy, groups, levels, range(0), noise, 1).final)[0]
    theirs = pipe(
        PROMPT, latents=noise.draw(groups, 1, policy.family.latent_shape)[:, 0], num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale, negative_prompt=sampling.negative_prompt, max_sequence_length=4,
        output_type="pt",
    ).images[0]  # fmt: skip
    return ours, live, theirs


def difference(a: Tensor, b: Tensor) -> float:
    """Largest of a pixel."""
    return float((a - b).abs().max())


@pytest.mark.parametrize(("rank", "alpha"), [(4, 12), (8, 2), (4, 4)])
def test_lora_loads_with_the_right_strength(sd3_folder: Folder, tmp_path: Path, rank: int, alpha: float) -> None:
    folder = sd3_folder()
    run, policy = trained(folder, lora(rank, alpha))
    result = export(policy, run, tmp_path, PROMPT)
    assert result.file == "export/pytorch_lora_weights.safetensors"
    pipe = stock(folder)
    base = drawn(run, policy, pipe)[2]
    pipe.load_lora_weights(tmp_path / "export")
    ours, live, theirs = drawn(run, policy, pipe)
    assert difference(ours, theirs) < 1e-4
    assert difference(ours, base) > 0.01
    assert difference(ours, live) > 0.01  # it is the average that is exported
    pipe.unload_lora_weights()
    assert torch.equal(drawn(run, policy, pipe)[2], base)
    assert result.max_difference_to_policy < 1e-4
    assert result.difference_to_base > 0.01
    assert json.loads(json.dumps(as_dict(result))) == as_dict(result)


def test_the_scale_is_folded_in_exactly_once(sd3_folder: Folder, tmp_path: Path) -> None:
    folder = sd3_folder()
    run, policy = trained(folder, lora(4, 12))
    before = {name: p.detach().clone() for name, p in policy.trained.items()}
    export(policy, run, tmp_path, PROMPT)
    assert all(torch.equal(p, before[name]) for name, p in policy.trained.items())
    assert policy.average is not None
    with safe_open(tmp_path / "export/pytorch_lora_weights.safetensors", "pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    expected = {
        f"transformer.{name.replace('.default', '')}": tensor * (3 if ".lora_B." in name else 1)
        for name, tensor in policy.average.items()
    }
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())
    assert metadata["base_model"] == str(folder)
    assert metadata["format"] == "pt"
    assert Run.model_validate(json.loads(metadata["t2irl_config"])) == run


def test_full_fine_tuning_loads(sd3_folder: Folder, tmp_path: Path) -> None:
    folder = sd3_folder()
    run, policy = trained(folder, FULL)
    result = export(policy, run, tmp_path, PROMPT)
    assert result.file == "export/transformer"
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path / result.file)
    ours, live, theirs = drawn(run, policy, stock(folder, transformer=transformer))
    assert torch.equal(ours, theirs)
    assert difference(ours, live) > 0.03
    assert difference(ours, drawn(run, policy, stock(folder))[2]) > 0.03
    assert result.max_difference_to_policy == 0


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "guided": ({}, {}, {"guidance_scale": 4.5, "negative_prompt": 'it\'s "blue"\\'}),
    "large": ({"shift": 3.0}, {"resolution": 24}, {}),
    "bf16": ({}, {"precision": "bf16"}, {"guidance_scale": 2.0}),
    "t5": ({"t5": True}, {}, {}),
    "t5 left out": ({"t5": True}, {"max_sequence_length": 0}, {"guidance_scale": 2.0, "negative_prompt": "blue"}),
    "one CLIP": ({"drop": CLIP[1:]}, {}, {"guidance_scale": 2.0}),
    "no CLIP": ({"drop": CLIP, "t5": True}, {}, {}),
}


@pytest.mark.parametrize("tune", [lora(4, 12), FULL], ids=["lora", "full"])
@pytest.mark.parametrize("case", CASES)
def test_the_printed_snippet_draws(
    sd3_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, tune: Mapping[str, Any]
) -> None:
    """Also the proof works for all these models: it raises RunError when pictures differ."""
    settings, model, sampling = CASES[case]
    run, policy = trained(sd3_folder(**settings), tune, model=model, **sampling)
    result = export(policy, run, tmp_path, PROMPT)
    assert result.max_difference_to_policy <= (0.1 if case == "bf16" else 1e-4)
    assert result.difference_to_base > 0.03
    card = (tmp_path / "export/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert f"```python\n{result.snippet}\n```" in card
    # Only a pipeline that lacks a CLIP encoder, which diffusers cannot prompt by text, needs help of ours.
    assert ("t2irl" in result.snippet) == case.endswith("CLIP")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(result.snippet, names)  # it is what the user is told to run
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (model.get("resolution", 16),) * 2
    assert names["pipe"].transformer.dtype == torch.bfloat16 if case == "bf16" else torch.float32
    if case == "plain":
        ours, _, theirs = drawn(run, policy, names["pipe"])
        assert difference(ours, theirs) < 1e-4


# ------------------------------------------------------------------------------------------------------- errors are seen
def spoiled(factor: float) -> Callable[[Policy], dict[str, Tensor]]:
    """`lora_weights` whose scale is wrong by a factor."""
    right = module.lora_weights

    def weights(policy: Policy) -> dict[str, Tensor]:
        return {k: v * factor if ".lora_B." in k else v for k, v in right(policy).items()}

    return weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strength", [0.3, 0.01])
@pytest.mark.parametrize(
    ("factor", "found"), [(1 / 3, "does not reproduce the policy"), (3, "does not"), (0, "has no effect")]
)
def test_a_wrong_scale_is_seen(
    sd3_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    found: str,
    strength: float,
    precision: str,
) -> None:
    """However little was learned, unless 16 bits hide it."""
    run, policy = trained(sd3_folder(), lora(4, 12), strength, {"precision": precision})
    export(policy, run, tmp_path, PROMPT)
    monkeypatch.setattr(module, "lora_weights", spoiled(factor))
    if precision == "bf16" and strength < 0.1:
        export(policy, run, tmp_path, PROMPT)
        return
    with pytest.raises(RunError, match=f"pytorch_lora_weights.safetensors {found}"):
        export(policy, run, tmp_path, PROMPT)


def test_a_full_export_of_other_weights_is_seen(
    sd3_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, policy = trained(sd3_folder(), FULL)
    save = policy.family.save_denoiser

    def save_reference(folder: Path) -> Path:
        with policy.reference():
            return save(folder)

    monkeypatch.setattr(policy.family, "save_denoiser", save_reference)
    with pytest.raises(RunError, match="transformer has no effect"):
        export(policy, run, tmp_path, PROMPT)


@pytest.mark.parametrize("tune", [lora(4, 12), FULL], ids=["lora", "full"])
def test_a_policy_that_learned_nothing_is_no_error(sd3_folder: Folder, tmp_path: Path, tune: Mapping[str, Any]) -> None:
    run, policy = trained(sd3_folder(), tune, strength=0)
    result = export(policy, run, tmp_path, PROMPT)
    assert result.max_difference_to_policy == result.difference_to_base == 0
