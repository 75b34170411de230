"""Draw eight scenes with the demo's files, in plain torch: a row in 16 bits, in 4 bits, and with half and all LoRA.

OMP_NUM_THREADS=1 python tools/demo_model/pictures.py --demo demo --out demo/drawings.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pack

pack.alias()
from svdquant_nodes.svdquant.adapters.demo import encode_prompt, load_vae
from svdquant_nodes.tools.demo_model import files, flow, flux, fourbit, shapes

CAPTIONS = [
    "a big yellow star at the center on a navy background",
    "a big red circle at the left on a cream background",
    "a small white ring at the right on a teal background",
    "a big purple square at the top on a gray background",
    "a big orange triangle at the center on a navy background",
    "a big blue cross at the center on a cream background",
    "a big green ring at the center on a gray background",
    "a small red star at the bottom on a teal background",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=files.DEMO, help="folder of the files")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    vae = load_vae(args.demo / files.VAE)
    prompts = flow.Prompts.encode(CAPTIONS, encode_prompt)
    noise = torch.randn(len(CAPTIONS), 16, 8, 8, generator=torch.Generator().manual_seed(args.seed))

    def row(model: flow.Velocity) -> torch.Tensor:
        latent = flow.sample(model, noise, prompts, prompts.index(CAPTIONS), times=flow.schedule(20))
        return vae.to_patches(latent)

    exact = flux.load(args.demo / files.MODEL)
    small = fourbit.load(args.demo / files.INT4, exact)
    rows = [row(exact), row(small)]
    for strength in (0.5, 1.0):
        fourbit.set_lora(small, args.demo / files.LORA, strength)
        rows.append(row(small))
    shapes.save_sheet(rows, args.out, zoom=2)


if __name__ == "__main__":
    main()
