"""What `check` estimates beside the tensors that an iteration really holds, counted one by one; and the sentence of a run's end."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from scripts.full_size.flops import backward_factor, forward_flops, known_peak
from scripts.full_size.stages import Stages, Tracked
from t2irl.check import read_folder
from t2irl.config import Run
from t2irl.estimate import Estimate, blocks, estimate
from t2irl.footprint import Footprint, sentence
from t2irl.geometry import Geometry
from t2irl.loading import load_run
from tests.end_to_end.runs import base_config
from tests.families import CASES

SD35 = {"num_attention_heads": 24, "attention_head_dim": 64, "num_layers": 24, "dual_attention_layers": range(13)}
FLUX = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "num_single_layers": 38}
QWEN = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 60}


@pytest.mark.parametrize(
    ("family", "denoiser", "pixels", "text", "tflop"),
    [
        ("sd3", SD35, 512, 205, 2.22),
        ("sd3", SD35, 512, 333, 2.44),
        ("sd3", SD35, 1024, 333, 11.25),
        ("flux", FLUX, 512, 512, 21.5),
        ("flux", FLUX, 1024, 512, 74.4),
        ("qwen_image", QWEN, 512, 64, 15.7),
        ("qwen_image", QWEN, 1024, 64, 69.3),
    ],
)
def test_operations_of_published_models(family: str, denoiser: dict, pixels: int, text: int, tflop: float) -> None:
    """As PyTorch's counter finds them for the whole network at full size, within 1 %."""
    assert math.isclose(forward_flops(family, denoiser, (pixels // 16) ** 2, text) / 1e12, tflop, rel_tol=0.01)


def test_operations_as_counted() -> None:
    """The closed form against PyTorch's counter, on networks wide enough for embeddings to matter little."""
    with torch.device("meta"):
        sd3 = SD3Transformer2DModel(
            sample_size=64, num_layers=4, attention_head_dim=64, num_attention_heads=16, joint_attention_dim=64,
            caption_projection_dim=1024, pooled_projection_dim=64, dual_attention_layers=(0, 1),
        )  # fmt: skip
        flux = FluxTransformer2DModel(
            num_layers=2, num_single_layers=3, num_attention_heads=8, joint_attention_dim=64, pooled_projection_dim=64
        )
        calls = {
            "sd3": (sd3, {"hidden_states": torch.empty(1, 16, 64, 64), "timestep": torch.empty(1)}),
            "flux": (flux, {"hidden_states": torch.empty(1, 1024, 64), "timestep": torch.empty(1), "img_ids": torch.empty(1024, 3), "txt_ids": torch.empty(100, 3)}),
        }  # fmt: skip
        text = {"encoder_hidden_states": torch.empty(1, 100, 64), "pooled_projections": torch.empty(1, 64)}
        for family, (network, inputs) in calls.items():
            with FlopCounterMode(display=False) as counter:
                network(**inputs, **text)
            formula = forward_flops(family, network.config, 1024, 100)
            assert math.isclose(formula, counter.get_total_flops(), rel_tol=0.02), family


def test_devices_and_factors() -> None:
    assert known_peak("NVIDIA H100 80GB HBM3", "bf16", False) == 989.4e12
    assert known_peak("NVIDIA H100 PCIe", "bf16", False) == 756e12
    assert known_peak("NVIDIA A100-SXM4-80GB", "fp32", False) == 19.5e12
    assert known_peak("NVIDIA A100-SXM4-80GB", "fp32", True) == 156e12
    assert known_peak("something else", "bf16", False) is None
    assert backward_factor("flux", "lora") == 2.12 and backward_factor("flux", "full") == 3
    with pytest.raises(KeyError, match="no count for the family 'sana'; known: sd3, flux, qwen_image"):
        forward_flops("sana", QWEN, 1, 1)


def test_tensors_are_counted_until_they_are_freed() -> None:
    """Views and changes in place are no new memory; what an inner stage takes is not the outer one's."""
    tracked = Tracked()
    stages = Stages(torch.device("cpu"), tracked)
    with tracked:
        kept = torch.zeros(1000)
        with stages.stage("outer"):
            view = kept.view(10, 100).add_(1)
            with stages.stage("inner"):
                torch.ones(4000) + torch.ones(1)
            assert tracked.held == 4000
            del view
        small = kept[:10] * 2
    assert tracked.held == 4040
    assert stages.peak["inner"] == 4000 + 4 * 4000 * 2 + 4
    assert stages.peak["outer"] <= 4004
    del kept, small
    assert tracked.held == 0
    assert set(stages.take()) == {"outer", "inner", "other"}


def parts_of(run: Run, folder: Path, processes: int, spread: bool) -> dict[str, int]:
    """The estimate's rows."""
    found = estimate(run, Geometry.of(run, processes), read_folder(folder), 12, spread)
    return {name.split(",")[0]: size or 0 for name, size in (*found.device, *found.phases)}


def test_spread_weights_are_counted_by_part(sd3_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Of 4 processes each holds a quarter, and gathers the largest block, the next one and what is in no block."""
    folder = sd3_folder()
    shapes = read_folder(folder).networks["transformer"].shapes or {}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    first = sum(size for name, size in sizes.items() if name.startswith("transformer_blocks.0."))
    others = sum(size for name, size in sizes.items() if not name.startswith("transformer_blocks."))
    total = sum(sizes.values())
    assert blocks(shapes) == (first, others)  # the last of the two blocks is smaller
    config = base_config(tmp_path, folder)
    full, kl, bf16 = ("--policy.tune={type: full}", "--regularizers.kl.type=kl", "--model.precision=bf16")
    run = load_run([config], [full, bf16, kl])
    whole, part = (parts_of(run, folder, 4, spread) for spread in (False, True))
    quarter = -(-total // 4)
    assert (
        whole["reference copy of the denoiser"] == 4 * total and part["reference copy of the denoiser"] == 4 * quarter
    )
    assert (whole["trained weights"], part["trained weights"]) == (20 * total, 20 * quarter)
    gathered = (2 * first + others) * 2
    casts = 2 * total
    update, drawing = (part[name] - whole[name] + casts for name in ("update", "drawing 4 images"))
    assert (
        update == gathered + first * (2 + 4) + 4 * quarter
    )  # gradients and their sum; weights put aside for the KL term
    assert drawing == gathered + 2 * 4 * quarter  # the average, and the reference policy under it
    assert parts_of(run, folder, 1, True) == parts_of(run, folder, 1, False)
    plainest = load_run([config], [full, bf16, "--monitors.prompts=0", "--policy.ema=null"])
    alone = (
        parts_of(plainest, folder, 4, True)["drawing 4 images"]
        - parts_of(plainest, folder, 4, False)["drawing 4 images"]
    )
    assert alone == gathered - casts


def test_loading_may_be_the_peak(sd3_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Each process loads all of what it then keeps a part of; with adapters little comes later."""
    folder = sd3_folder()
    run = load_run([base_config(tmp_path, folder)], [])
    part = parts_of(run, folder, 4, True)
    later = part["denoiser"] + part["adapters"] + part["stored trajectory"]
    denoiser = read_folder(folder).networks["transformer"].size or 0
    assert part["loading the whole denoiser"] == 4 * denoiser - later > 0
    assert "loading the whole denoiser" not in parts_of(run, folder, 4, False)


@pytest.mark.parametrize("case", CASES)
def test_blocks_by_name_are_what_is_gathered(case: str, tiny_folder: Callable[[str], Path]) -> None:
    """As the denoiser's own class says where to cut, in every family."""
    folder = read_folder(tiny_folder(case))
    network = folder.networks[folder.denoiser]
    with torch.device("meta"):
        denoiser = getattr(diffusers, network.config["_class_name"]).from_config(network.config)
    names, seen, sizes = set(denoiser._no_split_modules), set[int](), []
    for module in reversed([m for m in denoiser.modules() if type(m).__name__ in names]):
        own = [p for p in module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        sizes.append(sum(p.numel() for p in own))
    assert blocks(network.shapes or {})[0] == max(sizes)


def test_phases_come_one_at_a_time() -> None:
    found = Estimate((("a", 10), ("b", None)), (("rests", 7),), (("x", 3), ("y", 5)))
    assert (found.peak, found.in_one_memory, found.complete) == (15, 22, False)
    assert Estimate((("a", 1),), (), ()).peak == 1


def test_the_end_of_a_run_compares() -> None:
    """By what this process held; the other part of the ratio is what `check` says."""
    memory = {
        "estimate_gib": 2.0, "complete": True, "kind": "resident",
        "processes_gib": [
            {"peak": 4.0, "before": 1.0, "model": 1.0, "rewards": 0.5, "ratio": 1.25},
            {"peak": 3.0, "before": 1.0, "model": 1.0, "rewards": 0.5, "ratio": 0.75},
        ],
    }  # fmt: skip
    assert sentence(memory) == (
        "4.00 GiB resident at most, 1.00 of it before the model was loaded and 0.50 for rewards; the other 2.50 GiB were "
        "estimated as 2.00 (ratio 1.25)"
    )
    footprint = Footprint(torch.device("cpu"))
    footprint.mark("start")
    block = mmap.mmap(-1, 2**26)  # 64 MiB, which no freed memory can serve
    block.write(b"1" * 2**26)
    footprint.mark("model")
    footprint.mark("rewards")
    measured = footprint.measured()
    assert 0.055 < measured["model"] < 0.08 and measured["rewards"] < 0.01
    assert measured["peak"] >= measured["before"] + measured["model"] - 1e-3
    del block
