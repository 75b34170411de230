"""Every tensor of published models in full size, without their bytes: {name: (dtype, shape)}.

Written from docs/format.md and the models' own sizes, apart from the family tables that map these names.
"""

from __future__ import annotations

import json

from .made import V2_NAMES, Shapes, awq, dense, flux_dev_shapes, w4a4

Modules = dict[str, Shapes]


def flat(modules: Modules) -> Shapes:
    """Whole names; a tensor of no module has an empty last part."""
    named = (
        (f"{module}.{tail}".rstrip("."), value)
        for module, tails in modules.items()
        for tail, value in tails.items()
    )
    return dict(named)


def vector(*shape: int) -> Shapes:
    """A norm's weight."""
    return {"weight": ("BF16", list(shape))}


def v2(n: int, k: int, fp4: bool, *, bias: bool = True, **more) -> Shapes:
    """A W4A4 layer under v2 names."""
    tensors = {V2_NAMES.get(tail, tail): value for tail, value in w4a4(n, k, fp4=fp4, **more).items()}
    return tensors if bias else without_bias(tensors)


def without_bias(tensors: Shapes) -> Shapes:
    return {tail: value for tail, value in tensors.items() if tail != "bias"}


def lite(n: int, k: int, fp4: bool, *, bias: bool = True) -> Shapes:
    """A W4A4 layer of nunchaku_lite: v2 names, no original smoothing, both second scales."""
    tensors = {tail: value for tail, value in v2(n, k, fp4, bias=bias).items() if not tail.endswith("_orig")}
    return tensors | ({"wcscales": ("BF16", [n])} if fp4 else {})


