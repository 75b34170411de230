"""Each family's 16-bit tensors moved by hand to the names and layouts that its 4-bit files are published in.

Nothing of the pack that knows ComfyUI is imported: a running ComfyUI reads this file too, by tests/host/small_nodes.py.
"""

from __future__ import annotations

import re
from functools import partial

import comfy.utils
import torch
from torch import Tensor

from svdquant_nodes.svdquant.core.weights import INT4_UNSIGNED
from svdquant_nodes.tests.inside_host import published
from svdquant_nodes.tests.inside_host.published import (
    four_bit,
    four_bit_modulation,
    four_bit_plain,
    four_bit_unsigned,
)
from svdquant_nodes.tests.small_models import SDXL


class Publisher:
    """Moves a 16-bit model's linears, one after the other, into 4-bit layers of other names."""

    def __init__(self, tensors):
        self.plain, self.layers = dict(tensors), {}

    def take(self, *names):
        """Weights, and biases if there are any, of linears joined by rows."""
        weights = torch.cat([self.plain.pop(f"{name}.weight") for name in names])
        biases = [self.plain.pop(f"{name}.bias", None) for name in names]
        return weights, None if biases[0] is None else torch.cat(biases)

    def move(self, stored, *names, make=four_bit, args=()):
        self.layers[stored] = make(*self.take(*names), *args)

    def blocks(self, marker):
        """What comes before the marker in the names of all blocks."""
        return sorted({name.partition(marker)[0] for name in self.plain if marker in name})


def publish_sdxl(source):
    lists = {key: list(value) if isinstance(value, list) else value for key, value in SDXL.items()}
    names = {host: diffusers for diffusers, host in comfy.utils.unet_to_diffusers(lists).items()}
    ends = [(i, o, e) for i, o in ((1, 0), (2, 2)) for e in ("weight", "bias")]
    names |= {f"label_emb.0.{o}.{e}": f"add_embedding.linear_{i}.{e}" for i, o, e in ends}
    model = Publisher({names[name]: t for name, t in source.items()})
    for block in model.blocks(".attn1."):
        model.move(f"{block}.attn1.to_qkv", *(f"{block}.attn1.to_{x}" for x in "qkv"))
        for name in ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
            model.move(f"{block}.{name}", f"{block}.{name}")
    return model


QWEN_QKV = {"to_qkv": "to_q to_k to_v", "add_qkv_proj": "add_q_proj add_k_proj add_v_proj"}


def publish_qwen(source):
    model = Publisher(source)
    for block in model.blocks("img_mlp.net.0"):
        for fused, parts in QWEN_QKV.items():
            model.move(f"{block}attn.{fused}", *(f"{block}attn.{part}" for part in parts.split()))
        for name in ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.0.proj"):
            model.move(block + name, block + name)
        for stream in ("img", "txt"):
            fc2, modulation = f"{block}{stream}_mlp.net.2", f"{block}{stream}_mod.1"
            model.move(fc2, fc2, make=four_bit_unsigned)
            model.move(modulation, modulation, make=four_bit_modulation, args=(6,))
    return model


def publish_qwen_kitchen(source):
    """As ComfyUI's own modules run it: nothing fused, modulations in the model's order, unsigned where it says so."""
    model = Publisher(source)
    for block in model.blocks("img_mlp.net.0"):
        split = [f"attn.{part}" for parts in QWEN_QKV.values() for part in parts.split()]
        for name in (*split, "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.0.proj"):
            model.move(block + name, block + name)
        for stream in ("img", "txt"):
            fc2, modulation = f"{block}{stream}_mlp.net.2", f"{block}{stream}_mod.1"
            model.move(fc2, fc2, make=four_bit_unsigned, args=(INT4_UNSIGNED,))
            model.move(modulation, modulation, make=four_bit_plain)
    return model


def publish_z_image(source):
    """Layers quantized, refiners dense with q, k and v apart."""
    model = Publisher(source)
    for block in model.blocks("attention.qkv"):
        value_gate = f"{block}feed_forward.net.0.proj"
        if block.startswith("layers"):
            model.move(f"{block}attention.to_qkv", f"{block}attention.qkv")
            model.move(f"{block}attention.to_out.0", f"{block}attention.out")
            model.move(value_gate, f"{block}feed_forward.w3", f"{block}feed_forward.w1")
            model.move(f"{block}feed_forward.net.2", f"{block}feed_forward.w2")
        else:
            qkv = model.plain.pop(f"{block}attention.qkv.weight").chunk(3)
            model.plain |= {
                f"{block}attention.to_{x}.weight": t.clone() for x, t in zip("qkv", qkv, strict=True)
            }
            w1, w2, w3 = (model.plain.pop(f"{block}feed_forward.w{i}.weight") for i in (1, 2, 3))
            model.plain |= {
                f"{value_gate}.weight": torch.cat((w3, w1)),
                f"{block}feed_forward.net.2.weight": w2,
            }
            model.plain[f"{block}attention.to_out.0.weight"] = model.plain.pop(f"{block}attention.out.weight")
        for x in "qk":
            model.plain[f"{block}attention.norm_{x}.weight"] = model.plain.pop(
                f"{block}attention.{x}_norm.weight"
            )
    for name in [n for n in model.plain if n.startswith(("x_embedder.", "final_layer."))]:
        module, _, rest = name.partition(".")
        model.plain[f"all_{module}.2-1.{rest}"] = model.plain.pop(name)
    return model


