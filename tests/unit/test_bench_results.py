"""What the benchmark makes of measured blocks, and which of them it refuses to compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.full_size import gpu
from scripts.full_size.card import card
from scripts.full_size.results import beside, merged
from t2irl.errors import ConfigError
from t2irl.loading import load_run
from tests.end_to_end.runs import base_config


def block(denoise: list[float], **more: Any) -> dict[str, Any]:
    """A measured one: decoding takes 1 s, the update 2 s."""
    timings = [{"denoise": s, "decode": 1.0, "forward": 1.0, "backward": 1.0} for s in denoise]
    return {
        "status": "ok", "timings": timings, "images": 8, "window": 2, "log_ratio_first": 0.0, "rss_bytes": 5,
        "flops": {"rollout": 4e12, "update": 2e12, "again": 1e12}, "tflops": {"peak": 2.0, "measured": 1.0},
        "peak_bytes": {"denoise": 1}, "reserved_bytes": {"denoise": 2}, **more,
    }  # fmt: skip


def test_blocks_of_an_arm_are_taken_together() -> None:
    """Medians over all iterations of both; the larger of peaks; shares of the peak by the medians of stages."""
    found = merged([block([2, 3]), block([4, 5], peak_bytes={"denoise": 7}, log_ratio_first=1e-6, gpu={"driver": "1"})])
    assert found["blocks_s"] == [[5, 6], [7, 8]]
    assert found["iteration_s"] == 6.5 and found["stages_s"]["denoise"] == 3.5 and found["images_per_s"] == 8 / 6.5
    assert found["trained_rows_per_s"] == 16 / 6.5
    assert (found["peak_bytes"], found["reserved_bytes"], found["log_ratio_first"]) == ({"denoise": 7}, {"denoise": 2}, 1e-6)  # fmt: skip
    assert found["mfu"]["rollout"] == pytest.approx(4 / 4.5 / 2) and found["mfu"]["update_hfu"] == pytest.approx(
        3 / 2 / 2
    )
    assert found["gpu"] == [{"driver": "1"}] and "timings" not in found


def test_an_arm_of_which_one_block_failed_has_failed() -> None:
    failed = {"status": "failed", "reason": "ended by SIGKILL", "stage": "build"}
    assert merged([block([2, 3]), failed]) == failed


def test_a_rollout_alone_has_no_share_of_an_update() -> None:
    bare = block([2], flops={"rollout": 4e12, "update": 0.0, "again": 0.0})
    del bare["log_ratio_first"]
    found = merged([bare])
    assert found["mfu"].keys() == {"rollout", "denoise"} and "trained_rows_per_s" not in found


def test_a_card_knows_the_work_from_how_it_is_done(sd3_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A switch changes `hash`, other work and other networks change both; where the model lies changes neither."""
    folder = sd3_folder()
    file = base_config(tmp_path, folder)

    def of(*words: str, at: Path = folder) -> tuple[str, str]:
        found = card(load_run([file], list(words)), at)
        return found["hash"], found["work"]

    base = of()
    assert of("--model.path=elsewhere", "--run_dir=elsewhere") == base
    for switch in ("--speed.compile=true", "--model.precision=bf16", "--rollout.batch_size=2", "--processes.timeout=5"):
        found = of(switch)
        assert found[0] != base[0] and found[1] == base[1], switch
    for work in ("--rollout.steps=5", "--policy.tune.rank=8", "--rollout.guidance_scale=2", "--seed=3"):
        found = of(work)
        assert found[0] != base[0] and found[1] != base[1], work
    wider = of(at=sd3_folder(shift=2.0))
    assert wider[0] != base[0] and wider[1] != base[1]
    assert card(load_run([file], []), folder, reference=True)["hash"] != base[0]


def results(gpu: str = "H100", **cards: str) -> dict[str, Any]:
    """A file of the benchmark: arms with these digests."""
    arms = [{"name": n, "status": "ok", "card": {"hash": h, "work": "w"}, "iteration_s": 2.0} for n, h in cards.items()]
    return {"environment": {"gpus": [gpu], "cpu": "x"}, "profiles": [{"profile": "b", "arms": arms}]}


def test_only_the_same_work_is_compared() -> None:
    now = results(base="1", compile="2")
    before = results(base="1", flash="3")
    before["profiles"][0]["arms"][0]["iteration_s"] = 3.0
    assert beside(now, before) == [("b", "base", 2.0, 3.0)]
    with pytest.raises(ConfigError, match=r"not the same work.*\nb, compile: 2, before 4"):
        beside(now, results(base="1", compile="4"))
    with pytest.raises(ConfigError, match="measured on H100 and on A100"):
        beside(now, results("A100", base="1"))
    with pytest.raises(ConfigError, match="no arm in common"):
        beside(now, results(flash="3"))


def test_readings_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nvidia-smi prints them, with what it does not tell; None without it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.read() is None and gpu.summary([]) is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1, 700.00, 1980, 2619, 1755, 2619, 512.5, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = gpu.read()
    assert found is not None
    assert gpu.summary([found, {**found, "sm_mhz": "1980"}]) == {
        "name": "NVIDIA H100", "driver": "580.1", "power_limit_w": "700.00", "sm_limit_mhz": "1980", "memory_limit_mhz": "2619",
        "sm_mhz": [1755, 1867.5, 1980], "memory_mhz": [2619, 2619, 2619], "power_w": [512.5, 512.5, 512.5], "temperature_c": None,
    }  # fmt: skip
    tool.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert gpu.read() is None
