"""Make a 4-bit model of a 16-bit one, and compare the two."""

from __future__ import annotations

from .families import PIXART_FILE, QWEN_3, QWEN_3_FILE
from .flux import T5, text_encoders
from .graph import (
    File,
    Graph,
    Link,
    Node,
    Workflow,
    empty_latent,
    hub,
    load_clip,
    node,
    prompt,
    sample,
)

SCHNELL_16 = hub("Comfy-Org/flux1-schnell/flux1-schnell.safetensors", "diffusion_models", 23.8)
PIXART_16 = hub(
    "HDiffusion/Pixart-Sigma-Safetensors/PixArt-Sigma-XL-2-1024-MS.safetensors", "diffusion_models", 1.2
)
SCHNELL_FILE, SCHNELL_SIZE = "my-flux1-schnell-int4.safetensors", 6.8
_TEXT = "a market street in the evening, people, fruit, paper lanterns, shop signs"


def _load_16_bit(file: File) -> Node:
    values = dict(unet_name=file.name, weight_dtype="default")
    return node("UNETLoader", (0, 0, 110), "16-bit model", [file], **values)


def _quantize(source: File, target: str) -> Graph:
    return {
        "watch": node("SVDQuantCalibrate", (1, -220, 160), model=Link("model"), tokens=2048, seed=0),
        "quantize": node(
            "SVDQuantQuantize",
            (3, 0, 460),
            source=source.name,
            file_name=target.removesuffix(".safetensors"),
            precision="int4",
            rank=32,
            recipe="auto",
            center=False,
            seed=0,
            statistics=Link("watch", 1),
            after=Link("sample"),
            budget_mb=0,
            error_percent=0.0,
            save_statistics=False,
        ),
    }


def quantize_flux() -> Graph:
    return {
        "model": _load_16_bit(SCHNELL_16),
        "clip": text_encoders()["clip"],
        "prompt": prompt(_TEXT, 200, "What it is calibrated with"),
        "latent": empty_latent(1024, 1024),
        "sample": sample("watch", steps=4),
        **_quantize(SCHNELL_16, SCHNELL_FILE),
    }


def quantize_pixart() -> Graph:
    return {
        "model": _load_16_bit(PIXART_16),
        "clip": load_clip(T5, "pixart"),
        "prompt": prompt(_TEXT, 0, "What it is calibrated with"),
        "negative": prompt("", 270, "Negative"),
        "latent": empty_latent(1024, 1024, "EmptyLatentImage", 540),
        "sample": sample("watch", cfg=4.5, scheduler="normal", negative=Link("negative")),
        **_quantize(PIXART_16, PIXART_FILE),
    }


def quantize_text_encoder() -> Graph:
    return {
        "quantize": node(
            "SVDQuantQuantizeTextEncoder",
            (0, 0, 320),
            files=[QWEN_3],
            source=QWEN_3.name,
            file_name=QWEN_3_FILE.removesuffix(".safetensors"),
            group="128",
        )
    }


def compare_flux() -> Graph:
    return {
        "exact": _load_16_bit(SCHNELL_16),
        "model": node(
            "SVDQuantLoadModel",
            (0, 650, 130),
            "4-bit model, from quantize-flux",
            model_name=SCHNELL_FILE,
            activations="auto",
        ),
        **text_encoders(),
        "prompt": prompt("a brass telescope on a wooden table, studio light", 200),
        "latent": empty_latent(1024, 1024),
        "compare": node(
            "SVDQuantCompare",
            (2, 0, 520),
            model_16bit=Link("exact"),
            model_4bit=Link("model"),
            positive=Link("prompt"),
            latent=Link("latent"),
            vae=Link("vae"),
            seed=0,
            steps=4,
            cfg=1.0,
            guidance=3.5,
            sampler="euler",
            scheduler="simple",
        ),
        "save": node("SaveImage", (3, 0, 420), images=Link("compare"), filename_prefix="svdquant-compare"),
    }


WORKFLOWS = (
    Workflow(
        "quantize-flux",
        "FLUX.1 from 16 to 4 bits",
        "SVDQuant Calibrate watches what the 16-bit model's layers read while it draws one picture; SVDQuant Quantize "
        "fits the 4-bit model to that and writes it to models/diffusion_models. The file is in Nunchaku's layout, so "
        "other loaders read it, too. Put any FLUX.1 finetune in place of schnell, in both nodes that name it. More "
        "prompts in one batch make a better model. When it is done press R and open compare-flux.",
        quantize_flux,
    ),
    Workflow(
        "quantize-pixart-sigma",
        "PixArt-Sigma from 16 to 4 bits",
        "The same as quantize-flux for a model that nobody publishes in 4 bits. Every diffusion model that ComfyUI "
        "loads can be quantized this way; the file keeps ComfyUI's names. When it is done press R and open "
        "pixart-sigma.",
        quantize_pixart,
    ),
    Workflow(
        "quantize-text-encoder",
        "Text encoders from 16 to 4 bits",
        "Nothing has to be calibrated: the node reads the encoder's weights, a layer at a time, and writes the 4-bit "
        "file to models/text_encoders. This is Z-Image's, 8 GB that become 2.7; the encoders of Qwen-Image, FLUX.2, "
        "Wan, HiDream, Lumina 2 and FLUX.1 work the same. Then press R and open z-image-low-memory, or put SVDQuant "
        "Load Text Encoder in the place of CLIPLoader.",
        quantize_text_encoder,
    ),
    Workflow(
        "compare-flux",
        "16 and 4 bits side by side",
        "Both models draw from the same noise. The picture shows 16 bits, 4 bits and their difference around grey, "
        "four times enlarged; the report has PSNR, SSIM, times, memory and the layers that differ most. Make the 4-bit "
        "file with quantize-flux first, or choose a published one. Judge a model by several seeds, not by one.",
        compare_flux,
        made=((SCHNELL_FILE, SCHNELL_SIZE),),
    ),
)
