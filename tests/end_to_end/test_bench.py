"""scripts/bench_gpu.py on the CPU: a variant measured, one refused, one that does not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.end_to_end.runs import call


def test_a_variant_that_does_not_fit_ends_nothing(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code, out, err = call(
        sys.executable, "scripts/bench_gpu.py", "--profile", "tiny-b", "--variant", "flash", "base again",
        "--own", "huge=--policy.tune.rank=17592186044416", "--iterations", "1", "--json", str(file),
    )  # fmt: skip
    assert code == 0, err[-2000:]
    assert "out of memory in build" in " ".join(out.split())
    (profile,) = json.loads(file.read_text())["profiles"]
    arms = {arm["name"]: arm for arm in profile["arms"]}
    assert {n: a["status"] for n, a in arms.items()} == {"base": "ok", "flash": "refused", "huge": "out of memory", "base again": "ok"}  # fmt: skip
    base = arms["base"]
    assert base["work"]["denoiser_backward_images"] == 16 and base["log_ratio_first"] < 1e-4
    assert arms["base again"]["against_base"]["velocity_max"] == 0
    assert 0.5 < max(base["peak_bytes"].values()) / base["estimate"]["peak_bytes"] < 2


def test_activations_are_what_the_estimate_says() -> None:
    """Of FLUX.1 in every tuning and precision, with few tokens, roughly."""
    code, out, err = call(sys.executable, "scripts/activation_bytes.py", "--family", "flux", "--resolution", "32")
    assert code == 0, err[-2000:]
    rows = [line.split() for line in out.splitlines() if line.startswith("flux ")]
    assert [row[1:3] for row in rows] == [["lora", "fp32"], ["lora", "bf16"], ["full", "fp32"], ["full", "bf16"]]
    for row in rows:
        assert 0.7 < float(row[3]) / float(row[-1].rstrip(")")) < 1.3, row
