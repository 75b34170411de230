"""The names of LoRA tensors, as a dozen trainers spell them, on the names a model knows its layers by.

A name is a module and a tail. The tail says what the tensor is (`lora_A.default.weight`, `lora.down.weight` and
`lora_down.weight` are one thing); the module says which layer, behind prefixes and with dots or underscores. Nothing
is guessed: every spelling a module may stand for is tried against the names the model knows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .lora_fused import parts_of, share

_AS_THEY_ARE = (
    *("alpha", "dora_scale", "reshape_weight", "diff", "diff_b", "w_norm", "b_norm", "set_weight"),
    *("rescale", "oft_blocks", "a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
_PAIR = (
    r"(?:\.lora_{ab}(?:\.(?!weight)[^.]+)?|\.lora\.{ud}|_lora\.{ud}|\.lora_{ud}|\.lora_linear_layer\.{ud})"
)
_TAILS = tuple(
    (re.compile(rf"(.+?){pattern}"), tail)
    for pattern, tail in (
        (_PAIR.format(ab="B", ud="up") + r"\.weight", "lora_up.weight"),
        (_PAIR.format(ab="A", ud="down") + r"\.weight", "lora_down.weight"),
        (_PAIR.format(ab="B", ud="up") + r"\.bias", "diff_b"),
        (r"\.lora_B", "lora_up.weight"),
        (r"\.lora_A", "lora_down.weight"),
        (r"\.lora_mid\.weight", "lora_mid.weight"),
        (r"\.lora_magnitude_vector(?:\.[^.]+)*", "dora_scale"),
        (r"\.scale", "set_weight"),
        (r"(?:(?<=norm)|(?<=norm_[qk])|(?<=added_[qk]))\.weight", "set_weight"),
        *((re.escape(f".{tail}"), tail) for tail in _AS_THEY_ARE),
    )
)
_XLABS = re.compile(r"(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)")
_XLABS_ENDS = {"down.weight": "lora_down.weight", "up.weight": "lora_up.weight"}
_DOTTED = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet."),
    "pipe.dit.",  # DiffSynth
)
_UNDERSCORED = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
_FUSED = (  # modules of other trainers' fused layers, and what hosts and files call them
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv", r"single_blocks.\1.linear1_qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_qkv", r"double_blocks.\1.img_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_qkv_proj", r"double_blocks.\1.txt_attn.qkv"),
    (r"single_blocks\.(\d+)\.linear1_qkv", r"single_transformer_blocks.\1.qkv_proj"),
)

# Marks of a family in its layers' names, the clearest first: a later one may also be part of an earlier one's names.
_FAMILIES = {
    "SDXL or Stable Diffusion": r"input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block",
    "Chroma": r"distilled_guidance_layer",
    "FLUX.2": r"stream_modulation|to_qkv_mlp_proj",
    "FLUX": r"double_blocks|single_blocks|single_transformer_blocks",
    "Qwen-Image": r"img_mod|txt_mod|img_mlp|txt_mlp",
    "Stable Diffusion 3": r"joint_blocks",
    "Z-Image or Lumina": r"context_refiner|noise_refiner|layers[._]\d+[._](attention|adaLN_modulation|feed_forward)",
    "PixArt": r"transformer_blocks[._]\d+[._]attn[12]|cross_attn[._](q_linear|kv_linear|proj)",
    "Wan": r"(?<!r_)blocks[._]\d+[._](cross_attn|self_attn|attn[12])[._]",
    "FLUX or Qwen-Image": r"transformer_blocks[._]\d+[._]attn",
}
_TEXT_ENCODER = re.compile(
    r"(lora_(prior_)?te\d?_|lycoris_text_encoder|bundle_emb\.|clip_[lgh]\.)|"
    r"(base_model\.model\.)?(text_encoders?(_\d)?|te\d?|text_model)\."
)

# The adapters and what each consists of. A layer has at most one; "lokr" may have its factors whole or in two.
_ADAPTERS = {
    "LoRA": {"lora_up.weight", "lora_down.weight"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "LoKr": {"lokr_w1", "lokr_w2"},
    "GLoRA": {"a1.weight", "a2.weight", "b1.weight", "b2.weight"},
    "OFT": {"oft_blocks"},
    "difference": {"diff"},
    "norm difference": {"w_norm"},
    "replacement": {"set_weight"},
}
_NEEDS = {  # tails that mean nothing without others
    "lora_mid.weight": {"lora_up.weight"},
    "reshape_weight": {"lora_up.weight"},
    "hada_t1": {"hada_t2", "hada_w1_a"},
    "hada_t2": {"hada_t1", "hada_w1_a"},
    "lokr_t2": {"lokr_w2_a"},
    "rescale": {"oft_blocks"},
    "b_norm": {"w_norm"},
}
_IDLE = {"alpha", "dora_scale"}  # and these do no harm alone


@dataclass(frozen=True, eq=False)
class Renamed:
    """A LoRA's tensors under names a model knows.

    modules       known module name -> tail -> tensor
    unmatched     names that belong to no layer of the model, as the file has them
    naming        how the file calls its layers, for the report
    text_encoder  names of tensors for a text encoder, which no diffusion model has
    """

    modules: Mapping[str, Mapping[str, Tensor]]
    unmatched: tuple[str, ...]
    naming: str
    text_encoder: tuple[str, ...] = ()

    def flat(self) -> dict[str, Tensor]:
        """The tensors by full name: module, dot, tail."""
        return {f"{module}.{tail}": t for module, tails in self.modules.items() for tail, t in tails.items()}


def rename(path: Path, tensors: Mapping[str, Tensor], known: Mapping[str, Hashable]) -> Renamed:
    """Put a file's tensors under names that a model knows.

    known    name -> the layer it stands for; several names may stand for one layer

    Raises ValueError where a layer lacks a member of its adapter, or has one twice, or has two adapters.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    sources: dict[Hashable, dict[str, str]] = {}
    unmatched, namings = [], Counter()
    for name, tensor in tensors.items():
        module, tail = split(name)
        targets = _targets(module, tail, known) if tail else ()
        if not targets:
            unmatched.append(name)
            continue
        namings[naming(name)] += 1
        for target, part in zip(targets, share(path, name, tail, tensor, len(targets)), strict=True):
            source = sources.setdefault(known[target], {})
            if tail in source:
                raise ValueError(
                    f"{path.name}: {name}: expected one {tail} for this layer, got also {source[tail]}. "
                    "Two namings are mixed; use the file its trainer wrote."
                )
            source[tail] = name
            modules.setdefault(target, {})[tail] = _column(part) if tail == "dora_scale" else part
    for target in list(modules):
        if set(modules[target]) <= _IDLE:
            unmatched += [sources[known[target]][tail] for tail in modules.pop(target)]
        else:
            _check_members(path, modules[target], sources[known[target]])
    common = namings.most_common(1)
    named = common[0][0] if common else "unknown"
    for_clip = tuple(filter(for_text_encoder, unmatched))
    left = dict.fromkeys(unmatched)  # once each: parts of a fused layer have one name in the file
    return Renamed(modules, tuple(n for n in left if n not in for_clip), named, for_clip)


