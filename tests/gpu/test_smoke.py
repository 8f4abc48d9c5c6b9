"""Every family on a GPU with its tiny checkpoint, in a minute or two: kernels, precision, a step of training, memory.

python -m pytest -n 0 -rP tests/gpu         # -rP: show what was measured as well
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.end_to_end.runs import base_config, metrics, train
from tests.families import CASES
from tests.invariants.toy import PROMPTS, toy_parts, toy_run

Folder = Callable[..., Path]
pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CLOSE, ALIKE = 0.05, 0.99
"""Bounds of the relative error of a bf16 velocity and of the cosine of its gradient."""


def velocity_and_gradient(folder: Path, name: str, precision: str) -> tuple[Tensor, Tensor]:
    """Guided velocity of fixed inputs, and the adapters' gradient of its product with fixed numbers; both on the CPU."""
    model = {**CASES[name].model, "path": folder, "precision": precision}
    # Models read a thousand times level and guidance, some in bf16: with numbers that it holds, rounding here is that of the network.
    model |= {"embedded_guidance": 2.0} if name == "flux_dev" else {}
    rollout = {"guidance_scale": 2.0, "negative_prompt": "a blur"}
    policy = toy_parts(toy_run({"model": model, "rollout": rollout}), DEVICE).policy
    drawn = torch.Generator().manual_seed(0)
    for parameter in policy.trained.values():  # adapters that do something, so that all of them have a gradient
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=drawn))
    latents, weights = (torch.randn(3, *policy.family.latent_shape, generator=drawn) for _ in range(2))
    t = torch.tensor([0.5, 0.25, 0.125], device=DEVICE)
    velocity = policy.velocity(latents.to(DEVICE), t, policy.text(PROMPTS[:3]))
    (velocity * weights.to(DEVICE)).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.trained.values() if p.grad is not None])
    return velocity.detach().cpu(), gradient.cpu()


@pytest.mark.parametrize("name", CASES)
def test_bf16_is_near_plain_float32(tiny_folder: Folder, name: str) -> None:
    """Forward and backward, by the kernels that PyTorch chooses, against float32 with attention written out."""
    folder = tiny_folder(name)
    with sdpa_kernel(SDPBackend.MATH):
        exact, direction = velocity_and_gradient(folder, name, "fp32")
    found, gradient = velocity_and_gradient(folder, name, "bf16")
    error = float((found - exact).norm() / exact.norm())
    cosine = float(torch.nn.functional.cosine_similarity(gradient, direction, dim=0))
    print(f"{name}: velocity {error:.1e}, cosine of the gradients {cosine:.5f}")
    assert gradient.shape == direction.shape and bool(direction.any())
    assert error < CLOSE and cosine > ALIKE


@pytest.mark.parametrize("name", CASES)
def test_an_iteration(
    tiny_folder: Folder, tmp_path: Path, record_property: Callable[[str, object], None], name: str
) -> None:
    """Rollout, update, grid and export in bf16. Peak memory and its estimate are recorded; of tiny models they say little."""
    path = base_config(tmp_path, tiny_folder(name))
    config = yaml.safe_load(path.read_text())
    config |= {"iterations": 1, "model": {**CASES[name].model, "path": str(tiny_folder(name)), "precision": "bf16"}}
    path.write_text(yaml.safe_dump(config))
    assert train(path) == 0
    line = metrics(tmp_path / "run")[-1]
    assert abs(line["policy/log_ratio_first"]) < 1e-2 and line["policy/grad_norm"] > 0
    memory = json.loads((tmp_path / "run/summary.json").read_text())["memory"]
    (process,) = memory["processes_gib"]
    record_property("peak_gib", process["peak"])
    record_property("estimate_gib", memory["estimate_gib"])
    print(f"{name}: peak {process['peak']:.3f} GiB, estimated {memory['estimate_gib']:.3f}")
    assert memory["kind"] == "allocated on the GPU" and process["peak"] > 0
