# ruff: noqa: E402  the host is set up and the pack named before either is imported

"""Apply, change the strength of, and remove a LoRA on the linears of FLUX.1-dev: 4-bit layers against 16-bit ones.

    OMP_NUM_THREADS=1 python benchmarks/lora.py --tree COMFYUI [--ranks 16,128] [--rounds 5] [--json FILE]

All through the host: its own patcher, its loading, its merging. 304 linears of the true sizes carry a LoRA on every
one. A 4-bit layer's codes are left out: nothing here reads them, which is the point. Of the 16-bit model one layer of
each of its eight sizes is patched by the host and the time multiplied by 38, for each size occurs 38 times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CALLED = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
CALLED.add_argument("--tree", required=True, type=Path, help="a ComfyUI tree")
CALLED.add_argument("--ranks", default="16,128")
CALLED.add_argument("--rounds", type=int, default=5)
CALLED.add_argument("--json", type=Path)
ARGUMENTS = CALLED.parse_args()

sys.path.insert(0, str(ROOT / "tools"))
import pack

pack.alias()
from svdquant_nodes.tools.host.launch import DeclareOperators

sys.path[0] = str(ARGUMENTS.tree)
sys.meta_path.insert(0, DeclareOperators())
sys.argv = ["main.py", "--cpu"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.lora
import comfy.model_patcher
import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor

from svdquant_nodes.svdquant.adapters import layout
from svdquant_nodes.svdquant.adapters.lora import branches, joining
from svdquant_nodes.svdquant.adapters.operations import make_operations, quantized_linears
from svdquant_nodes.svdquant.core import reference

CPU = torch.device("cpu")
H = 3072
DOUBLE = {
    "attn.qkv": (3 * H, H),
    "attn.proj": (H, H),
    "mlp.0": (4 * H, H),
    "mlp.2": (H, 4 * H),
    "mod.lin": (6 * H, H),
}
SINGLE = {"linear1": (7 * H, H), "linear2": (H, 5 * H), "modulation.lin": (3 * H, H)}
EACH = 38  # 19 double blocks of two streams, 38 single blocks


def all_linears() -> dict[str, tuple[int, int]]:
    """The 304 linears of FLUX.1-dev's blocks by their names in ComfyUI."""
    names = {
        f"double_blocks.{i}.{s}_{n}": size
        for i in range(19)
        for s in ("img", "txt")
        for n, size in DOUBLE.items()
    }
    return names | {f"single_blocks.{i}.{n}": size for i in range(38) for n, size in SINGLE.items()}


def one_of_each() -> dict[str, tuple[int, int]]:
    return {
        name: size for name, size in all_linears().items() if ".0.img_" in name or "single_blocks.0." in name
    }


class Tree(torch.nn.Module):
    """Modules under dotted names, as the host's patcher walks them."""

    def place(self, name: str, layer: torch.nn.Module) -> None:
        *path, last = name.split(".")
        here = self
        for part in path:
            if part not in here._modules:
                here.add_module(part, torch.nn.Module())
            here = here._modules[part]
        here.add_module(last, layer)


def quantized_model():
    """All 304 linears as 4-bit layers, without their codes."""
    layout.register()
    linear = make_operations(reference).Linear
    tree = Tree()
    for name, (n, k) in all_linears().items():
        layer = linear(k, n, bias=False)
        empty = QuantizedTensor(
            torch.zeros(256, dtype=torch.uint8), layout.NAME, layout.Params(torch.bfloat16, (n, k), ())
        )
        layer.weight = torch.nn.Parameter(empty, requires_grad=False)
        tree.place(f"diffusion_model.{name}", layer)
    patcher = comfy.model_patcher.ModelPatcher(tree, CPU, CPU)
    branches.attach(patcher)
    return patcher


def dense_sample():
    """One 16-bit layer of each size, the host's own."""
    tree = Tree()
    for name, (n, k) in one_of_each().items():
        layer = comfy.ops.manual_cast.Linear(k, n, bias=False, dtype=torch.bfloat16)
        layer.weight = torch.nn.Parameter(torch.full((n, k), 0.01, dtype=torch.bfloat16), requires_grad=False)
        tree.place(f"diffusion_model.{name}", layer)
    return comfy.model_patcher.ModelPatcher(tree, CPU, CPU)


