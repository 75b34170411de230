"""Put a LoRA file on a model, through the host's own patches, and say what it did."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.lora
import comfy.utils
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ....loaders import lora_nunchaku
from ....loaders.lora import read_lora
from ....loaders.lora_belongs import check_belongs
from ....loaders.lora_names import Renamed, rename
from ..operations import QuantizedLinear
from . import factors, joining, nunchaku, rescaling
from . import patches as patching
from .layer_names import known_names

log = logging.getLogger("svdquant-nodes")

_WIDENED = ("img_in.weight", "x_embedder.weight")  # FLUX tools LoRAs give the input more channels

Patches = dict  # the host's: key or (key, offset[, function]) -> adapter or ("diff", (tensor,))


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA file turned into.

    name       the file
    strength   as given
    kinds      its adapters, the commonest first
    naming     how the file calls its layers
    layers     it patches
    tensors    of the file that belong to them
    unmatched  its tensors that belong to no layer of this model
    for_clip   how many of its tensors are for a text encoder, and so for a CLIP
    rank       added to quantized layers, summed
    nbytes     of the branches on quantized layers
    products   quantized layers that carry a Kronecker product
    dense      quantized layers that carry a whole difference, because the adapter is not low-rank
    error      largest relative error of a truncated layer, 0 where every branch is exact
    """

    name: str
    strength: float
    kinds: tuple[str, ...]
    naming: str
    layers: int
    tensors: int
    unmatched: tuple[str, ...]
    for_clip: int
    rank: int
    nbytes: int
    products: int
    dense: int
    error: float

    def __str__(self) -> str:
        text = f"{self.name} at {self.strength:g}: {' and '.join(self.kinds)}, {self.naming} naming"
        text += f"; {self.layers} layers of {self.tensors} tensors, rank {self.rank} in all"
        text += f", {self.nbytes / 2**20:.1f} MB"
        if self.products:
            text += f"; {self.products} layers carry a Kronecker product"
        if self.dense:
            text += f"; {self.dense} layers carry a whole difference, the adapter is not low-rank"
        text += f"; largest relative error {self.error:.1e}" if self.error else "; exact"
        if self.unmatched:
            more = f" and {len(self.unmatched) - 10} more" if len(self.unmatched) > 10 else ""
            text += f"; not of this model: {', '.join(self.unmatched[:10])}{more}"
        if self.for_clip:
            text += (
                f"; {self.for_clip} tensors are for the text encoder: ComfyUI's Load LoRA puts them on a CLIP"
            )
        return text


def apply_lora(model, path: Path, strength: float):
    """A clone of `model` with a LoRA joined; nothing is requantized, and the original is untouched.

    model     MODEL, quantized or not
    returns   (clone, LoraReport)

    Raises ValueError, before anything is joined, where the file is no LoRA, is incomplete, matches no layer of the
    model, or fits it in some layers and not in others.
    """
    tensors = read_lora(path)
    patches, renamed = make_patches(model, path, tensors)
    check(model.model, path, patches)
    clone = model.clone()
    joined = clone.add_patches(patches, strength)
    matched = len(tensors) - len(renamed.unmatched) - len(renamed.text_encoder)
    report = LoraReport(
        path.name,
        strength,
        naming=renamed.naming,
        tensors=matched,
        unmatched=renamed.unmatched,
        for_clip=len(renamed.text_encoder),
        **_costs(model, {key: patches[key] for key in joined}),
    )
    log.info("LoRA: %s", report)
    return clone, report


def make_patches(model, path: Path, tensors: Mapping[str, Tensor]) -> tuple[Patches, Renamed]:
    """A LoRA file's tensors as the host's patches for this model, and how its names were read."""
    key_map = known_names(model.model)
    ready: Patches = {}
    if lora_nunchaku.detect(tensors):
        ready, tensors = nunchaku.make_patches(model, path, tensors)
    renamed = rename(path, tensors, key_map)
    if ready:
        renamed = replace(renamed, naming="Nunchaku")
    flat = renamed.flat()
    for module, members in renamed.modules.items():
        if (
            isinstance(key_map[module], tuple) and "diff_b" in members
        ):  # the host has no patches of a part of a bias
            weight, *where = key_map[module]
            ready[(f"{weight.removesuffix('.weight')}.bias", *where)] = ("diff", (members["diff_b"],))
            del flat[f"{module}.diff_b"]
    patches = comfy.lora.load_lora(flat, key_map, log_missing=False) | ready
    state = model.model.state_dict().keys()
    patches = {key: value for key, value in patches.items() if _weight_of(key) in state}
    check_belongs(path, tensors, renamed, key_map, matched=any(map(_changes, patches.values())))
    return patches, renamed