def _targets(module: str, tail: str, known: Mapping[str, Hashable]) -> tuple[str, ...]:
    """The known name of a module, or those of the parts that a fused one has here; none where any is unknown."""
    for parts in ((module,), *parts_of(module)):
        found = [next((c for c in candidates(part, tail) if c in known), "") for part in parts]
        if all(found):
            return tuple(found)
    return ()


def split(name: str) -> tuple[str, str]:
    """A name's module and its canonical tail; the tail is empty where the name is no LoRA tensor's."""
    xlabs = _XLABS.match(name)
    if xlabs and name[xlabs.end() + 1 :] in _XLABS_ENDS:
        return name[: xlabs.end()], _XLABS_ENDS[name[xlabs.end() + 1 :]]
    for pattern, tail in _TAILS:
        match = pattern.fullmatch(name)
        if match:
            return match.group(1), tail
    return name, ""


def candidates(module: str, tail: str = "") -> Iterator[str]:
    """Every known name that a module may stand for, the likeliest first."""
    yield module
    bare = _strip(_from_xlabs(module), _DOTTED)
    for pattern, host in _FUSED:
        if re.fullmatch(pattern, bare):
            yield re.sub(pattern, rf"diffusion_model.{host}", bare)
    if tail == "set_weight":
        yield f"diffusion_model.{bare}.scale"
    yield from _spelled(bare)
    if ".processor." in bare:
        yield from _spelled(bare.replace(".processor.", "."))
    if bare.endswith(".to_out"):
        yield from _spelled(f"{bare}.0")


def _spelled(bare: str) -> Iterator[str]:
    flat = _strip(bare, _UNDERSCORED)
    if flat == bare:
        yield from (f"diffusion_model.{bare}", f"transformer.{bare}", bare)
    flat = flat.replace(".", "_")
    yield from (f"lora_unet_{flat}", f"lora_transformer_{flat}", f"lycoris_{flat}")


