"""Every family through the command line, and its exported LoRA in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from t2irl import cli
from t2irl.export import export
from t2irl.rollout import Noise, rollout
from t2irl.types import PromptGroups
from tests.end_to_end.runs import base_config, call, metrics, train
from tests.families import CASES
from tests.unit.test_export import FULL, PROMPT, difference, lora, trained

Folder = Callable[..., Path]
NEW = [name for name in CASES if name != "sd3"]
UNCONFIGURED = [name for name in NEW if name not in ("flux_dev", "sdxl", "qwen_image")]
"""The others are run by `test_configs.py`."""
GUIDED = {"guidance_scale": 2.0, "negative_prompt": "two green triangles"}


@pytest.mark.parametrize("name", UNCONFIGURED)
def test_two_iterations_and_check(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """`check` knows all memory but that of rewards; `train` updates, evaluates and exports."""
    path = base_config(tmp_path, tiny_folder(name))
    config = yaml.safe_load(path.read_text()) | {"model": {**CASES[name].model, "path": str(tiny_folder(name))}}
    config["rollout"] |= GUIDED | {"dynamics": {"type": "ddim"}}
    config["evaluation"] |= {"every": 0}
    path.write_text(yaml.safe_dump(config))
    assert cli.main(["check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "unknown" not in shown.split("time ")[0]
    assert "activations of 4 images" in shown
    assert train(path) == 0
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines if "policy/ratio_first" in line] == [1, 2]
    assert all(abs(line["policy/log_ratio_first"]) < 1e-4 for line in lines if "policy/ratio_first" in line)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["export"]["max_difference_to_policy"] < 1e-3


DRAW = """
import sys, torch
for folder in sys.argv[1:]:
    code = open(f"{folder}/snippet.py").read()
    given = torch.load(f"{folder}/given.pt", weights_only=True)
    assert code.count(").images[0]") == 1
    exec(code.replace(").images[0]", ", latents=given, output_type='pt').images[0]").replace("image.save", "str"), scope := {"given": given})
    torch.save(scope["image"], f"{folder}/drawn.pt")
"""


@pytest.fixture(scope="module")
def exported(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's LoRA written here; its snippet run, with given noise, in one process that knows nothing else."""
    folders: dict[str, Path] = {}
    for name in NEW:
        folder = folders[name] = tmp_path_factory.mktemp(name)
        model = {**CASES[name].model, "path": tiny_folder(name)}
        run, policy = trained(tiny_folder(name), lora(4, 12), model=model, **GUIDED)
        result = export(policy, run, folder, PROMPT)
        (folder / "snippet.py").write_text(result.snippet)
        groups, noise = PromptGroups.of([PROMPT], [0], [0]), Noise(8, "grid")
        family, levels = policy.family, policy.family.levels(run.rollout.steps)
        torch.save(family.pack(noise.draw(groups, 1, family.latent_shape)[:, 0]), folder / "given.pt")
        for which in ("average", "reference"):
            with policy.at(which):
                final = rollout(policy, groups, levels, range(0), noise, 1).final
                torch.save(family.decode(final)[0], folder / f"{which}.pt")
    code, _, err = call(sys.executable, "-c", DRAW, *map(str, folders.values()))
    assert code == 0, err[-2000:]
    return folders


@pytest.mark.parametrize("name", NEW)
def test_the_lora_in_a_fresh_process_is_the_trained_policy(exported: dict[str, Path], name: str) -> None:
    """The stock pipeline draws the trained policy's picture and not the base model's."""
    drawn, ours, base = (
        torch.load(exported[name] / f"{which}.pt", weights_only=True) for which in ("drawn", "average", "reference")
    )
    assert difference(drawn, ours) < 1e-3
    assert float((drawn - base).abs().mean()) > 30 * float((drawn - ours).abs().mean())
    assert difference(drawn, base) > 0.01


@pytest.mark.parametrize(
    ("name", "precision"),
    [("flux_dev", "bf16"), ("sdxl", "bf16"), ("qwen_image", "fp32")],
)
def test_whole_weights_and_sixteen_bits(tiny_folder: Folder, tmp_path: Path, name: str, precision: str) -> None:
    """Full fine-tuning writes the denoiser's folder; `export` itself proves that the picture is the policy's."""
    model: dict[str, Any] = {**CASES[name].model, "path": tiny_folder(name), "precision": precision}
    run, policy = trained(tiny_folder(name), FULL, model=model, **GUIDED)
    result = export(policy, run, tmp_path, PROMPT)
    assert result.file == f"export/{policy.family.part}"
    assert result.difference_to_base > 0.03
    assert f"{policy.family.part}={policy.family.part}" in result.snippet