def _weight_of(key) -> str:
    return key if isinstance(key, str) else key[0]


def _changes(value) -> bool:
    """A whole model also has norm weights; they alone make no LoRA."""
    return not (isinstance(value, tuple) and value[0] == "set")


def check(model, path: Path, patches: Patches) -> None:
    """Raise a ValueError that names the first layer whose shape a patch does not have; widen what may be widened."""
    for key, value in patches.items():
        name, *rest = (key,) if isinstance(key, str) else key
        weight = comfy.utils.get_attr(model, name)
        shape = tuple(weight.shape)
        rows, columns = patching.region(rest[0] if rest else None, (*shape, 1)[:2])
        members = patching.members_of(value) or {}
        expected = (rows.stop - rows.start, columns.stop - columns.start) if len(shape) > 1 else shape
        if len(shape) > 2:
            expected = (expected[0], weight[0].numel())
        if name.endswith(_WIDENED) and _widen(value, expected):
            continue
        why = _vector_misfit(value, expected, rows) if len(shape) == 1 else patching.misfit(value, expected)
        why = why or _misfit_of_others(members, expected)
        if why:
            raise ValueError(
                f"{path.name}: {name}: {why}. The LoRA was made for another model; choose one made for this one."
            )


def _vector_misfit(value, expected: tuple[int, ...], rows: slice) -> str:
    wanted, found = rows.stop - rows.start, value[-1][0].numel() if isinstance(value, tuple) else None
    return "" if found == wanted else f"expected [{wanted}], got {found} numbers"


def _misfit_of_others(members: Mapping[str, Tensor], expected: tuple[int, int]) -> str:
    """For the adapters whose tensors do not say the size of what they change."""
    if "oft_blocks" in members:
        return rescaling.misfit(members["oft_blocks"], expected[0])
    if "a1.weight" in members:
        b1, b2 = (list(members[name].flatten(1).shape) for name in ("b1.weight", "b2.weight"))
        fits = factors.glora_factors(members, expected) is not None
        return "" if fits else f"expected GLoRA factors of {list(expected)}, got {b1} and {b2}"
    scale = members.get("dora_scale")
    if scale is not None and scale.numel() not in expected:
        return f"expected {expected[0]} or {expected[1]} DoRA magnitudes, got {scale.numel()}"
    return ""


def _widen(value, expected: tuple[int, int]) -> bool:
    """Let a LoRA give the input layer more columns, as the host does for files in BFL's own naming."""
    if not isinstance(value, LoRAAdapter):
        return False
    up, down, alpha, middle, dora, reshape = value.weights
    wider = up.shape[0] == expected[0] and down.flatten(1).shape[1] > expected[1]
    if wider and reshape is None:
        value.weights = (up, down, alpha, middle, dora, [up.shape[0], down.flatten(1).shape[1]])
    return wider


def _costs(model, patches: Patches) -> dict[str, object]:
    """The fields of a report that the patches tell."""
    found = []
    for key, value in patches.items():
        layer = comfy.utils.get_attr(model.model, _weight_of(key).rpartition(".")[0])
        is_ours = isinstance(layer, QuantizedLinear) and layer.quantized
        if is_ours and _weight_of(key).endswith(".weight"):
            patch = (1.0, value, 1.0, None, None)
            found.append((patching.kind_of(value), joining.cost(layer, patch, model.load_device)))
    costs = [cost for _, cost in found]
    return {
        "kinds": tuple(kind for kind, _ in Counter(map(patching.kind_of, patches.values())).most_common()),
        "layers": len(patches),
        "rank": sum(cost.rank for cost in costs),
        "nbytes": sum(cost.nbytes for cost in costs),
        "products": sum(kind == "LoKr" and not cost.dense for kind, cost in found),
        "dense": sum(cost.dense for cost in costs),
        "error": max((cost.error for cost in costs), default=0.0),
    }
