"""What denoisers keep for the backward pass: bytes per token, channel and layer, the constants of `t2irl/estimate.py`.

    python scripts/activation_bytes.py                      # SD3.5, FLUX.1 and Qwen-Image, some minutes on one core

Tensors are counted one by one while the trainer's own function computes a velocity with gradient, in networks of the published
shape of a layer but of 512 channels. What two depths differ by is what their layers keep. Copies of trained weights that autocast
makes are left out, since the estimate counts them by themselves.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from full_size.arms import PROMPTS, build
from full_size.profiles import PROFILES
from full_size.stages import Tracked

from t2irl.check import read_folder
from t2irl.config import Run
from t2irl.estimate import ACTIVATION_BYTES, BYTES, sizes
from t2irl.loading import Layer, load_run

IMAGES, HEADS = 2, {"num_attention_heads": 8, "attention_head_dim": 64}
NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[dict[str, int], dict[str, int]]]] = {
    "sd3": ("tiny-b", {"caption_projection_dim": 512, "dual_attention_layers": [], "pos_embed_max_size": 64}, ({"num_layers": 2}, {"num_layers": 4})),
    "flux": (
        "tiny-c", {"axes_dims_rope": [16, 24, 24]},
        ({"num_layers": 1, "num_single_layers": 2}, {"num_layers": 2, "num_single_layers": 4}),
    ),
    "qwen_image": ("tiny-d", {"axes_dims_rope": [16, 24, 24]}, ({"num_layers": 2}, {"num_layers": 4})),
}  # fmt: skip
"""Family -> profile that its folder comes from, settings of its denoiser, and of the two depths."""


def kept(run: Run) -> tuple[int, int]:
    """Bytes that a velocity of `IMAGES` images keeps alive, without copies of weights, and the elements that the estimate counts."""
    tracked = Tracked()
    with tracked:
        parts = build(run, torch.device("cpu"))
        text = parts.policy.text(PROMPTS[:IMAGES])
        latents = torch.randn(IMAGES, *parts.family.latent_shape)
        before = tracked.held
        velocity = parts.policy.velocity(latents, torch.full((IMAGES,), 0.5), text)
        found = tracked.held - before
    assert velocity.requires_grad
    precision, full = BYTES[run.model.precision], run.policy.tune.type == "full"
    copies = sum(p.numel() for p in parts.policy.trained.values()) * precision if full and precision < 4 else 0
    return found - copies, IMAGES * sizes(run, read_folder(run.model.path)).kept


def measure(family: str, tuning: str, precision: str, resolution: int) -> float:
    """Bytes per token, channel and layer; of (resolution / 4)^2 tokens of the image."""
    profile, settings, depths = NETWORKS[family]
    counts = []
    for depth in depths:
        with tempfile.TemporaryDirectory() as place:
            folder = PROFILES[profile].folder(Path(place))
            _change(folder / "transformer/config.json", {**HEADS, **settings, **depth})
            tree = PROFILES[profile].tree(folder)
            tree["rollout"] = {**tree["rollout"], "guidance_scale": 1.0, "negative_prompt": ""}
            tree["model"] = {
                **tree["model"],
                "gradient_checkpointing": False,
                "resolution": resolution,
                "precision": precision,
            }
            tree["policy"] = {"tune": tree["policy"]["tune"] if tuning == "lora" else {"type": "full"}}
            counts.append(kept(load_run([Layer(tree, {})], [])))
    (less, fewer), (more, all_of_them) = counts
    return (more - less) / (all_of_them - fewer)


def _change(file: Path, settings: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")


def main() -> None:
    """Print a table, with the constant that the estimate has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--resolution",
        type=int,
        default=128,
        help="a quarter of it, squared, is the number of tokens; default 128: 1024, as of 512 pixels",
    )
    args = parser.parse_args()
    for family in args.family:
        for (tuning, size), constant in ACTIVATION_BYTES.items():
            precision = "fp32" if size == 4 else "bf16"
            found = measure(family, tuning, precision, args.resolution)
            print(f"{family:<12}{tuning:<6}{precision}  {found:6.1f}  (estimate {constant})", flush=True)


if __name__ == "__main__":
    main()
