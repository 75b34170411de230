"""Make the demo's 4-bit checkpoint, in Nunchaku's layout, and say what it costs in the picture.

    OMP_NUM_THREADS=1 python tools/demo_model/quantize.py --out demo

Calibration draws some scenes with the 16-bit model, guided as users will but with more late steps, where
detail is made, and keeps what every linear reads. The comparison draws other scenes with both models from the
same noise.
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pack

pack.alias()
from svdquant_nodes.loaders import nunchaku
from svdquant_nodes.svdquant.adapters.demo import encode_prompt, load_vae
from svdquant_nodes.svdquant.core.weights import LinearWeights
from svdquant_nodes.svdquant.quantizer.jobs import round_weights
from svdquant_nodes.tools.demo_model import checkpoint, files, flow, flux, fourbit, shapes, solve

SOURCE = files.DEMO / files.MODEL


def some_scenes(count: int, seed: int) -> list[str]:
    """Captions of `count` random scenes."""
    picks = torch.randint(len(shapes.ALL_SCENES), (count,), generator=torch.Generator().manual_seed(seed))
    return [shapes.ALL_SCENES[i].caption for i in picks.tolist()]


def paint(model: flow.Velocity, captions: list[str], *, seed: int, times: Tensor) -> Tensor:
    """Model latents [B, 16, 8, 8] of these captions from seeded noise."""
    prompts = flow.Prompts.encode(captions, encode_prompt)
    noise = torch.randn(len(captions), 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    return flow.sample(model, noise, prompts, prompts.index(captions), times=times)


def record_inputs(model: flux.Flux, sources: set[str], *, tokens: int) -> dict[str, Tensor]:
    """Up to `tokens` random input rows [M, K] of each named linear while the model draws 32 scenes."""
    seen: dict[str, list[Tensor]] = {source: [] for source in sources}
    hooks = [
        model.get_submodule(source).register_forward_pre_hook(
            lambda _, inputs, source=source: seen[source].append(inputs[0].flatten(0, -2))
        )
        for source in sources
    ]
    paint(model, some_scenes(32, seed=5), seed=6, times=flow.schedule(12, shift=-0.5))
    for hook in hooks:
        hook.remove()
    rows = {source: torch.cat(inputs) for source, inputs in seen.items()}
    generator = torch.Generator().manual_seed(0)
    return {
        source: x[torch.randperm(len(x), generator=generator)[:tokens]] for source, x in sorted(rows.items())
    }


def cut(model: flux.Flux, stored: checkpoint.Stored) -> tuple[Tensor, Tensor]:
    """The rectangle of the source's weight [N, K] and its bias [N], zeros if the bias goes elsewhere."""
    source = model.get_submodule(stored.source)
    rows, columns = slice(*stored.rows), slice(*stored.columns)
    w, bias = source.weight[rows, columns].contiguous(), source.bias[rows]
    return w, bias if stored.has_bias else torch.zeros_like(bias)


def quantize(model: flux.Flux, rank: int, tokens: int) -> dict[str, LinearWeights]:
    """Every block linear of the model in four bits; linears with the same input share their smoothing."""
    linears = checkpoint.stored_linears(model.config)
    inputs = record_inputs(model, {s.source for s in linears if not s.chunks}, tokens=tokens)
    made = {}
    for (source, columns), group in groupby(linears, key=lambda stored: (stored.source, stored.columns)):
        members = list(group)
        cuts = [cut(model, stored) for stored in members]
        if members[0].chunks:
            done = [round_weights(*cuts[0], members[0].chunks)]
        else:
            x = inputs[source][:, slice(*columns)]
            done = solve.search(cuts, x, rank=rank, unsigned=members[0].unsigned)
        made |= {stored.name: weights for stored, weights in zip(members, done, strict=True)}
        print(f"  {', '.join(stored.name for stored in members)}", flush=True)
    return made


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture [B, 3, H, W] in -1..1, [B]."""
    return 10 * torch.log10(4 / (images - reference).square().mean((1, 2, 3)))


def compare(model: flux.Flux, small: flux.Flux) -> float:
    """Mean PSNR of 64 drawings by the 4-bit model against the 16-bit ones, in dB."""
    vae = load_vae()
    captions = some_scenes(64, seed=77)
    exact, near = (
        vae.to_patches(paint(m, captions, seed=99, times=flow.schedule(20))).clamp(-1, 1)
        for m in (model, small)
    )
    return psnr(near, exact).mean().item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--rank", type=int, default=16, help="a multiple of 16")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration rows a linear")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    model = flux.load(SOURCE)
    with torch.no_grad():
        layers = quantize(model, args.rank, args.tokens)
    path = files.place(args.out, files.INT4)
    plain = checkpoint.plain_tensors(load_file(SOURCE), model.config)
    nunchaku.write(path, layers, plain, checkpoint.metadata(model.config))
    quality = compare(model, fourbit.load(path, model))
    print(f"{path}: {path.stat().st_size} bytes; PSNR {quality:.2f} dB over 64 drawings, 20 steps, cfg 2")


if __name__ == "__main__":
    main()
