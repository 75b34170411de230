"""SDXL, Qwen-Image, Z-Image and PixArt-Sigma."""

from __future__ import annotations

from .flux import AE, T5
from .graph import (
    File,
    Graph,
    Link,
    Workflow,
    empty_latent,
    hub,
    load_clip,
    load_image,
    load_model,
    load_vae,
    lora,
    node,
    picture,
    prompt,
    published,
    sample,
)

SDXL = published("sdxl-int4", 2.6)
TURBO = published("sdxl-turbo-int4", 2.6)
SDXL_16 = hub("stabilityai/stable-diffusion-xl-base-1.0/sd_xl_base_1.0.safetensors", "checkpoints", 6.9)
TURBO_16 = hub("stabilityai/sdxl-turbo/sd_xl_turbo_1.0_fp16.safetensors", "checkpoints", 6.9)
SDXL_VAE = hub("stabilityai/sdxl-vae/sdxl_vae.safetensors", "vae", 0.34)

QWEN = published("qwen-image-r32-int4", 11.5)
EDIT = published("qwen-image-edit-2509-r32-int4", 11.5)
_QWEN_FILES = "Comfy-Org/Qwen-Image_ComfyUI/split_files"
QWEN_CLIP = hub(f"{_QWEN_FILES}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors", "text_encoders", 9.4)
QWEN_VAE = hub(f"{_QWEN_FILES}/vae/qwen_image_vae.safetensors", "vae", 0.25)
_LIGHTNING = "lightx2v/Qwen-Image-Lightning"
EIGHT_STEPS = hub(f"{_LIGHTNING}/Qwen-Image-Lightning-8steps-V1.0.safetensors", "loras", 1.7)
FOUR_STEPS = hub(
    f"{_LIGHTNING}/Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",
    "loras",
    0.85,
)

Z_IMAGE = published("z-image-turbo-r32-int4", 3.6)
QWEN_3 = hub("Comfy-Org/z_image_turbo/split_files/text_encoders/qwen_3_4b.safetensors", "text_encoders", 8.0)

QWEN_3_FILE, QWEN_3_SIZE = "qwen-3-4b-int4.safetensors", 2.7
PIXART_FILE, PIXART_SIZE = "pixart-sigma-int4.safetensors", 0.5


def _sdxl(model: File, checkpoint: File, size: int, text: str, prefix: str, **settings) -> Graph:
    """CLIP and VAE come from the family's 16-bit checkpoint, whose own model stays unused."""
    return {
        "model": load_model(model, "4-bit model"),
        "checkpoint": node(
            "CheckpointLoaderSimple", (0, 210, 120), "CLIP and VAE", [checkpoint], ckpt_name=checkpoint.name
        ),
        "prompt": node("CLIPTextEncode", (1, 0, 190), "Prompt", clip=Link("checkpoint", 1), text=text),
        "negative": node("CLIPTextEncode", (1, 270, 190), "Negative", clip=Link("checkpoint", 1), text=""),
        "latent": empty_latent(size, size, "EmptyLatentImage", 540),
        "sample": sample("model", negative=Link("negative"), **settings),
        "decode": node("VAEDecode", (3, 0, 80), samples=Link("sample"), vae=Link("checkpoint", 2)),
        "save": node("SaveImage", (3, 160, 420), images=Link("decode"), filename_prefix=f"svdquant-{prefix}"),
    }


def sdxl() -> Graph:
    text = "portrait of an old sailor, weathered face, window light, 85 mm"
    settings = dict(steps=25, cfg=6.0, sampler="dpmpp_2m", scheduler="karras")
    return _sdxl(SDXL, SDXL_16, 1024, text, "sdxl", **settings)


def sdxl_turbo() -> Graph:
    settings = dict(steps=4, sampler="euler_ancestral", scheduler="sgm_uniform")
    return _sdxl(TURBO, TURBO_16, 512, "a fox in the snow, macro photograph", "sdxl-turbo", **settings)


def _shifted(by: float, model: str = "model") -> Graph:
    return {"shift": node("ModelSamplingAuraFlow", (2, 560, 80), model=Link(model), shift=by)}


def qwen_image() -> Graph:
    text = 'a shop window at night, a neon sign that says "4 bits", rain on the glass'
    return {
        "model": load_model(QWEN),
        "clip": load_clip(QWEN_CLIP, "qwen_image"),
        "vae": load_vae(QWEN_VAE),
        "prompt": prompt(text),
        "negative": prompt("", 270, "Negative"),
        "latent": empty_latent(1328, 1328, top=540),
        **_shifted(3.1),
        "sample": sample("shift", cfg=4.0, negative=Link("negative")),
        **picture("qwen-image"),
    }


def qwen_image_lightning() -> Graph:
    nodes = qwen_image() | {"lora": lora(EIGHT_STEPS)} | _shifted(3.0, "lora")
    nodes["sample"] = sample("shift", steps=8, negative=Link("negative"))
    return nodes


