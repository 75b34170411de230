"""FLUX.1 from a 16-bit file, in its authors' names or diffusers', to the linears of a Nunchaku file.

The family's table says how stored linears become the host's; here it is walked the other way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

from ....loaders.source import ALL, Change, Fold, Job, SourceModel
from ..families import flux
from ..family import Layer, Names, Plain, Role, Stored

HEAD = 128


def flux_names(source: SourceModel) -> SourceModel | None:
    """The model under the FLUX names of its authors, from those or diffusers'; None if it is no FLUX.1."""
    names = {name.removesuffix(".weight") for name, shape in source.shapes.items() if len(shape) == 2}
    if names >= {
        "img_in",
        "vector_in.in_layer",
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_mod.lin",
    }:
        swap = {n: n[: -len("weight")] + "scale" for n in source.shapes if n.endswith("_norm.weight")}
        return source.renamed({swap.get(name, name): ((name,), None) for name in source.shapes})
    if not names >= {"single_transformer_blocks.0.attn.to_q", "time_text_embed.text_embedder.linear_1"}:
        return None
    others = dict.fromkeys(source.shapes)
    mapped = flux.FAMILY.map_names(Names(dict.fromkeys(names - _plain_linears(names)), others))
    renamed: dict[str, tuple[tuple[str, ...], Change]] = {}
    for host, pieces in mapped.linears.items():
        for end in ("weight", "bias"):
            old = tuple(f"{name}.{end}" for name, _ in pieces)
            if all(name in source.shapes for name in old):
                renamed[f"{host}.{end}"] = (old, None)
    renamed |= {host: (plain.names, plain.change) for host, plain in mapped.plain.items()}
    return source.renamed(renamed)


def _plain_linears(names: set[str]) -> set[str]:
    return {n for n in names if not n.startswith(("transformer_blocks.", "single_transformer_blocks."))}


def flux_jobs(source: SourceModel, precision: str, rank: int) -> list[Job]:
    """Nunchaku's layout, v1 names: single blocks' linears in two, modulations in AWQ."""
    jobs = [job for layer in flux.FAMILY.layers for job in _layer_jobs(layer, source, precision, rank)]
    return sorted(jobs, key=lambda job: _place(job.name))


def _place(name: str) -> tuple:
    block, index = name.split(".")[:2]
    return block.startswith("single"), int(index)


def _layer_jobs(layer: Layer, source: SourceModel, precision: str, rank: int) -> Iterator[Job]:
    option, by_rows, index = layer.options[0], layer.axis == "rows", 0
    while f"{(host := layer.host.format(index))}.weight" in source.shapes:
        width = min(source.shapes[f"{host}.weight"])
        first = 3 * width if by_rows else width  # of two halves, the attention's comes first
        spans = [ALL] if len(option) == 1 else [(0, first), (first, None)]
        for stored, span in zip(option, spans, strict=True):
            rows, columns = (span, ALL) if by_rows else (ALL, span)
            has_bias = by_rows or bool(stored.role.act_shift)  # a sum's bias goes with its second half
            job = Job(stored.name.format(index), host, precision, rank, rows, columns, has_bias)
            yield _with_role(job, stored, index, width)
        index += 1


def _with_role(job: Job, stored: Stored, index: int, width: int) -> Job:
    role: Role = stored.role
    center, folds = _centring(job.source, job.name, index, width)
    if role.splits:
        return replace(job, precision="awq", rank=0, chunks=role.splits, folds=folds)
    return replace(
        job, after_gelu=bool(role.act_shift), center=None if role.act_shift else center, folds=folds
    )


def _centring(host: str, name: str, index: int, width: int) -> tuple[str | None, tuple[Fold, ...]]:
    """Whose mean leaves a linear's input, and what its bias takes out for others.

    A shift of the modulation feeds only qkv, or only the MLP; attention averages v, so a constant in v's bias comes
    out of it unchanged. Image and text streams attend to both, and so share one mean.
    """
    double, single = f"double_blocks.{index}.", f"single_blocks.{index}."
    value_rows = (2 * width, 3 * width)
    if host == single + "modulation.lin":
        return None, (Fold((0, width), single + "linear1"),)
    if host.startswith(single):
        folds = (Fold(value_rows, single + "linear2", (0, width)),) if name.endswith("qkv_proj") else ()
        return host, folds
    stream = double + host.removeprefix(double)[:3]
    if host.endswith("_mod.lin"):
        return None, (Fold((0, width), stream + "_attn.qkv"), Fold((3 * width, 4 * width), stream + "_mlp.0"))
    if host.endswith("_attn.qkv"):
        return host, (Fold(value_rows, double + "img_attn.proj"),)
    return (double + "img_attn.proj" if host.endswith("_attn.proj") else host), ()


def stored_name(name: str) -> tuple[str, str, Change]:
    """(name in the file, name in the source, change) of a tensor that stays 16-bit."""
    for entry in flux.FAMILY.plain:
        index = _match(entry, name)
        if index is not None:
            return entry.names[0].format(*index), name, entry.change
    return name, name, None


def _match(entry: Plain, name: str) -> tuple[str, ...] | None:
    before, hole, after = entry.host.partition("{}")
    if not hole:
        return () if name == entry.host else None
    if not name.startswith(before) or not name.endswith(after):
        return None
    middle = name[len(before) : len(name) - len(after)]
    return (middle,) if middle.isdigit() else None


def flux_metadata(source: SourceModel) -> dict[str, str]:
    """The header of a published FLUX.1 file, with this model's sizes."""
    shapes = source.shapes
    hidden, patch = shapes["img_in.weight"]
    context, pooled = shapes["txt_in.weight"][1], shapes["vector_in.in_layer.weight"][1]
    depth, single = (
        1 + max((int(n.split(".")[1]) for n in shapes if n.startswith(kind)), default=-1)
        for kind in ("double_blocks.", "single_blocks.")
    )
    guidance = "guidance_in.in_layer.weight" in shapes
    model = dict(axes_dim=[16, 56, 56], context_in_dim=context, depth=depth, depth_single_blocks=single)
    model |= dict(
        disable_unet_model_creation=True, guidance_embed=guidance, hidden_size=hidden, image_model="flux"
    )
    model |= dict(
        in_channels=patch // 4, mlp_ratio=4.0, num_heads=hidden // HEAD, out_channels=16, patch_size=2
    )
    model |= dict(qkv_bias=True, theta=10000, vec_in_dim=pooled)
    diffusers = dict(
        _class_name="FluxTransformer2DModel", attention_head_dim=HEAD, axes_dims_rope=[16, 56, 56]
    )
    diffusers |= dict(guidance_embeds=guidance, in_channels=patch, joint_attention_dim=context)
    diffusers |= dict(num_attention_heads=hidden // HEAD, num_layers=depth, num_single_layers=single)
    diffusers |= dict(patch_size=1, pooled_projection_dim=pooled)
    host = {"model_class": "Flux" if guidance else "FluxSchnell", "model_config": model}
    return {
        "model_class": "NunchakuFluxTransformer2dModel",
        "config": json.dumps(diffusers),
        "comfy_config": json.dumps(host),
    }
