"""The `operations` namespace one load hands to the host's model class: the host's own layers, and our Linear.

A fresh class is made for every load, so that no two models share state. A Linear becomes quantized when its state
dict entry is a quantized tensor; otherwise it stays the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import comfy.float
import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..core import linear as core
from ..core.linear import Branch, Layer
from ..core.sharing import Slot
from .dense_bias import Functions, OfDense
from .layout import dense, parts_of, shift_compensation, unpack, with_branches
from .lora.residence import Residence


def make_operations(ops: ModuleType) -> type:
    """A namespace like `comfy.ops.manual_cast` whose Linear computes with the op set `ops`."""

    class Operations(comfy.ops.manual_cast):
        class Linear(QuantizedLinear):
            op_set = ops
            slot = Slot()

    return Operations


class QuantizedLinear(comfy.ops.manual_cast.Linear):
    """The host's Linear that can also hold an SVDQuant weight and LoRA branches.

    Everything a quantized weight needs is in `.weight`; `.bias` is the stored bias. LoRA arrives as branches, set by
    `lora/branches.py` and kept where the weight is, so the host's own weight functions, which would merge into a dense
    weight, are kept out: they are properties that read empty while the weight is quantized.
    """

    op_set: ModuleType
    slot: Slot  # one a model
    wrappers: tuple = ()  # functions of the dense weight that another node added on purpose
    # what computes it with other layers of its block, or returns None and leaves it to the layer; see single_block.py
    together: Callable[[QuantizedLinear, Tensor], Tensor | None] | None = None

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        # On meta: a 16-bit copy of a 12 B model must not be reserved only to be thrown away.
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = _meta((out_features, in_features), dtype)
        self.bias = _meta((out_features,), dtype) if bias else None
        self.residence = Residence()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The LoRA branches, on the weight's device."""
        return self.residence.beside

    @property
    def quantized(self) -> bool:
        return isinstance(self.weight, QuantizedTensor)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        for name in ("weight", "bias"):
            value, expected = state_dict.get(prefix + name), getattr(self, name)
            if value is None:
                if expected is not None:
                    missing.append(prefix + name)
                continue
            if expected is not None and value.shape != expected.shape:
                errors.append(f"{prefix}{name}: expected {list(expected.shape)}, got {list(value.shape)}")
                continue
            setattr(self, name, torch.nn.Parameter(value, requires_grad=False))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quantized and self.branches:
            destination[f"{prefix}weight"] = with_branches(destination[f"{prefix}weight"], self.branches)

    def _apply(self, fn, recurse=True):
        """Move or cast parameters by re-wrapping them: a quantized one cannot change its data in place."""
        for name, param in self._parameters.items():
            if param is not None and not param.is_meta:
                self._parameters[name] = torch.nn.Parameter(fn(param), requires_grad=False)
        self.residence.move(self.weight.device)
        return self

    @property
    def weight_function(self) -> list:
        return [] if self.quantized else self.__dict__.setdefault("_weight_function", [])

    @weight_function.setter
    def weight_function(self, functions: list) -> None:
        self.__dict__["_weight_function"] = functions

    @property
    def weight_lowvram_function(self):
        return None if self.quantized else self.__dict__.get("_weight_lowvram_function")

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, function) -> None:
        self.__dict__["_weight_lowvram_function"] = function

    @property
    def shifted(self) -> bool:
        """Whether the stored bias is another than the dense layer's."""
        return self.quantized and any(entry.spec.act_shift for entry in self.weight._params.entries)

    @property
    def bias_function(self) -> list:
        return self.__dict__.setdefault("_bias_function", [])

    @bias_function.setter
    def bias_function(self, functions: list) -> None:
        self.__dict__["_bias_function"] = Functions(self, functions) if self.shifted else functions

    @property
    def bias_lowvram_function(self):
        return self.__dict__.get("_bias_lowvram_function")

    @bias_lowvram_function.setter
    def bias_lowvram_function(self, function) -> None:
        wanted = function is not None and self.shifted
        self.__dict__["_bias_lowvram_function"] = OfDense(self, function) if wanted else function

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        if not self.quantized:
            return super().forward(x, *args, **kwargs)
        if self.together is not None and (y := self.together(self, x)) is not None:
            return y
        weight, bias, stream = self._cast(x.device)
        branches = self._branches_at(x.device)
        if self.wrappers or not isinstance(weight, QuantizedTensor):
            y = self._forward_dense(x, weight, bias, branches)
        else:
            y = core.forward(x, parts_of(weight, bias), None, branches, self.op_set, self.shared_slot())
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return y

    def shared_slot(self) -> Slot | None:
        """None where a hook may write into x between two layers that read it, of which nothing else would tell."""
        if self._forward_pre_hooks or self._forward_hooks:
            self.slot.forget()
            return None
        return self.slot

    def _cast(self, device: torch.device):
        """The weight and the bias on the device of a product, and what the host wants back afterwards."""
        comfy.ops.run_every_op()
        return comfy.ops.cast_bias_weight(
            self,
            dtype=self.weight.dtype,
            device=device,
            bias_dtype=None if self.bias is None else self.bias.dtype,
            offloadable=True,
        )

    def _branches_at(self, device: torch.device) -> tuple[Branch, ...]:
        return self.residence.at(device, image=getattr(self, "_v_signature", None) is not None)

    def alone(self, device: torch.device) -> bool:
        """Whether a product there takes the 4-bit weight from memory of its own, with nothing beside it but rank.

        A weight that is streamed for each step lies in a buffer that other layers use too.
        """
        rank = all(branch.is_pair for branch in self.branches)
        return self.quantized and not self.wrappers and rank and not self._streamed(device)

    def _streamed(self, device: torch.device) -> bool:
        if hasattr(self, "_v"):  # dynamic VRAM: the signature is that of an image in VRAM of its own
            return getattr(self, "_v_signature", None) is None
        return any(t is not None and t.device != device for t in (self.weight, self.bias))

    @contextmanager
    def lent(self, device: torch.device) -> Iterator[Layer | None]:
        """Parts and branches as a product there takes them, None where the host hands over a dense weight."""
        weight, bias, stream = self._cast(device)
        try:
            whole = isinstance(weight, QuantizedTensor)
            yield (parts_of(weight, bias), self._branches_at(device)) if whole else None
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    def _forward_dense(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, branches: tuple[Branch, ...]
    ) -> Tensor:
        """For weight functions of other nodes, and where the host hands over a dense weight."""
        if isinstance(weight, QuantizedTensor):
            weight, bias = dense(unpack(weight._qdata, weight._params), weight.shape, bias)
        elif bias is not None:
            bias = self.convert_bias(bias.float())
        weight = weight.to(x.dtype)
        for function in self.wrappers:
            weight = function(weight)
        flat = x.reshape(-1, x.shape[-1])
        y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype)).float()
        y = core.add_branches(y, flat, branches)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs) -> Tensor:
        """The dense weight, for nodes that merge or save."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(self, weight: Tensor, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Where the host puts a merged weight: a quantized layer keeps its own, its LoRA lives in `branches`."""
        if self.quantized:
            return self.weight if return_weight else None
        return self._put("weight", weight, inplace_update, seed, return_weight)

    def convert_bias(self, bias: Tensor, inplace: bool = False, **kwargs) -> Tensor:
        """The bias of the dense layer: files store it with the shift of unsigned activations taken out."""
        return bias + self.compensation(bias) if self.quantized else bias

    def set_bias(self, bias: Tensor, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """The inverse of `convert_bias`, where the host puts a patched bias."""
        if self.quantized:
            bias = bias - self.compensation(bias)
        return self._put("bias", bias, inplace_update, seed, return_weight)

    def _put(self, name: str, value: Tensor, inplace_update: bool, seed, return_weight: bool):
        param = getattr(self, name)
        value = comfy.float.stochastic_rounding(value, param.dtype, seed=seed)
        if return_weight:
            return value
        if inplace_update:
            param.data.copy_(value)
        else:
            setattr(self, name, torch.nn.Parameter(value, requires_grad=False))
        return None

    def compensation(self, bias: Tensor) -> Tensor:
        """What the dense layer's bias has more than the stored one, where and as precise as `bias` is."""
        parts = unpack(self.weight._qdata.to(bias.device), self.weight._params)
        return shift_compensation(parts, self.out_features).to(bias.dtype)


@contextmanager
def lent_together(
    first: QuantizedLinear, second: QuantizedLinear, device: torch.device
) -> Iterator[tuple[Layer, Layer] | None]:
    """Two layers for one product, None where one of them is not alone there."""
    layers = first, second
    if not all(layer.alone(device) for layer in layers):
        yield None
        return
    with first.lent(device) as one, second.lent(device) as two:
        # lending may have found that there is no room left
        there = one is not None and two is not None and all(layer.alone(device) for layer in layers)
        yield (one, two) if there else None


def _meta(shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, device="meta", dtype=dtype), requires_grad=False)


def quantized_linears(model: torch.nn.Module):
    """Every quantized layer of a host model with its state dict key: yields ("diffusion_model.….weight", module)."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.quantized:
            yield f"{name}.weight", module