def qwen_image_edit() -> Graph:
    def encode(text: str, top: int, title: str):
        values = dict(clip=Link("clip"), vae=Link("vae"), image1=Link("scale"), prompt=text)
        return node("TextEncodeQwenImageEditPlus", (1, top, 210), title, **values)

    return {
        "model": load_model(EDIT),
        "clip": load_clip(QWEN_CLIP, "qwen_image"),
        "vae": load_vae(QWEN_VAE),
        "image": load_image("The image to edit"),
        "lora": lora(FOUR_STEPS),
        "scale": node("FluxKontextImageScale", (1, 560, 60), image=Link("image")),
        "latent": node("VAEEncode", (1, 700, 80), pixels=Link("scale"), vae=Link("vae")),
        "prompt": encode("Replace the background with a sunny beach", 0, "What to change"),
        "negative": encode("", 280, "Negative (empty)"),
        **_shifted(3.0, "lora"),
        "sample": sample("shift", steps=4, negative=Link("negative")),
        **picture("qwen-image-edit"),
    }


def z_image() -> Graph:
    text = "a tea house in a bamboo grove after the rain, photograph, shallow depth of field"
    return {
        "model": load_model(Z_IMAGE),
        "clip": load_clip(QWEN_3, "lumina2"),
        "vae": load_vae(AE),
        "prompt": prompt(text),
        "latent": empty_latent(1024, 1024, top=270),
        **_shifted(3.0),
        "sample": sample("shift", steps=8, sampler="res_multistep"),
        **picture("z-image"),
    }


def z_image_low_memory() -> Graph:
    """The text encoder in 4 bits as well."""
    nodes = z_image()
    nodes["clip"] = node(
        "SVDQuantLoadTextEncoder",
        (0, 210, 180),
        "4-bit encoder, from quantize-text-encoder",
        text_encoder1=QWEN_3_FILE,
        text_encoder2="none",
        text_encoder3="none",
        type="lumina2",
        t5_min_length=0,
        device="default",
        text_encoder4="none",
    )
    return nodes


def pixart() -> Graph:
    return {
        "model": node(
            "SVDQuantLoadModel",
            (0, 0, 130),
            "4-bit model, from quantize-pixart-sigma",
            model_name=PIXART_FILE,
            activations="auto",
        ),
        "clip": load_clip(T5, "pixart"),
        "vae": load_vae(SDXL_VAE),
        "prompt": prompt("a paper boat on a puddle, reflections of city lights"),
        "negative": prompt("", 270, "Negative"),
        "latent": empty_latent(1024, 1024, "EmptyLatentImage", 540),
        "sample": sample("model", cfg=4.5, scheduler="normal", negative=Link("negative")),
        **picture("pixart-sigma"),
    }


WORKFLOWS = (
    Workflow(
        "sdxl",
        "SDXL, text to image",
        "SDXL's transformer layers in 4 bits; convolutions stay 16-bit. CLIP and VAE come from the ordinary SDXL "
        "checkpoint, and so does nothing else: any SDXL checkpoint you have will do. For a LoRA with a text encoder "
        "part put ComfyUI's Load LoRA between model, CLIP and the rest.",
        sdxl,
    ),
    Workflow(
        "sdxl-turbo",
        "SDXL-Turbo, one to four steps",
        "SDXL-Turbo draws 512 x 512 pixels in one to four steps, without guidance: cfg stays 1. CLIP and VAE come from "
        "the 16-bit checkpoint. More steps make it sharper up to four, and no better after that.",
        sdxl_turbo,
    ),
    Workflow(
        "qwen-image",
        "Qwen-Image, text to image",
        "Qwen-Image follows long prompts and writes text in pictures; put the words in quotes. Cfg 4 draws every step "
        "twice; the template qwen-image-lightning does without. On an RTX 50 choose the fp4 file. The text encoder is "
        "the largest file here and leaves the GPU before sampling.",
        qwen_image,
    ),
    Workflow(
        "qwen-image-lightning",
        "Qwen-Image in eight steps, by a LoRA",
        "The Lightning LoRA makes eight steps enough, without guidance: a picture in a fifth of the time. It joins the "
        "4-bit model as additional rank, so one checkpoint serves both. The files with lightning in their names have "
        "such a LoRA built in: with those, take the LoRA node out.",
        qwen_image_lightning,
    ),
    Workflow(
        "qwen-image-edit",
        "Qwen-Image-Edit-2509, four steps",
        "Choose an image and say what should change. The node for the text also takes a second and a third image, for "
        "instance a face and a dress. The Lightning LoRA makes four steps enough; without it use 20 steps and cfg 4.",
        qwen_image_edit,
    ),
    Workflow(
        "z-image-turbo",
        "Z-Image-Turbo, eight steps",
        "Z-Image-Turbo draws in eight steps and fits the smallest cards. Its text encoder is a language model: write "
        "whole sentences. On an RTX 50 choose the fp4 file. LoRAs of all trainers work, those with fused and those "
        "with separate q, k and v.",
        z_image,
    ),
    Workflow(
        "z-image-low-memory",
        "Z-Image-Turbo with a 4-bit text encoder",
        "As z-image-turbo, but its language model takes 2.7 GB instead of 8. Nobody publishes one in 4 bits, so make "
        "it first: quantize-text-encoder does, in minutes. Then press R to refresh the lists, and run this one. How "
        "much pictures change by it nobody has measured yet: compare a few with those of z-image-turbo.",
        z_image_low_memory,
        made=((QWEN_3_FILE, QWEN_3_SIZE),),
    ),
    Workflow(
        "pixart-sigma",
        "PixArt-Sigma, text to image",
        "Nobody publishes a 4-bit PixArt-Sigma, so make it first: the template quantize-pixart-sigma does. Then press "
        "R to refresh the lists, and run this one. It is the smallest model here.",
        pixart,
        made=((PIXART_FILE, PIXART_SIZE),),
    ),
)