def _strip(module: str, prefixes: tuple[str, ...]) -> str:
    found = next((p for p in prefixes if module.startswith(p) and len(module) > len(p)), None)
    return _strip(module.removeprefix(found), prefixes) if found else module


def _from_xlabs(module: str) -> str:
    """XLabs' attention processors: 1 is the image stream, 2 the text stream; single blocks have one."""
    match = _XLABS.fullmatch(module)
    if not match:
        return module
    kind, block, layer, stream = match.groups()
    if kind == "double":
        return f"double_blocks.{block}.{'txt' if stream == '2' else 'img'}_attn.{layer}"
    return f"single_blocks.{block}.{'linear1_qkv' if layer == 'qkv' else 'linear2'}"


def naming(name: str) -> str:
    """How a name spells its layer."""
    if ".processor." in name and _XLABS.match(name):
        return "XLabs"
    if "base_model.model." in name:
        return "PEFT"
    if name.startswith("lora_transformer_") or re.match("lora_unet_(single_)?transformer_blocks_", name):
        return "kohya on diffusers modules"
    for start, label in (("lora_unet_", "kohya"), ("lycoris_", "LyCORIS"), ("diffusion_model.", "ComfyUI")):
        if name.startswith(start):
            return label
    return "BFL" if re.match("(double|single)_blocks|img_in|txt_in|final_layer", name) else "diffusers"


def for_text_encoder(name: str) -> bool:
    """Whether a tensor is a text encoder's. Diffusion models have no such layer, whatever their family."""
    return _TEXT_ENCODER.match(name) is not None


def guess_family(names: Iterable[str]) -> str:
    """The model family that a file's names speak of, for a message; empty where they do not."""
    names = list(names)
    layers = [name for name in names if not for_text_encoder(name)]
    if names and not layers:
        return "a text encoder only"
    return next((f for f, marks in _FAMILIES.items() if any(re.search(marks, name) for name in layers)), "")


def guess_other_family(unmatched: Iterable[str], known: Iterable[str]) -> str:
    """The family that leftover names speak of, if no layer of the model bears its mark; else empty."""
    unmatched, known = list(unmatched), list(known)
    for family, marks in _FAMILIES.items():
        if any(re.search(marks, name) for name in unmatched):
            return "" if any(re.search(marks, name) for name in known) else family
    return ""


def _column(scale: Tensor) -> Tensor:
    """PEFT keeps DoRA's magnitudes as a vector; the other trainers as a column beside the weight."""
    return scale.unsqueeze(1) if scale.ndim == 1 else scale


def _check_members(path: Path, members: dict[str, Tensor], sources: Mapping[str, str]) -> None:
    have, name = set(members), next(iter(sources.values()))
    for factor in ("lokr_w1", "lokr_w2"):  # two thin matrices stand for a whole one
        if {f"{factor}_a", f"{factor}_b"} & have:
            _require(path, sources, have, {f"{factor}_a", f"{factor}_b"})
            have.add(factor)
    found = [adapter for adapter, tails in _ADAPTERS.items() if tails & have]
    if len(found) > 1:
        raise ValueError(
            f"{path.name}: {name}: expected one adapter for this layer, got {' and '.join(found)}. "
            "Apply them as two files."
        )
    for adapter in found:
        _require(path, sources, have, _ADAPTERS[adapter])
    for tail in have & set(_NEEDS):
        _require(path, sources, have, _NEEDS[tail])
    if "alpha" in members and members["alpha"].numel() != 1:
        raise ValueError(
            f"{path.name}: {sources['alpha']}: expected one number, got shape {list(members['alpha'].shape)}. "
            "The file is damaged; download it again."
        )
    if "oft_blocks" in members:
        _check_blocks(path, members, sources["oft_blocks"])


def _require(path: Path, sources: Mapping[str, str], have: set[str], needed: set[str]) -> None:
    missing = sorted(needed - have)
    if missing:
        raise ValueError(
            f"{path.name}: {next(iter(sources.values()))}: expected {missing[0]} beside it, got none. "
            "The file is incomplete; download it again."
        )


def _check_blocks(path: Path, members: dict[str, Tensor], name: str) -> None:
    blocks = members["oft_blocks"]
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError(
            f"{path.name}: {name}: expected square blocks on three axes (OFT) or four (BOFT), got "
            f"{list(blocks.shape)}. It was made by a trainer this pack does not know."
        )
    if blocks.ndim == 4:
        members.setdefault("alpha", blocks.new_zeros(()))  # hosts fail silently on a BOFT without one