def make_lora(rank: int, linears: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (n, k) in linears.items():
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.full((n, rank), 1e-3, dtype=torch.bfloat16)
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.full(
            (rank, k), 1e-3, dtype=torch.bfloat16
        )
    return tensors


def joined(base, tensors: dict[str, torch.Tensor], strength: float):
    """What a LoRA loader node does, tensors in memory."""
    key_map = {f"diffusion_model.{n}": f"diffusion_model.{n}.weight" for n in all_linears()}
    clone = base.clone()
    clone.add_patches(comfy.lora.load_lora(tensors, key_map, log_missing=False), strength)
    return clone


def milliseconds(call: Callable[[], object]) -> float:
    """Of the process itself: other work on the machine does not count."""
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def time_steps(base, tensors: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Medians of: nothing to LoRA, its strength changed, LoRA to nothing. Each from the node to the loaded model."""
    seen: dict[str, list[float]] = {"apply": [], "strength": [], "remove": []}
    for turn in range(rounds + 1):  # the first is a warm-up
        found = {
            "apply": milliseconds(lambda: swap(base, joined(base, tensors, 1.0))),
            "strength": milliseconds(lambda: swap(base, joined(base, tensors, 0.5))),
            "remove": milliseconds(lambda: swap(base, base)),
        }
        for name, ms in found.items() if turn else ():
            seen[name].append(ms)
    return {name: statistics.median(times) for name, times in seen.items()}


def time_parts(patcher, rounds: int) -> dict[str, float]:
    """Medians of our part alone: every layer's branches joined, and taken up again as when a hook switches back."""
    joins, switches = [], []
    for _ in range(rounds):
        for _, layer in quantized_linears(patcher.model):
            joining.forget(layer)
        joins.append(milliseconds(lambda: branches.set_branches(patcher)))
        switches.append(milliseconds(lambda: branches.set_branches(patcher)))
    return {"join": statistics.median(joins), "switch": statistics.median(switches)}


def swap(base, new) -> None:
    """What the host's loader does between two clones of one model: put the weights back, patch for the other."""
    base.model.__dict__.setdefault("shown", base).unpatch_model(CPU, unpatch_weights=True)
    new.patch_model(CPU)
    base.model.shown = new


def branch_bytes(patcher) -> int:
    return sum(
        t.nbytes for _, layer in quantized_linears(patcher.model) for b in layer.branches for t in b.tensors
    )


def print_table(rows: list[dict]) -> None:
    print("rank  step      4-bit branches    16-bit merging (8 of 304 layers, x 38)")
    for row in rows:
        for step, ms in row["merging"].items():
            print(f"{row['rank']:4}  {step:8} {row['ours'][step]:11.1f} ms  {ms:14.0f} ms")
        print(
            f"      joining  {row['ours']['join']:11.1f} ms   (our part; the rest: the host walks its modules)"
        )
        print(f"      hook back{row['ours']['switch']:11.1f} ms")
        mb = [row[kind] / 2**20 for kind in ("branch_bytes", "backup_bytes")]
        print(f"      memory   {mb[0]:11.0f} MB  {mb[1]:14.0f} MB of backups")


def main() -> None:
    rows = []
    with torch.inference_mode():
        base, sample = quantized_model(), dense_sample()
        merged = sum(n * k * 2 for n, k in all_linears().values())
        for rank in map(int, ARGUMENTS.ranks.split(",")):
            lora = make_lora(rank, all_linears())
            ours = time_steps(base, lora, ARGUMENTS.rounds)
            swap(base, joined(base, lora, 1.0))
            nbytes = branch_bytes(base)
            ours |= time_parts(base.model.shown, ARGUMENTS.rounds)
            swap(base, base)
            few = {
                name: t
                for name, t in lora.items()
                if name.rpartition(".lora")[0].split("diffusion_model.")[1] in one_of_each()
            }
            theirs = {step: ms * EACH for step, ms in time_steps(sample, few, ARGUMENTS.rounds).items()}
            rows.append(
                {
                    "rank": rank,
                    "branch_bytes": nbytes,
                    "backup_bytes": merged,
                    "ours": ours,
                    "merging": theirs,
                }
            )
    print_table(rows)
    if ARGUMENTS.json:
        ARGUMENTS.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
