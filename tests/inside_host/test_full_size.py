"""Published models in full size, by names and shapes: every tensor of the host's class is filled, none is left."""

from __future__ import annotations

from functools import partial

import comfy.ops
import comfy.supported_models
import pytest
import torch

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.svdquant.adapters.baking.places import pieces_of
from svdquant_nodes.svdquant.adapters.families import resolve
from svdquant_nodes.tests.loaders import full_size, made

META = {"device": "meta", "operations": comfy.ops.disable_weight_init}


def flux(**changes):
    from comfy.ldm.flux.model import Flux, FluxParams

    config = dict(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0
    )
    config |= dict(
        num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2
    )
    config |= dict(qkv_bias=True, guidance_embed=True, txt_ids_dims=[]) | changes
    return Flux(**{k: v for k, v in config.items() if k in FluxParams.__dataclass_fields__}, **META)


def klein(**sizes):
    config = dict(in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=7680, mlp_ratio=3.0)
    config |= dict(depth=5, depth_single_blocks=20, axes_dim=[32] * 4, theta=2000, patch_size=1)
    config |= dict(qkv_bias=False, ops_bias=False) | sizes
    config |= dict(guidance_embed=False, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True)
    return flux(**config)


def klein_9b():
    return klein(hidden_size=4096, num_heads=32, context_in_dim=12288, depth=8, depth_single_blocks=24)


def chroma():
    from comfy.ldm.chroma.model import Chroma

    config = dict(in_channels=64, out_channels=64, context_in_dim=4096, hidden_size=3072, num_heads=24)
    config |= dict(depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2)
    config |= dict(mlp_ratio=4.0, qkv_bias=True, txt_ids_dims=[], vec_in_dim=None)
    return Chroma(**config, in_dim=64, out_dim=3072, hidden_dim=5120, n_layers=5, **META)


def qwen(**config):
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(**config, **META)


def z_image():
    from comfy.ldm.lumina.model import NextDiT

    config = dict(
        patch_size=2, in_channels=16, dim=3840, cap_feat_dim=2560, n_layers=30, qk_norm=True, n_heads=30
    )
    config |= dict(
        n_kv_heads=30, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], ffn_dim_multiplier=8 / 3
    )
    return NextDiT(**config, z_image_modulation=True, pad_tokens_multiple=32, **META)


def sdxl():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2])
    config |= dict(channel_mult=[1, 2, 4], num_heads=-1, num_head_channels=64, use_spatial_transformer=True)
    config |= dict(transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], transformer_depth_middle=10)
    config |= comfy.supported_models.SDXL.unet_config
    return UNetModel(**config, num_classes="sequential", **META)


def pixart():
    from comfy.ldm.pixart.pixartms import PixArtMS

    return PixArtMS(depth=28, model_max_length=300, micro_condition=False, **META)


CASES = {  # its names and shapes; the host's class; how many tensors, where the format says it
    "flux.1-dev-int4": (made.flux_dev_shapes, flux, 2604),
    "flux.1-dev-nvfp4": (partial(made.flux_dev_shapes, fp4=True), flux, 2908),
    "qwen-image-int4": (full_size.qwen_image, qwen, 4093),
    "qwen-image-nvfp4": (partial(full_size.qwen_image, fp4=True), qwen, 4573),
    "qwen-image-edit-2511-kitchen": (
        full_size.qwen_image_edit_2511_kitchen,
        partial(qwen, default_ref_method="index_timestep_zero"),
        5894,
    ),
    "z-image-int4": (full_size.z_image, z_image, None),
    "z-image-nvfp4": (partial(full_size.z_image, fp4=True), z_image, None),
    "z-image-dense-refiners": (partial(full_size.z_image, dense_refiners=True), z_image, None),
    "sdxl-int4": (full_size.sdxl, sdxl, None),
    "pixart-sigma-lite-int4": (full_size.pixart_sigma, pixart, None),
    "pixart-sigma-lite-nvfp4": (partial(full_size.pixart_sigma, fp4=True), pixart, None),
    "klein-4b-lite-int4": (full_size.klein_4b, klein, None),
    "klein-4b-lite-nvfp4": (partial(full_size.klein_4b, fp4=True), klein, None),
    "klein-4b-fused-int4": (partial(full_size.klein_4b, fused=True), klein, None),
    "klein-9b-lite-int4": (full_size.klein_9b, klein_9b, None),
    "klein-9b-lite-nvfp4": (partial(full_size.klein_9b, fp4=True), klein_9b, None),
    "klein-9b-fused-int4": (partial(full_size.klein_9b, fused=True), klein_9b, None),
    "chroma-int4": (full_size.chroma, chroma, None),
    "chroma-nvfp4": (partial(full_size.chroma, fp4=True), chroma, None),
    "chroma-lite-int4": (full_size.chroma_lite, chroma, None),
    "chroma-lite-nvfp4": (partial(full_size.chroma_lite, fp4=True), chroma, None),
}


def published(name):
    """Hosts renamed RMSNorm's `scale`."""
    return name.removesuffix(".scale") + ".weight" if name.endswith("_norm.scale") else name


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_its_place(case, tmp_path):
    shapes_of, build, count = CASES[case]
    try:
        model = build()
    except TypeError as error:
        pytest.skip(f"this ComfyUI's class is older: {error}")
    shapes = shapes_of()
    path, _ = made.sparse(tmp_path / "model.safetensors", shapes, contents(shapes))
    checkpoint = open_checkpoint(path)
    family = resolve(checkpoint)
    mapped = family.map_names(checkpoint)
    assert mapped.left_over == ()
    assert count in (None, len(shapes))
    wanted = {published(name): tuple(t.shape) for name, t in model.state_dict().items()}
    found = dict(filled(checkpoint, mapped, wanted))
    absent = {name for name in wanted if name not in found}
    assert absent == ({"y_embedder.y_embedding"} if "pixart" in case else set())
    assert found == {name: shape for name, shape in wanted.items() if name in found}


def contents(shapes):
    """The bytes of the few tensors that a header cannot do without."""
    texts = {("U8", len(text)): text for text in (full_size.TILE, full_size.AWQ)}
    return {
        name: texts[dtype, shape[0]]
        for name, (dtype, shape) in shapes.items()
        if name.endswith(".comfy_quant")
    }


def filled(checkpoint, mapped, wanted):
    """(name, shape) of every host tensor that the file fills."""
    for host, pieces in mapped.linears.items():
        last = pieces_of(checkpoint, mapped, host)[-1]
        yield f"{host}.weight", (last.rows.stop, last.columns.stop)
        biases = {"bias" in checkpoint.info[name].keys for name, _ in pieces}
        if True in biases:
            yield f"{host}.bias", (last.rows.stop,)
    for host, source in mapped.plain.items():
        meta = {name: torch.empty(checkpoint.plain_info[name].shape, device="meta") for name in source.names}
        yield published(host), tuple(source.read(meta).shape)
