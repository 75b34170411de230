"""Watch what every linear of a 16-bit model reads while the host samples it.

A wrapper around the model's call puts pre-hooks on the linears and takes them off again, whatever happens in between:
nothing of the model is replaced, and a clone without the wrapper is the model as it was.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..operations import quantized_linears
from .plans import pays

log = logging.getLogger("svdquant-nodes")

KEY = "svdquant_calibration"
See = Callable[[str, Tensor], None]


def watched(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linears that a quantizer may want, by their path in the diffusion model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and pays(name, tuple(module.weight.shape), "nvfp4")
    }


@contextlib.contextmanager
def watching(model: torch.nn.Module, see: See) -> Iterator[None]:
    """Call see(name, input) whenever a linear of the diffusion model is called."""

    def hook_for(name: str):
        def hook(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            see(name, given[0])

        return hook

    hooks = [m.register_forward_pre_hook(hook_for(name)) for name, m in watched(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def recording(patcher, see: See):
    """A clone of a host MODEL that shows `see` what its linears read, however it is sampled.

    Raises ValueError for a model that is in 4 bits already, or has no linear worth it.
    """
    diffusion_model = patcher.model.diffusion_model
    if next(quantized_linears(patcher.model), None):
        raise ValueError(
            "calibration: expected a 16-bit model, got one in 4 bits. Connect its 16-bit original."
        )
    found = watched(diffusion_model)
    if not found:
        raise ValueError(
            "calibration: expected a model with large linears in blocks, got none. Nothing to quantize."
        )

    def wrapper(executor, *args, **kwargs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        with watching(executor.class_obj.diffusion_model, see):
            return executor(*args, **kwargs)

    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    return clone


def memory(patcher, tokens: int) -> int:
    """Bytes that statistics of so many rows an input can grow to: rows, and a quarter more held out."""
    widths = [module.weight.shape[1] for module in watched(patcher.model.diffusion_model).values()]
    return sum(widths) * (tokens + max(tokens // 4, 1)) * 2
