"""scripts/bench_gpu.py on the CPU: variants measured, refused, too large, failing and killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.end_to_end.runs import call


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_whatever_becomes_of_a_variant_is_a_result(tmp_path: Path) -> None:
    """And those after it are measured; so is a plain loop, whose work is that of the rollout alone."""
    file, reward = tmp_path / "bench.json", "--rewards.vividness.type=tests.end_to_end.plugins"
    code, out, err = call(
        sys.executable, "scripts/bench_gpu.py", "--profile", "tiny-b", "--variant", "diffusers", "flash", "base again",
        "--own", "huge=--policy.tune.rank=17592186044416", "--own", f"raises={reward}:Mute", "--own", f"killed={reward}:Deadly",
        "--iterations", "1", "--json", str(file), timeout=900,  # seven processes
    )  # fmt: skip
    assert code == 0, err[-2000:]
    assert "out of memory in build" in " ".join(out.split())
    (profile,) = json.loads(file.read_text())["profiles"]
    arms = {arm["name"]: arm for arm in profile["arms"]}
    assert {n: a["status"] for n, a in arms.items()} == {
        "base": "ok", "diffusers": "ok", "huge": "out of memory", "raises": "failed", "killed": "failed", "base again": "ok",
        "flash": "refused",
    }  # fmt: skip
    base = arms["base"]
    assert base["work"]["denoiser_backward_images"] == 16 and base["log_ratio_first"] < 1e-4
    assert arms["base again"]["against_base"]["velocity_max"] == 0
    assert arms["base again"]["card"] == base["card"] != arms["diffusers"]["card"]
    assert 0.5 < max(base["peak_bytes"].values()) / base["estimate"]["peak_bytes"] < 2
    assert base["rss_bytes"] > 1e8
    assert arms["diffusers"]["work"] == {"denoiser_forward_images": 32, "decoded_images": 8}
    assert "times the plain denoiser calls and decoding" in out
    assert arms["raises"]["stage"] == "score" and "nothing to say" in arms["raises"]["reason"]
    assert arms["killed"]["stage"] == "warm-up 0" and arms["killed"]["reason"].startswith("ended by SIGKILL")


def test_a_variant_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """With all that it started, and in the order that was asked for; without a base there is nothing to report: exit code 1."""
    file = tmp_path / "bench.json"
    code, out, err = call(
        sys.executable, "scripts/bench_gpu.py", "--profile", "tiny-b", "--variant", "base again", "--order", "abba", "--arm-timeout",
        "0.5", "--json", str(file),
    )  # fmt: skip
    assert code == 1, err[-2000:]
    assert "base: timed out: not done after 0.5 s" in " ".join(out.split())
    (profile,) = json.loads(file.read_text())["profiles"]
    assert [(arm["name"], arm["status"]) for arm in profile["arms"]] == [
        ("base", "timed out"),
        ("base again", "timed out"),
    ]
    lines = [line for line in out.splitlines() if line.endswith(" ...")]
    assert lines == [f"tiny-b: {name} ..." for name in ("base", "base again", "base again", "base")]


def test_activations_are_what_the_estimate_says() -> None:
    """Of FLUX.1 in every tuning and precision, with few tokens, roughly."""
    code, out, err = call(sys.executable, "scripts/activation_bytes.py", "--family", "flux", "--resolution", "32")
    assert code == 0, err[-2000:]
    rows = [line.split() for line in out.splitlines() if line.startswith("flux ")]
    assert [row[1:3] for row in rows] == [["lora", "fp32"], ["lora", "bf16"], ["full", "fp32"], ["full", "bf16"]]
    for row in rows:
        assert 0.7 < float(row[3]) / float(row[-1].rstrip(")")) < 1.3, row
