"""Draw reference images for the prompts of a file, and write the index that `references: {index: ...}` reads.

    python scripts/make_references.py --prompts prompts.txt --out runs/reference_images/qwen --model PIPELINE_FOLDER --count 8
    python scripts/make_references.py --prompts assets/prompts/shapes_train.txt --out runs/reference_images/outlined \\
        --renderer shapes --style outlined

With --model, any diffusers text-to-image pipeline draws; with --renderer shapes, the renderer of the shapes world does. Each
picture's noise depends on --seed, its prompt and its number alone. Pictures that are there are kept, so an interrupted call
is simply repeated, and the work may be shared: `--shard 0/4` to `--shard 3/4`, or `torchrun --nproc-per-node 4`. Whichever
shard finishes last writes `index.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2irl.data import load_prompts
from t2irl.errors import DataError, UserError

Draw = Callable[[Sequence[tuple[str, int]]], Iterable[np.ndarray]]
"""(prompt, seed) of each picture -> (H, W, 3) uint8 pictures."""


def file_name(prompt: str, number: int) -> str:
    """Named after the prompt's text, so that another order of the prompt file changes nothing."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return f"{digest[:2]}/{digest[:16]}_{number}.png"


def picture_seed(seed: int, prompt: str, number: int) -> int:
    """A 63-bit seed of one picture, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}/{prompt}".encode(), digest_size=8).digest(), "little") >> 1


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """A file that is there is whole, even after a crash."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    write(partial)
    partial.replace(file)


def settle(out: Path, settings: dict[str, Any]) -> None:
    """Keep the settings beside the pictures; refuse to mix pictures of two kinds in one folder."""
    file = out / "settings.json"
    if not file.exists():
        write_atomically(file, lambda path: path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8"))
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
    if changed:
        told = ", ".join(f"{k} was {before.get(k)!r} and is {settings.get(k)!r}" for k in changed)
        raise DataError(f"--out = {out}: its pictures were drawn with other settings: {told}. Choose another folder")


def shapes_drawer(style: str) -> Draw:
    """The renderer of the shapes world."""
    from t2irl.shapes.captions import parse_caption
    from t2irl.shapes.render import sample_scene
    from t2irl.shapes.styles import STYLES

    if style not in STYLES:
        raise DataError(f"--style = {style}: known styles are {', '.join(STYLES)}")

    def draw(wanted: Sequence[tuple[str, int]]) -> Iterable[np.ndarray]:
        for prompt, seed in wanted:
            try:
                caption = parse_caption(prompt)
            except ValueError as error:
                raise DataError(f"--renderer shapes: {error}") from error
            yield STYLES[style](sample_scene(caption, np.random.default_rng(seed)))

    return draw


def pipeline_drawer(args: argparse.Namespace, call: dict[str, Any], rank: int) -> Draw:
    """A diffusers pipeline, each picture with a generator of its own."""
    import torch
    from diffusers import DiffusionPipeline

    device = args.device or (f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype, local_files_only=not args.download)
    except (OSError, ValueError) as error:
        raise DataError(f"--model = {args.model}: not a pipeline that diffusers can load: {error}") from error
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)

    def draw(wanted: Sequence[tuple[str, int]]) -> Iterable[np.ndarray]:
        generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in wanted]
        texts = [prompt + args.suffix for prompt, _ in wanted]
        try:
            images = pipe(texts, generator=generators, output_type="pil", **call).images
        except TypeError as error:
            raise DataError(f"{type(pipe).__name__} does not take these settings: {error}; see --option") from error
        return [np.asarray(image.convert("RGB")) for image in images]

    return draw


def draw_missing(
    out: Path, prompts: Sequence[str], args: argparse.Namespace, draw: Draw, shard: tuple[int, int]
) -> int:
    """Draw what this shard still owes; returns how many."""
    mine = [(p, k) for n, p in enumerate(prompts) if n % shard[1] == shard[0] for k in range(args.count)]
    owed = [(p, k) for p, k in mine if not (out / file_name(p, k)).exists()]
    for start in range(0, len(owed), args.batch_size):
        batch = owed[start : start + args.batch_size]
        pictures = draw([(p, picture_seed(args.seed, p, k)) for p, k in batch])
        for (prompt, number), picture in zip(batch, pictures, strict=True):
            image = Image.fromarray(picture)
            write_atomically(out / file_name(prompt, number), lambda path, image=image: image.save(path, format="PNG"))
        done = min(start + args.batch_size, len(owed))
        if done == len(owed) or start // args.batch_size % 50 == 0:
            print(f"shard {shard[0]}: {done} of {len(owed)} pictures", flush=True)
    return len(owed)


