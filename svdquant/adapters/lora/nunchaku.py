"""LoRA files in the Nunchaku engine's layout, on the model whose branch they were made on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import comfy.utils
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ....loaders import lora_nunchaku
from ....loaders.lora_nunchaku import Pair
from ...core.linear import Part
from ..families import FAMILIES
from ..family import Role
from ..layout import unpack
from ..operations import QuantizedLinear

Key = str | tuple


def make_patches(
    patcher, path: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[Key, LoRAAdapter], dict[str, Tensor]]:
    """The LoRA part of every stored pair as the host's patches, and the tensors that are named as in other files.

    Raises ValueError where the model is not 4-bit, or is not the one the file was made on.
    """
    source = patcher.attachments.get("svdquant")
    if source is None:
        raise ValueError(
            f"{path.name}: a LoRA in Nunchaku layout holds the branch of a 4-bit model and works on that model only, "
            "got a 16-bit one. Use the original LoRA file."
        )
    try:
        stored, rest = lora_nunchaku.group(tensors)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error} Convert the LoRA again, or use the original file.") from None
    patches: dict[Key, LoRAAdapter] = {}
    for name, pair in stored.items():
        places = list(_places(patcher.model, source.family, name))
        if not places:
            raise ValueError(
                f"{path.name}: {name}: this {source.family} model stores no such layer. Use the original LoRA file."
            )
        for host, layer, part, role in places:
            found = _extract(pair, part, role)
            if found is None:
                raise ValueError(
                    f"{path.name}: {name}: the file holds the branch of another 4-bit checkpoint than "
                    f"{source.path.name}, so its LoRA cannot be told apart from it. Use the original LoRA file, or "
                    "the checkpoint it was converted for."
                )
            down, up = found
            if len(down):
                patches[_key(host, layer, part)] = LoRAAdapter(set(), (up, down, None, None, None, None))
    return patches, {_as_difference(name): tensor for name, tensor in rest.items()}


def _places(model, family_name: str, stored: str) -> Iterator[tuple[str, QuantizedLinear, Part, Role]]:
    """Where a stored linear lies: the host's module path, the layer, the part of it, the role."""
    family = next((f for f in FAMILIES if f.name == family_name), None)
    for layer in family.layers if family else ():
        for option in layer.options:
            for piece, one in enumerate(option):
                match = re.fullmatch(re.escape(one.name).replace(r"\{\}", r"(\d+)"), stored)
                path = match and f"diffusion_model.{layer.host.format(*match.groups())}"
                host = _quantized(model, path) if path else None
                parts = unpack(host.weight._qdata, host.weight._params) if host is not None else ()
                if len(parts) == len(option):
                    yield path, host, parts[piece], one.role


def _quantized(model, path: str) -> QuantizedLinear | None:
    try:
        layer = comfy.utils.get_attr(model, path)
    except (AttributeError, IndexError):
        return None
    return layer if isinstance(layer, QuantizedLinear) and layer.quantized else None


def _extract(pair: Pair, part: Part, role: Role) -> Pair | None:
    weights = part.weights
    if weights.down is not None:
        first = role.share[0] * weights.out_features if role.share else 0
        return lora_nunchaku.extract(pair, (weights.down.cpu(), weights.up.cpu()), first)
    down, up = pair
    fits = role.splits and up.shape[0] == weights.out_features and down.shape[1] == weights.in_features
    return lora_nunchaku.plain(pair, role.splits) if fits and down.shape[0] == up.shape[1] else None


def _key(path: str, layer: QuantizedLinear, part: Part) -> Key:
    """The host's form of a patch on a part: parts lie below each other or beside each other."""
    if part.weights.out_features < layer.out_features:
        return f"{path}.weight", (0, part.row, part.weights.out_features)
    if part.weights.in_features < layer.in_features:
        return f"{path}.weight", (1, part.column, part.weights.in_features)
    return f"{path}.weight"


def _as_difference(name: str) -> str:
    """Biases in these files are differences under the plain name."""
    return f"{name.removesuffix('.bias')}.diff_b" if name.endswith(".bias") else name
