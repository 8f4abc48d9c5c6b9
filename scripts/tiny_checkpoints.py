"""Write tiny random checkpoints in exactly the genuine folder formats: to try every model family on a CPU, without downloads.

python scripts/tiny_checkpoints.py --out models/tiny              # all of them
python scripts/tiny_checkpoints.py --out models/tiny sdxl flux1_dev
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from tiny_models.flux import make_flux
from tiny_models.flux2 import make_flux2_klein
from tiny_models.qwen_image import make_qwen_image
from tiny_models.sana import make_sana
from tiny_models.sd3 import make_sd3
from tiny_models.unet import make_sd, make_sdxl
from tiny_models.z_image import make_z_image

MAKERS = {
    "sd3": partial(make_sd3, t5=True),
    "sd35": partial(make_sd3, t5=True, qk_norm="rms_norm", dual_attention=(0,), shift=3.0),
    "flux1_dev": make_flux,
    "flux1_schnell": partial(make_flux, schnell=True),
    "flux2_klein_base": make_flux2_klein,
    "flux2_klein": partial(make_flux2_klein, distilled=True),
    "qwen_image": make_qwen_image,
    "z_image": make_z_image,
    "sana": make_sana,
    "sdxl": make_sdxl,
    "sd15": make_sd,
    "sd21": partial(make_sd, version="2.1"),
}
"""Folder name -> what writes it."""


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(MAKERS)}; all without a name")
    parser.add_argument("--out", type=Path, default=Path("models/tiny"), help="folder of the folders")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in MAKERS]
    if unknown:
        parser.error(f"unknown name {unknown[0]!r}; known: {', '.join(MAKERS)}")
    for name in args.names or MAKERS:
        print(MAKERS[name](args.out / name))


if __name__ == "__main__":
    main()