def publish_diffusers(source, to_host, others=r"$"):
    """As diffusers' own modules run it: everything split, signed, under the names of the host's own map.

    others   names in the map that this family has not: the host's map serves LoRAs of its cousins too
    """
    split = {}
    for stored, target in to_host.items():
        host, span, change = (*target, None)[:3] if isinstance(target, tuple) else (target, None, None)
        if host in source and not re.match(others, stored):
            tensor = source[host] if span is None else source[host].narrow(*span)
            split[stored] = (change(tensor) if change else tensor).clone()
    model = Publisher(split)
    inside = (n for n, t in split.items() if t.ndim == 2 and re.match(r"\w+_blocks\..*\.weight", n))
    for name in [n.removesuffix(".weight") for n in inside]:
        model.move(name, name)
    return model


def publish_pixart(source):
    return publish_diffusers(source, comfy.utils.pixart_to_diffusers({"depth": 1, "hidden_size": 1152}))


def publish_flux2(source):
    to_host = comfy.utils.flux_to_diffusers({"depth": 1, "depth_single_blocks": 1, "hidden_size": 256})
    shared = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    to_host |= {f"{name}.linear.weight": f"{name}.lin.weight" for name in shared}
    for i, end in ((1, "in_layer"), (2, "out_layer")):
        for stored, host in (("timestep", "time_in"), ("guidance", "guidance_in")):
            to_host[f"time_guidance_embed.{stored}_embedder.linear_{i}.weight"] = f"{host}.{end}.weight"
    source = {name.replace("_norm.scale", "_norm.weight"): t for name, t in source.items()}
    others = r"time_text|.*ff(_context)?\.net|single_transformer_blocks\.\d+\.(attn\.to_[qkv]\.|proj_)"
    return publish_diffusers(source, to_host, others)


GUIDANCE = "distilled_guidance_layer.layers.{}."
CHROMA_STREAMS = (("img", "", ("q", "k")), ("txt", "_context", ("added_q", "added_k")))


def guidance_names(ends=("weight", "bias")):
    """diffusers' names of the network that makes Chroma's modulations -> the host's."""
    steps = ((1, "in_layer"), (2, "out_layer"))
    block = [GUIDANCE.format(i) for i in range(2)]
    return {f"{b}linear_{i}.{e}": f"{b}{host}.{e}" for b in block for i, host in steps for e in ends}


def publish_chroma_lite(source):
    to_host = comfy.utils.flux_to_diffusers({"depth": 1, "depth_single_blocks": 1, "hidden_size": 256})
    kept = {name: name for name in source if name.startswith("distilled") and "_layer." not in name[25:]}
    source = {name.replace("_norm.scale", "_norm.weight"): t for name, t in source.items()}
    others = r"time_text|.*ff(_context)?\.linear|single_.*\.(to_qkv_mlp_proj|attn\.to_out)|norm_out"
    return publish_diffusers(source, to_host | guidance_names() | kept, others)


def publish_chroma(source, last=four_bit_unsigned):
    """In the engine's layout, v1 names; `last` makes the linear after a GELU."""
    model = Publisher({name.replace("_norm.scale", "_norm.weight"): t for name, t in source.items()})
    double, single = "double_blocks.0.", "single_blocks.0."
    for stream, end, norms in CHROMA_STREAMS:
        d = "transformer_blocks.0."
        model.move(f"{d}qkv_proj{end}", f"{double}{stream}_attn.qkv")
        model.move(f"{d}out_proj{end}", f"{double}{stream}_attn.proj")
        model.move(f"{d}mlp{end}_fc1", f"{double}{stream}_mlp.0")
        model.move(f"{d}mlp{end}_fc2", f"{double}{stream}_mlp.2", make=last)
        for norm, host in zip(norms, ("query", "key"), strict=True):
            model.plain[f"{d}norm_{norm}.weight"] = model.plain.pop(
                f"{double}{stream}_attn.norm.{host}_norm.weight"
            )
    (w1, b1), (w2, b2) = model.take(single + "linear1"), model.take(single + "linear2")
    s = "single_transformer_blocks.0."
    model.layers[s + "qkv_proj"] = four_bit(w1[:768], b1[:768])
    model.layers[s + "mlp_fc1"] = four_bit(w1[768:], b1[768:])
    model.layers[s + "out_proj"] = four_bit(w2[:, :256], torch.zeros_like(b2))
    model.layers[s + "mlp_fc2"] = last(w2[:, 256:], b2)
    names = {
        f"{s}norm_{x}.weight": f"{single}norm.{h}_norm.weight" for x, h in (("q", "query"), ("k", "key"))
    }
    top = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    names |= {f"{n}.{e}": f"{host}.{e}" for n, host in top.items() for e in ("weight", "bias")}
    for stored, host in (names | guidance_names()).items():
        model.plain[stored] = model.plain.pop(host)
    return model


CASES = {  # family, how to publish it, in which dialect
    "sdxl": ("sdxl", publish_sdxl, "natural"),
    "qwen-image": ("qwen-image", publish_qwen, "natural"),
    "qwen-image-kitchen": ("qwen-image", publish_qwen_kitchen, "kitchen"),
    "z-image-dense-refiners": ("z-image", publish_z_image, "natural"),
    "pixart-sigma-lite": ("pixart-sigma", publish_pixart, "lite"),
    "flux2-lite": ("flux2", publish_flux2, "lite"),
    "chroma-lite": ("chroma", publish_chroma_lite, "lite"),
    "chroma-unsigned-after-gelu": ("chroma", publish_chroma, "natural"),
    "chroma-signed-after-gelu": ("chroma", partial(publish_chroma, last=four_bit), "natural"),
}


def write(case: str, path, source: dict[str, Tensor]) -> None:
    """The 4-bit file of a family's 16-bit tensors."""
    _, publish, dialect = CASES[case]
    model = publish(source)
    published.write(path, model.layers, model.plain, dialect)
