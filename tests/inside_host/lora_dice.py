"""Random LoRA files for the demo model: any naming, adapter, rank, alpha, with members missing or wrong.

What a file should do is worked out here, apart from the code: the differences it makes to layers, in float64, or that
it must be refused.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from svdquant_nodes.tests import lora_oracle

H = 256
# host layer -> its shape; and what diffusers calls (parts of) it -> host layer, first row, rows, columns
HOST = {
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.0.txt_mlp.2": (H, 4 * H),
    "double_blocks.0.img_mod.lin": (6 * H, H),
    "single_blocks.0.linear1": (7 * H, H),
    "single_blocks.1.linear2": (H, 5 * H),
}
DIFFUSERS = {
    **{
        f"transformer_blocks.0.attn.to_{x}": ("double_blocks.0.img_attn.qkv", i * H, H, H)
        for i, x in enumerate("qkv")
    },
    "transformer_blocks.0.ff_context.net.2": ("double_blocks.0.txt_mlp.2", 0, H, 4 * H),
    "transformer_blocks.0.norm1.linear": ("double_blocks.0.img_mod.lin", 0, 6 * H, H),
    "single_transformer_blocks.0.attn.to_v": ("single_blocks.0.linear1", 2 * H, H, H),
    "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", 3 * H, 4 * H, H),
    "single_transformer_blocks.1.proj_out": ("single_blocks.1.linear2", 0, H, 5 * H),
}
WHOLE = {name: (name, 0, *shape) for name, shape in HOST.items()}
NAMINGS = {  # how a module is spelled, and whether diffusers' modules are meant
    "comfy": (lambda m: f"diffusion_model.{m}", False),
    "bfl": (lambda m: m, False),
    "kohya": (lambda m: f"lora_unet_{m.replace('.', '_')}", False),
    "diffusers": (lambda m: f"transformer.{m}", True),
    "peft": (lambda m: f"base_model.model.{m}", True),
    "kohya-diffusers": (lambda m: f"lora_unet_{m.replace('.', '_')}", True),
    "onetrainer": (lambda m: f"lora_transformer_{m.replace('.', '_')}", True),
    "lycoris": (lambda m: f"lycoris_{m.replace('.', '_')}", True),
}
PAIRS = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora_B.default.weight", "lora_A.default.weight"),
    ("lora.up.weight", "lora.down.weight"),
)
RANKS = [1, 2, 4, 8, 16]
KINDS = ["lora", "lora", "lora", "mid", "dora", "loha", "tucker", "lokr", "glora", "oft", "boft", "diff"]
ALPHAS = [1.0, 8.0, 0.5]
SPOILINGS = ["missing", "shape", "nan", "depth", "integers"]
OPTIONAL = {
    "alpha",
    "dora_scale",
    "lora_mid.weight",
}  # a file without it means something else, and nothing wrong


@dataclass
class Throw:
    """One random file.

    tensors      as the file has them
    differences  host layer -> what it adds to the weight, given the weight; in float64
    fault        why it must be refused, empty where it must not
    """

    strength: float
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: list[tuple[str, int, dict[str, Tensor]]] = field(default_factory=list)
    fault: str = ""

    def differences(self, weight_of) -> dict[str, np.ndarray]:
        """What the file adds to each layer it names, in float64; `weight_of(host layer)` is the weight."""
        sums: dict[str, np.ndarray] = {}
        for host, first, members in self.layers:
            weight = weight_of(host)
            rows = slice(first, first + _height(members, weight))
            total = sums.setdefault(host, np.zeros_like(weight))
            total[rows] += lora_oracle.difference(members, weight[rows], self.strength)
        return sums


def _height(members: dict[str, Tensor], weight: np.ndarray) -> int:
    if "oft_blocks" in members:
        return members["oft_blocks"].shape[-3] * members["oft_blocks"].shape[-1]
    if "a1.weight" in members:
        return members["b1.weight"].shape[0]
    return lora_oracle.low_rank({n: t for n, t in members.items() if n != "dora_scale"}).shape[0]


class Dice:
    """Throws that depend on the seed alone."""

    def __init__(self, seed: int) -> None:
        self.random, self.thrown = random.Random(seed), []
        self.generator = torch.Generator().manual_seed(seed)

    def throw(self) -> Throw:
        spell, by_diffusers = NAMINGS[self.note(self.random.choice(list(NAMINGS)))]
        places = DIFFUSERS if by_diffusers else WHOLE
        made = Throw(self.random.choice([1.0, 0.5, -0.8, 2.0]))
        names = self.random.sample(list(places), self.random.randint(1, 3))
        tails = self.random.choice(PAIRS)
        for name in names:
            host, first, n, k = places[name]
            members = self.adapter(n, k)
            made.layers.append((host, first, members))
            spelled = dict(zip(("lora_up.weight", "lora_down.weight"), tails, strict=True))
            made.tensors |= {f"{spell(name)}.{spelled.get(t, t)}": x for t, x in members.items()}
        if self.random.random() < 0.3:
            made.tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = self.numbers(4, 2)
        if self.random.random() < 0.4:
            self.spoil(made, spell(names[0]))
        return made

    def note(self, choice):
        """What was thrown, for a test that asks whether everything was."""
        self.thrown.append(choice)
        return choice

    def numbers(self, *shape: int, by: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * by).to(dtype)

    def adapter(self, n: int, k: int) -> dict[str, Tensor]:
        """The members of a random adapter for an n x k weight."""
        rank = self.note(self.random.choice(RANKS))
        kind = self.note(self.random.choice(KINDS))
        members = getattr(self, f"_{kind}")(n, k, rank)
        if kind not in ("diff", "oft", "boft") and self.random.random() < 0.5:
            members["alpha"] = torch.tensor(self.note(self.random.choice(ALPHAS)))
        return members

    def _lora(self, n: int, k: int, rank: int) -> dict[str, Tensor]:
        dtype = self.random.choice([torch.float32, torch.bfloat16, torch.float16])
        return {
            "lora_up.weight": self.numbers(n, rank, dtype=dtype),
            "lora_down.weight": self.numbers(rank, k, by=k**-0.5, dtype=dtype),
        }

    def _mid(self, n: int, k: int, rank: int) -> dict[str, Tensor]:
        return self._lora(n, k, rank) | {"lora_mid.weight": self.numbers(rank, rank, 1, 1)}

    def _dora(self, n: int, k: int, rank: int) -> dict[str, Tensor]:
        return self._lora(n, k, rank) | {"dora_scale": self.numbers(n, 1).abs()}

    def _loha(self, n: int, k: int, rank: int) -> dict[str, Tensor]:
        rank = min(rank, 4)
        ups = {f"hada_w{i}_a": self.numbers(n, rank) for i in (1, 2)}
        return ups | {f"hada_w{i}_b": self.numbers(rank, k, by=k**-0.25) for i in (1, 2)}

    def _tucker(self, n: int, k: int, rank: int) -> dict[str, Tensor]:
        rank, members = min(rank, 4), {}
        for i in (1, 2):
            members |= {f"hada_w{i}_a": self.numbers(rank, n), f"hada_t{i}": self.numbers(rank, rank, 1, 1)}
            members[f"hada_w{i}_b"] = self.numbers(rank, k, by=k**-0.25)
        return members

    def _lokr(self, n: int, k: int, rank: int) -> dict[str, Tensor]:
        a, b = self.random.choice([1, 2, 4, 16]), self.random.choice([1, 2, 4, 16])
        members = {}
        for i, (rows, columns) in enumerate(((a, b), (n // a, k // b)), 1):
            if self.random.random() < 0.5:
                members[f"lokr_w{i}"] = self.numbers(rows, columns)
            else:
                members |= {
                    f"lokr_w{i}_a": self.numbers(rows, rank),
                    f"lokr_w{i}_b": self.numbers(rank, columns),
                }
        return members

    def _glora(self, n: int, k: int, rank: int) -> dict[str, Tensor]:
        sizes = {"a1": (k, rank), "a2": (rank, k), "b1": (n, rank), "b2": (rank, k)}
        return {f"{name}.weight": self.numbers(*size, by=0.1) for name, size in sizes.items()}

    def _oft(self, n: int, k: int, rank: int) -> dict[str, Tensor]:
        size = self.random.choice([8, 16, 32])
        return {"oft_blocks": self.numbers(n // size, size, size, by=0.1), "alpha": torch.tensor(0.0)}

    def _boft(self, n: int, k: int, rank: int) -> dict[str, Tensor]:
        size, stages = self.random.choice([8, 16, 32]), self.random.choice([1, 2, 3])
        blocks = self.numbers(stages, n // size, size, size, by=0.1)
        return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}

    def _diff(self, n: int, k: int, rank: int) -> dict[str, Tensor]:
        return {"diff": self.numbers(n, rank) @ self.numbers(rank, k)}

    def spoil(self, made: Throw, module: str) -> None:
        """Do one thing to the first layer that a reader has to notice, or has to take as it is."""
        names = [n for n in made.tensors if n.startswith(module + ".")]
        name = self.random.choice(names)
        tail = name.removeprefix(module + ".")
        spoiling = self.note(self.random.choice(SPOILINGS))
        if spoiling == "missing":
            self._lose(made, module, name, tail)
        elif spoiling == "shape" and tail != "alpha":
            axis = (
                1 if made.tensors[name].ndim == 4 and tail == "oft_blocks" else 0
            )  # more stages are no fault
            made.tensors[name] = torch.cat([made.tensors[name]] * 3, axis)
            made.fault = "shape"
        elif spoiling == "nan":
            made.tensors[name] = torch.full_like(made.tensors[name], float("nan"))
            made.fault = "nan"
        elif spoiling == "depth":
            deeper = name.replace("blocks.0.", "blocks.7.").replace("blocks_0_", "blocks_7_")
            if deeper != name:
                made.tensors |= {f"{deeper}": made.tensors[name]}
                made.fault = "depth"
        elif spoiling == "integers" and made.tensors[name].numel() > 2:
            made.tensors[name] = made.tensors[name].to(torch.int8)
            made.fault = "integers"

    @staticmethod
    def _lose(made: Throw, module: str, name: str, tail: str) -> None:
        del made.tensors[name]
        host, first, members = made.layers[0]
        left = {t: x for t, x in members.items() if t != tail}
        only_one_adapter = not any(t not in ("alpha", "dora_scale") for t in left)
        if tail in OPTIONAL or tail == "alpha":
            made.layers[0] = (host, first, left)
        elif only_one_adapter:  # nothing is left of this layer
            made.layers.pop(0)
            made.fault = "" if made.layers else "nothing"
        else:
            made.fault = "member"
