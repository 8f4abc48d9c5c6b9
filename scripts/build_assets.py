"""Train the models of the shapes world from scratch and write them to `assets/`.

    python scripts/build_assets.py        # 69 minutes on two cores shared with other work, and 24 for tiny-sd3-styles; tiny-dinov2 not counted

Stages: tokenizer, vae, decoder, sd3 (text encoders and transformer together), clip, card, styles, dino, artifact. Each training stage saves itself
every few hundred steps under `--work` and continues from there after an interruption; a finished stage is skipped.
Everything is drawn from `--seed`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from shapes_models.artifact import make_artifact
from shapes_models.clip import build_clip
from shapes_models.dino import make_dino
from shapes_models.pipeline import measure, write_sd3
from shapes_models.sd3 import PLAIN_STEPS, SD3_BATCH, SD3_STEPS, T5_ZEROS, build_sd3
from shapes_models.stage import seconds_spent
from shapes_models.styles import make_styles
from shapes_models.text import build_tokenizer
from shapes_models.vae import PICTURES, build_vae, draw, encode_all, polish_decoder, training_captions
from transformers import CLIPModel, CLIPTokenizer

from t2irl.shapes.captions import sample_captions
from t2irl.utils.memory import keep_heap


def write_prompts(folder: Path) -> None:
    """Prompt files: lines drawn as the grammar says (four kinds, equal chance), so short kinds repeat.

    One more has the training captions with several objects: groups of single ones are soon all right and teach nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, n, heldout in (("shapes_train.txt", 2048, False), ("shapes_heldout.txt", 256, True)):
        captions = sample_captions(n, np.random.default_rng(11 if heldout else 7), heldout=heldout)
        (folder / name).write_text("".join(c.text + "\n" for c in captions))
        if not heldout:
            several = (c.text + "\n" for c in captions if c.kind != "single")
            (folder / "shapes_train_several.txt").write_text("".join(several))


def write_clip(folder: Path, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """The CLIP folder, weights in float16."""
    clip.half().save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "size": 64,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1))


def write_card(folder: Path, seconds: float) -> None:
    """Model card with the figures of the written weights."""
    rows = []
    for zeros, guidance in ((0, 1.0), (T5_ZEROS, 1.0), (0, 3.0)):
        scores = measure(folder, zeros, guidance, 1024 if guidance == 1 else 256)
        rows.append(f"| {zeros} | {guidance:g} | " + " | ".join(f"{v:.3f}" for v in scores.values()) + " |")
        print(rows[-1], flush=True)
    table = "\n".join(
        [
            "| max_sequence_length | guidance | clauses | correct | cleanliness | gold |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )
    (folder / "README.md").write_text(
        CARD.format(
            table=table, minutes=seconds / 60, steps=SD3_STEPS + PLAIN_STEPS, batch=SD3_BATCH, pictures=PICTURES
        )
    )


CARD = """# tiny-sd3

A `StableDiffusion3Pipeline` for the shapes world: 64 x 64 pictures of one to three coloured shapes. Good but improvable, a
base model for reinforcement learning on a CPU.

Trained from scratch on {pictures} rendered pictures ({steps} steps of {batch}; held-out captions never shown) by

    make assets

in {minutes:.0f} minutes, by the clock of all stages together, on two cores. Weights are float16; load them as float32 on a CPU.

Held-out captions, the four kinds with equal chance, 10 Euler steps, stock pipeline (1024 pictures at guidance 1, 256 at 3):

{table}

`max_sequence_length` is the number of zero vectors that the pipeline appends in place of a T5 encoder. The model was
trained with none and with the default 256, so `StableDiffusion3Pipeline.from_pretrained(...)(prompt)` draws as it is; with 0
the transformer sees 80 tokens instead of 336.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets"), help="where the finished models go")
    parser.add_argument(
        "--work", type=Path, default=Path("build/assets"), help="where unfinished stages keep their state"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        choices=["styles", "dino", "artifact"],
        help="train nothing but tiny-dinov2, or tiny-sd3-styles or tiny-artifact from the models there are",
    )
    args = parser.parse_args()
    keep_heap()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.only == "styles":
        return make_styles(args.work, args.out, args.seed)
    if args.only == "dino":
        return make_dino(args.work, args.out / "tiny-dinov2", args.seed)
    if args.only == "artifact":
        return make_artifact(args.work, args.out, args.seed)

    tokenizer = build_tokenizer(args.work / "tokenizer")
    write_prompts(args.out / "prompts")
    pictures = draw(training_captions(args.seed), args.seed)
    vae = build_vae(args.work, pictures, args.seed)
    latents = encode_all(args.work, vae, pictures)
    polish_decoder(args.work, vae, pictures, args.seed)
    del pictures
    policy = build_sd3(args.work, latents, vae, tokenizer, args.seed)
    clip = build_clip(args.work, tokenizer, args.seed)
    write_clip(args.out / "tiny-clip", clip, tokenizer)
    write_sd3(args.out / "tiny-sd3", policy, vae, tokenizer)
    write_card(args.out / "tiny-sd3", seconds_spent(args.work, ("vae", "decoder", "sd3", "sd3_plain", "clip")))
    make_styles(args.work, args.out, args.seed)
    make_dino(args.work, args.out / "tiny-dinov2", args.seed)
    make_artifact(args.work, args.out, args.seed)


if __name__ == "__main__":
    main()
