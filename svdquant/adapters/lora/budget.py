"""The host's plan of which layers fit into VRAM counts the branches with their layers.

The host measures a layer by its state dict, and branches are in none. Two of its patcher's methods are shadowed, as in
patcher.py: the size of the model, and the list of its modules with what each of them takes.
"""

from __future__ import annotations

import weakref

from ..operations import QuantizedLinear, quantized_linears
from . import joining


def count_branches(patcher) -> None:
    """Let the host count a patcher's branches when it loads and unloads layers."""
    this, known = weakref.ref(patcher), {}

    def sizes() -> dict[str, int]:
        host = this()
        if host.patches_uuid not in known:
            known.clear()
            known[host.patches_uuid] = branch_sizes(host)
        return known[host.patches_uuid]

    def model_size() -> int:
        host = this()
        return type(host).model_size(host) + sum(sizes().values())

    def _load_list(*args, **kwargs) -> list[tuple]:
        host = this()
        for_dynamic = kwargs.get("for_dynamic", args[0] if args else False)
        entries = type(host)._load_list(host, *args, **kwargs)
        return entries if for_dynamic else [counted(entry, sizes()) for entry in entries]

    patcher.model_size = model_size
    patcher._load_list = _load_list


def branch_sizes(patcher) -> dict[str, int]:
    """Module name -> bytes of the branches that the patcher's patches become there."""
    return {
        key.removesuffix(".weight"): joining.planned(layer, patcher.patches[key])
        for key, layer in quantized_linears(patcher.model)
        if key in patcher.patches
    }


def counted(entry: tuple, sizes: dict[str, int]) -> tuple:
    """One entry of the host's list with its branches: (bytes while streamed, bytes, name, module, parameters).

    An entry of another form, as a later host may have, is left alone: a plan that is a little off is still a plan.
    """
    if len(entry) != 5:
        return entry
    streamed, nbytes, name, module, params = entry
    more = sizes.get(name, 0) if isinstance(module, QuantizedLinear) else 0
    return streamed + more, nbytes + more, name, module, params