def write_index(out: Path, prompts: Sequence[str], count: int) -> Path | None:
    """Write `index.jsonl` if every picture is there, earlier entries of other prompts kept; None otherwise."""
    entries = {p: [file_name(p, k) for k in range(count)] for p in prompts}
    if not all((out / name).exists() for names in entries.values() for name in names):
        return None
    file = out / "index.jsonl"
    if file.exists():
        lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        entries = {entry["prompt"]: entry["files"] for entry in lines} | entries
    lines = [json.dumps({"prompt": p, "files": names}, ensure_ascii=False) + "\n" for p, names in entries.items()]
    write_atomically(file, lambda path: path.write_text("".join(lines), encoding="utf-8"))
    return file


def shard_of(text: str | None) -> tuple[int, int]:
    """Which part of how many: `--shard`, or what torchrun says, or all."""
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise DataError(f"--shard = {text}: expected i/n with i from 0 to n - 1, such as 0/4")
    return int(found[1]), int(found[2])


def options(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=JSON arguments of the pipeline's call; what is no JSON is text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise DataError(f"--option = {pair}: expected NAME=VALUE, such as true_cfg_scale=4.0")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--prompts", type=Path, required=True, nargs="+", help="prompt files, as a run reads them")
    cli.add_argument("--out", type=Path, required=True, help="folder of the pictures and their index")
    source = cli.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder of a diffusers pipeline")
    source.add_argument("--renderer", choices=["shapes"], help="draw without a model")
    cli.add_argument("--style", default="plain", help="of the renderer: plain, outlined or pastel")
    cli.add_argument("--count", type=int, default=4, help="reference images of each prompt (default 4)")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--shard", help="i/n: draw part i of n, counted from 0")
    cli.add_argument(
        "--suffix", default="", help="put after each prompt for the pipeline only, such as ', anime style'"
    )
    cli.add_argument("--steps", type=int, help="denoising steps; the pipeline's own by default")
    cli.add_argument("--guidance", type=float, help="guidance_scale; the pipeline's own by default")
    cli.add_argument("--size", type=int, help="height and width in pixels; the pipeline's own by default")
    cli.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="another argument of its call")
    cli.add_argument("--batch-size", type=int, default=8, help="pictures in one call of the pipeline")
    cli.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    cli.add_argument("--device", help="such as cuda:0; the first free choice by default")
    cli.add_argument("--download", action="store_true", help="--model may be a name on the Hugging Face hub")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and write the index. Returns the exit code."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(args: argparse.Namespace) -> None:
    """What `main` does, with errors raised."""
    for name in ("count", "batch_size"):
        if getattr(args, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} = {getattr(args, name)}: expected at least 1")
    shard = shard_of(args.shard)
    prompts = list(dict.fromkeys(text for file in args.prompts for text in load_prompts(file, "--prompts").texts))
    given = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "height": args.size,
        "width": args.size,
    }
    call = {name: value for name, value in given.items() if value is not None} | options(args.option)
    if args.renderer:
        if call or args.suffix:
            raise DataError(
                "--steps, --guidance, --size, --suffix and --option are for --model; the renderer has only --style"
            )
        settings = {"renderer": args.renderer, "style": args.style, "seed": args.seed}
        draw = shapes_drawer(args.style)
    else:
        settings = {"model": args.model, "seed": args.seed, "suffix": args.suffix, "dtype": args.dtype, "call": call}
        draw = pipeline_drawer(args, call, shard[0])
    settle(args.out, settings)
    drawn = draw_missing(args.out, prompts, args, draw, shard)
    index = write_index(args.out, prompts, args.count)
    rest = f"index: {index}" if index else "other shards are not done yet; the last one writes the index"
    print(f"{drawn} pictures drawn for {len(prompts)} prompts. {rest}")


if __name__ == "__main__":
    sys.exit(main())