def tile(n: int, k: int, rank: int = 64) -> Shapes:
    """A W4A4 layer of a tile-packed kitchen file."""
    return {
        "weight": ("I8", [n // 128, k // 64, 32, 128]),
        "weight_scale": ("BF16", [n // 128, k // 64, 128]),
        "smooth_factor": ("BF16", [k]),
        "proj_down": ("BF16", [k, rank]),
        "proj_up": ("BF16", [n // 128, rank, 128]),
        "bias": ("BF16", [n]),
        "comfy_quant": ("U8", [len(TILE)]),
    }


def kitchen_awq(n: int, k: int) -> Shapes:
    scale = ("BF16", [k // 64, n])
    tensors = {
        "weight": ("I8", [n, k // 2]),
        "weight_scale": scale,
        "weight_zero": scale,
        "bias": ("BF16", [n]),
    }
    return tensors | {"comfy_quant": ("U8", [len(AWQ)])}


TILE = json.dumps({"format": "svdquant_w4a4", "layout": "kitchen_tile_packed_w4a4"}).encode()
AWQ = json.dumps({"format": "awq_w4a16", "group_size": 64}).encode()


def qwen_image(*, fp4: bool = False) -> Shapes:
    """Qwen-Image, -Edit, -Edit-2509 and Lightning: one list of names for all."""
    d, modules = 3072, _qwen_top()
    for i in range(60):
        block = f"transformer_blocks.{i}."
        for stream, qkv, out in (("img", "to_qkv", "to_out.0"), ("txt", "add_qkv_proj", "to_add_out")):
            modules[f"{block}{stream}_mod.1"] = awq(6 * d, d)
            modules[f"{block}attn.{qkv}"] = v2(3 * d, d, fp4, second="wcscales")
            modules[f"{block}attn.{out}"] = v2(d, d, fp4)
            modules[f"{block}{stream}_mlp.net.0.proj"] = v2(4 * d, d, fp4)
            modules[f"{block}{stream}_mlp.net.2"] = v2(d, 4 * d, fp4)
        modules |= {f"{block}attn.norm_{n}": vector(128) for n in ("q", "k", "added_q", "added_k")}
    return flat(modules)


def qwen_image_edit_2511_kitchen() -> Shapes:
    """Tile-packed, q, k and v apart, and the empty tensor that says it is 2511."""
    d, modules = 3072, _qwen_top()
    for i in range(60):
        block = f"transformer_blocks.{i}."
        for stream, prefix, end, out in (
            ("img", "to_", "", "to_out.0"),
            ("txt", "add_", "_proj", "to_add_out"),
        ):
            modules[f"{block}{stream}_mod.1"] = kitchen_awq(6 * d, d)
            modules |= {f"{block}attn.{prefix}{x}{end}": tile(d, d) for x in "qkv"}
            modules[f"{block}attn.{out}"] = tile(d, d)
            modules[f"{block}{stream}_mlp.net.0.proj"] = tile(4 * d, d)
            modules[f"{block}{stream}_mlp.net.2"] = tile(d, 4 * d)
        modules |= {f"{block}attn.norm_{n}": vector(128) for n in ("q", "k", "added_q", "added_k")}
    return flat(modules | {"__index_timestep_zero__": {"": ("BF16", [0])}})


def _qwen_top() -> Modules:
    d = 3072
    return {
        "img_in": dense(d, 64),
        "txt_in": dense(d, 3584),
        "txt_norm": vector(3584),
        "time_text_embed.timestep_embedder.linear_1": dense(d, 256),
        "time_text_embed.timestep_embedder.linear_2": dense(d, d),
        "norm_out.linear": dense(2 * d, d),
        "proj_out": dense(64, d),
    }


def z_image(*, fp4: bool = False, dense_refiners: bool = False) -> Shapes:
    d, ffn, modulation = 3840, 10240, 256
    modules: Modules = {
        "all_x_embedder.2-1": dense(d, 64),
        "all_final_layer.2-1.linear": dense(64, d),
        "all_final_layer.2-1.adaLN_modulation.1": dense(d, modulation),
        "cap_embedder.0": vector(2560),
        "cap_embedder.1": dense(d, 2560),
        "t_embedder.mlp.0": dense(1024, 256),
        "t_embedder.mlp.2": dense(modulation, 1024),
        "x_pad_token": {"": ("BF16", [1, d])},
        "cap_pad_token": {"": ("BF16", [1, d])},
    }
    for kind, count in (("layers", 30), ("noise_refiner", 2), ("context_refiner", 2)):
        for block in (f"{kind}.{i}." for i in range(count)):
            modules |= {f"{block}attention.norm_{x}": vector(128) for x in "qk"}
            modules |= {
                f"{block}{norm}{i}": vector(d) for norm in ("attention_norm", "ffn_norm") for i in (1, 2)
            }
            if kind != "context_refiner":
                modules[f"{block}adaLN_modulation.0"] = dense(4 * d, modulation)
            modules |= _z_image_block(block, d, ffn, fp4, dense_refiners and kind != "layers")
    return flat(modules)


def _z_image_block(block: str, d: int, ffn: int, fp4: bool, is_dense: bool) -> Modules:
    others = {
        "attention.to_out.0": (d, d),
        "feed_forward.net.0.proj": (2 * ffn, d),
        "feed_forward.net.2": (d, ffn),
    }
    if is_dense:
        split = {f"attention.to_{x}": (d, d) for x in "qkv"}
        return {block + name: vector(*shape) for name, shape in (split | others).items()}
    fused = {block + "attention.to_qkv": v2(3 * d, d, fp4, bias=False, second="wcscales")}
    return fused | {block + name: v2(*shape, fp4, bias=False) for name, shape in others.items()}


def sdxl() -> Shapes:
    """The diffusers UNet: 4-bit linears in transformer blocks, everything else dense."""
    modules: Modules = {
        "conv_in": dense(320, 4, 3, 3),
        "time_embedding.linear_1": dense(1280, 320),
        "time_embedding.linear_2": dense(1280, 1280),
        "add_embedding.linear_1": dense(1280, 2816),
        "add_embedding.linear_2": dense(1280, 1280),
        "conv_norm_out": dense(320),
        "conv_out": dense(4, 320, 3, 3),
        "down_blocks.0.downsamplers.0.conv": dense(320, 320, 3, 3),
        "down_blocks.1.downsamplers.0.conv": dense(640, 640, 3, 3),
        "up_blocks.0.upsamplers.0.conv": dense(1280, 1280, 3, 3),
        "up_blocks.1.upsamplers.0.conv": dense(640, 640, 3, 3),
    }
    down, up = ((320, 0), (640, 2), (1280, 10)), ((1280, 10), (640, 2), (320, 0))
    width, skips = 320, [320]
    for b, (d, depth) in enumerate(down):
        for i in range(2):
            modules |= _sdxl_stage(f"down_blocks.{b}", i, width, d, depth)
            width, skips = d, [*skips, d]
        skips += [d] if b < 2 else []
    modules |= _sdxl_resnet("mid_block.resnets.0", width, width) | _sdxl_resnet(
        "mid_block.resnets.1", width, width
    )
    modules |= _sdxl_attention("mid_block.attentions.0", width, 10)
    for b, (d, depth) in enumerate(up):
        for i in range(3):
            modules |= _sdxl_stage(f"up_blocks.{b}", i, width + skips.pop(), d, depth)
            width = d
    return flat(modules)


def _sdxl_stage(block: str, i: int, width: int, d: int, depth: int) -> Modules:
    attention = _sdxl_attention(f"{block}.attentions.{i}", d, depth) if depth else {}
    return _sdxl_resnet(f"{block}.resnets.{i}", width, d) | attention


def _sdxl_resnet(name: str, width: int, d: int) -> Modules:
    modules = {
        "norm1": dense(width),
        "conv1": dense(d, width, 3, 3),
        "time_emb_proj": dense(d, 1280),
        "norm2": dense(d),
        "conv2": dense(d, d, 3, 3),
        **({"conv_shortcut": dense(d, width, 1, 1)} if width != d else {}),
    }
    return {f"{name}.{module}": tensors for module, tensors in modules.items()}


def _sdxl_attention(name: str, d: int, depth: int) -> Modules:
    modules = {f"{name}.norm": dense(d), f"{name}.proj_in": dense(d, d), f"{name}.proj_out": dense(d, d)}
    for t in range(depth):
        block = f"{name}.transformer_blocks.{t}."
        modules |= {f"{block}norm{i}": dense(d) for i in (1, 2, 3)}
        modules |= {f"{block}attn2.to_{x}": vector(d, 2048) for x in "kv"}
        modules[block + "attn1.to_qkv"] = without_bias(w4a4(3 * d, d, fp4=False))
        modules[block + "attn2.to_q"] = without_bias(w4a4(d, d, fp4=False))
        for inner, shape in (
            ("attn1.to_out.0", (d, d)),
            ("attn2.to_out.0", (d, d)),
            ("ff.net.2", (d, 4 * d)),
        ):
            modules[block + inner] = w4a4(*shape, fp4=False)
        modules[block + "ff.net.0.proj"] = w4a4(8 * d, d, fp4=False)
    return modules


def pixart_sigma(*, fp4: bool = False) -> Shapes:
    """As nunchaku_lite would quantize the diffusers model: nothing published is known."""
    d, modules = (
        1152,
        {
            "pos_embed.proj": dense(1152, 4, 2, 2),
            "proj_out": dense(32, 1152),
            "adaln_single.linear": dense(6 * 1152, 1152),
            "adaln_single.emb.timestep_embedder.linear_1": dense(1152, 256),
            "adaln_single.emb.timestep_embedder.linear_2": dense(1152, 1152),
            "caption_projection.linear_1": dense(1152, 4096),
            "caption_projection.linear_2": dense(1152, 1152),
            "scale_shift_table": {"": ("BF16", [2, 1152])},
        },
    )
    for block in (f"transformer_blocks.{i}." for i in range(28)):
        modules[block + "scale_shift_table"] = {"": ("BF16", [6, d])}
        modules |= {
            f"{block}attn{a}.{x}": lite(d, d, fp4)
            for a in (1, 2)
            for x in ("to_q", "to_k", "to_v", "to_out.0")
        }
        modules |= {block + "ff.net.0.proj": lite(4 * d, d, fp4), block + "ff.net.2": lite(d, 4 * d, fp4)}
    return flat(modules)


def klein_4b(*, fp4: bool = False, fused: bool = False) -> Shapes:
    """FLUX.2 Klein 4B: as diffusers has it, or with q, k, v and the single blocks' linears as Nunchaku fuses them."""
    return _klein(3072, 7680, 5, 20, fp4, fused)


def klein_9b(*, fp4: bool = False, fused: bool = False) -> Shapes:
    return _klein(4096, 12288, 8, 24, fp4, fused)


def _klein(d: int, text: int, double: int, single: int, fp4: bool, fused: bool) -> Shapes:
    modules = {
        "x_embedder": vector(d, 128),
        "context_embedder": vector(d, text),
        "proj_out": vector(128, d),
        "norm_out.linear": vector(2 * d, d),
        "time_guidance_embed.timestep_embedder.linear_1": vector(d, 256),
        "time_guidance_embed.timestep_embedder.linear_2": vector(d, d),
        **{f"double_stream_modulation_{s}.linear": vector(6 * d, d) for s in ("img", "txt")},
        "single_stream_modulation.linear": vector(3 * d, d),
    }
    qkv = [("attn.to_qkv", 3), ("attn.to_added_qkv", 3)] if fused else []
    qkv = qkv or [(f"attn.{name}", 1) for x in "qkv" for name in (f"to_{x}", f"add_{x}_proj")]
    for block in (f"transformer_blocks.{i}." for i in range(double)):
        modules |= {block + name: lite(n * d, d, fp4, bias=False) for name, n in qkv}
        modules |= {
            block + name: lite(d, d, fp4, bias=False) for name in ("attn.to_out.0", "attn.to_add_out")
        }
        for ff in ("ff", "ff_context"):
            modules[f"{block}{ff}.linear_in"] = lite(6 * d, d, fp4, bias=False)
            modules[f"{block}{ff}.linear_out"] = lite(d, 3 * d, fp4, bias=False)
        modules |= {f"{block}attn.norm_{x}": vector(128) for x in ("q", "k", "added_q", "added_k")}
    linears = {"attn.to_qkv_mlp_proj": (9 * d, d), "attn.to_out": (d, 4 * d)}
    if fused:
        linears = {"attn.qkv_proj": (3 * d, d), "attn.mlp_fc1": (6 * d, d)}
        linears |= {"attn.out_proj": (d, d), "attn.mlp_fc2": (d, 3 * d)}
    for block in (f"single_transformer_blocks.{i}." for i in range(single)):
        modules |= {block + name: lite(*shape, fp4, bias=False) for name, shape in linears.items()}
        modules |= {f"{block}attn.norm_{x}": vector(128) for x in "qk"}
    return flat(modules)


def chroma(*, fp4: bool = False) -> Shapes:
    """FLUX.1's blocks in Nunchaku layout, without modulations and embedders, and the network in their place."""
    flux = flux_dev_shapes(fp4=fp4)
    dropped = (".norm1.linear.", ".norm1_context.linear.", ".norm.linear.", "time_text_embed.", "norm_out.")
    return {n: s for n, s in flux.items() if not any(part in f".{n}" for part in dropped)} | _chroma_network()


def chroma_lite(*, fp4: bool = False) -> Shapes:
    """diffusers' modules: q, k and v apart; NVFP4 files have a single block's `proj_out` in two."""
    d, modules = 3072, {"x_embedder": dense(3072, 64), "context_embedder": dense(3072, 4096)}
    modules["proj_out"] = dense(64, d)
    linears = {f"attn.{x}": (d, d) for x in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")}
    linears |= {f"attn.add_{x}_proj": (d, d) for x in "qkv"}
    for ff in ("ff", "ff_context"):
        linears |= {f"{ff}.net.0.proj": (4 * d, d), f"{ff}.net.2": (d, 4 * d)}
    single = {f"attn.to_{x}": (d, d) for x in "qkv"} | {"proj_mlp": (4 * d, d)}
    halves = {"proj_out.linears.0": (d, d), "proj_out.linears.1": (d, 4 * d)}
    single |= halves if fp4 else {"proj_out": (d, 5 * d)}
    for block in (f"transformer_blocks.{i}." for i in range(19)):
        modules |= {block + name: lite(*shape, fp4) for name, shape in linears.items()}
        modules |= {f"{block}attn.norm_{x}": vector(128) for x in ("q", "k", "added_q", "added_k")}
    for block in (f"single_transformer_blocks.{i}." for i in range(38)):
        modules |= {block + name: lite(*shape, fp4) for name, shape in single.items()}
        modules |= {f"{block}attn.norm_{x}": vector(128) for x in "qk"}
    return flat(modules) | _chroma_network()


def _chroma_network() -> Shapes:
    """Five residual layers of width 5120 that make every block's modulation."""
    name, d, width = "distilled_guidance_layer", 3072, 5120
    modules = {f"{name}.in_proj": dense(width, 64), f"{name}.out_proj": dense(d, width)}
    for i in range(5):
        modules |= {f"{name}.layers.{i}.linear_{j}": dense(width, width) for j in (1, 2)}
        modules[f"{name}.norms.{i}"] = vector(width)
    return flat(modules)
