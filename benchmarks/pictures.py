# ruff: noqa: E402  the pack is named before it is imported

"""The demo model quantized by every recipe: PSNR and SSIM of its drawings against the 16-bit model's.

    OMP_NUM_THREADS=1 python benchmarks/pictures.py [--ranks 16,32] [--precisions int4,nvfp4] [--scenes 96]

Same noise, 20 steps, cfg 2. Calibration draws 32 other scenes in 12 steps, more of them late, where detail is made.
The model is small and tame (K = 256): good for seeing that nothing is broken, too easy for ranking recipes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pack

pack.alias()
from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters.demo import load_vae
from svdquant_nodes.svdquant.adapters.quantizing.plans import make_plan
from svdquant_nodes.svdquant.quantizer import recipes, stream
from svdquant_nodes.svdquant.quantizer.compare import psnr, ssim
from svdquant_nodes.svdquant.quantizer.statistics import Statistics
from svdquant_nodes.tools.demo_model import files, flow, flux, fourbit
from svdquant_nodes.tools.demo_model.quantize import paint, some_scenes

SOURCE = files.DEMO / files.MODEL


def calibrate(model: flux.Flux, sources: set[str]) -> Statistics:
    """What every source linear reads while the model draws 32 scenes."""
    seen = Statistics(tokens=4096)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.see(name, given[0])
        )
        for name in sources
    ]
    paint(model, some_scenes(32, seed=5), seed=6, times=flow.schedule(12, shift=-0.5))
    for hook in hooks:
        hook.remove()
    return seen


def draw(model: flux.Flux, scenes: int) -> Tensor:
    """Pictures [B, 64, 64, 3] in 0..1 of scenes that calibration did not see."""
    latents = paint(model, some_scenes(scenes, seed=77), seed=99, times=flow.schedule(20))
    return load_vae().to_patches(latents).clamp(-1, 1).movedim(1, -1) / 2 + 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--precisions", default="int4,nvfp4")
    parser.add_argument("--recipes", default=",".join(recipes.RECIPES))
    parser.add_argument("--scenes", type=int, default=96)
    args = parser.parse_args()
    model = flux.load(SOURCE)
    exact = draw(model, args.scenes)
    seen = None
    for precision in args.precisions.split(","):
        for rank in map(int, args.ranks.split(",")):
            for recipe in args.recipes.split(","):
                for centred in (False, True) if recipe == "best" else (False,):
                    plan = make_plan(open_source(SOURCE), precision=precision, rank=rank, centred=centred)
                    seen = seen or calibrate(model, {job.source for job in plan.jobs if not job.chunks})
                    began = time.perf_counter()
                    with tempfile.TemporaryDirectory() as folder:
                        path = Path(folder, "made.safetensors")
                        samples = None if recipe == "instant" else seen
                        stream.quantize(plan, path, stream.Settings(recipe), statistics=samples)
                        seconds = time.perf_counter() - began
                        near = draw(fourbit.load(path, model), args.scenes)
                    one = psnr(near, exact)
                    spread = (one.std() / len(one) ** 0.5).item()
                    print(
                        f"{precision:6} r{rank:<3} {recipe + (', centred' if centred else ''):18} "
                        f"PSNR {one.mean():6.2f} ± {spread:.2f} dB  SSIM {ssim(near, exact).mean():.4f}  "
                        f"quantized in {seconds:.0f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main()
