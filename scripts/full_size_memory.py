"""What `t2irl check` estimates for models at full size, without their weights: folders with configs and headers of weights only.

    python scripts/full_size_memory.py --out /tmp/full configs/flux1_dev/flow_grpo.yaml configs/sdxl/flow_grpo.yaml ...

Network shapes are the defaults of diffusers and the published configs; each config is checked with `model.path` set to such a
folder and prompt files of its own size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from full_size.networks import FULL, write_folder

from t2irl.check import describe
from t2irl.loading import load_run


def main() -> None:
    """Check each config and print what is estimated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, help=f"of the folders {', '.join(FULL)} under configs/")
    parser.add_argument("--out", type=Path, required=True, help="where folders and prompt files go")
    parser.add_argument("--processes", type=int, default=8, help="of the run, default 8")
    parser.add_argument(
        "--spread", action="store_true", help="with the denoiser's weights spread over them, as by FSDP2"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for file in ("train", "heldout"):
        (args.out / f"{file}.txt").write_text("\n".join(f"{file} {k}" for k in range(4096)), encoding="utf-8")
    for path in args.configs:
        folder = write_folder(args.out / path.parent.name, path.parent.name)
        data = [f"--data.prompts={args.out / 'train.txt'}", f"--data.heldout={args.out / 'heldout.txt'}"]
        run = load_run([path], [*data, f"--model.path={folder}"])
        print(path, describe(run, args.processes, args.spread), "", sep="\n")


if __name__ == "__main__":
    main()
