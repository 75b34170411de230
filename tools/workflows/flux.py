"""FLUX.1: text to image, a LoRA, four steps, editing, filling, a ControlNet."""

from __future__ import annotations

from .graph import (
    File,
    Graph,
    Link,
    Workflow,
    empty_latent,
    hub,
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

DEV = published("flux.1-dev-int4", 6.8)
SCHNELL = published("flux.1-schnell-int4", 6.8)
KONTEXT = published("flux.1-kontext-dev-int4", 6.8)
FILL = published("flux.1-fill-dev-int4", 6.8)
CLIP_L = hub("comfyanonymous/flux_text_encoders/clip_l.safetensors", "text_encoders", 0.25)
T5 = hub("comfyanonymous/flux_text_encoders/t5xxl_fp8_e4m3fn.safetensors", "text_encoders", 4.9)
T5_4_BIT = published("t5xxl-int4", 3.0)
AE = hub("Comfy-Org/Lumina_Image_2.0_Repackaged/split_files/vae/ae.safetensors", "vae", 0.34)
REALISM = hub("XLabs-AI/flux-lora-collection/realism_lora_comfy_converted.safetensors", "loras", 0.02)
CANNY = hub("XLabs-AI/flux-controlnet-collections/flux-canny-controlnet-v3.safetensors", "controlnet", 1.5)


def text_encoders() -> Graph:
    """CLIP-L and T5, and the VAE."""
    values = dict(clip_name1=CLIP_L.name, clip_name2=T5.name, type="flux", device="default")
    return {
        "clip": node("DualCLIPLoader", (0, 210, 180), files=[CLIP_L, T5], **values),
        "vae": load_vae(AE),
    }


def _text_to_image(model: File, text: str, prefix: str, **settings) -> Graph:
    return {
        "model": load_model(model),
        **text_encoders(),
        "prompt": prompt(text, 200),
        "latent": empty_latent(1024, 1024),
        "sample": sample("model", **settings),
        **picture(prefix),
    }


def dev() -> Graph:
    text = "a lighthouse on a cliff at dawn, long exposure, film grain"
    return _text_to_image(DEV, text, "flux", steps=28)


def low_memory() -> Graph:
    """The text encoder in 4 bits as well, a smaller picture, and tiles for the VAE."""
    nodes = dev()
    nodes["clip"] = node(
        "SVDQuantLoadTextEncoder",
        (0, 210, 180),
        files=[T5_4_BIT, CLIP_L],
        text_encoder1=T5_4_BIT.name,
        text_encoder2=CLIP_L.name,
        text_encoder3="none",
        type="flux",
        t5_min_length=0,
        device="default",
        text_encoder4="none",
    )
    nodes["latent"] = empty_latent(768, 768)
    nodes["decode"] = node(
        "VAEDecodeTiled",
        (3, -100, 180),
        samples=Link("sample"),
        vae=Link("vae"),
        tile_size=512,
        overlap=64,
        temporal_size=64,
        temporal_overlap=8,
    )
    return nodes


def dev_lora() -> Graph:
    nodes = dev()
    nodes["lora"] = lora(REALISM, 0.8, (1, -80, 200))
    nodes["sample"].inputs["model"] = Link("lora")
    return nodes


def schnell() -> Graph:
    text = "a small robot waters tomatoes on a balcony, morning sun, soft shadows"
    return _text_to_image(SCHNELL, text, "schnell", steps=4)


def kontext() -> Graph:
    """The image is both what the model looks at and the size of what it draws."""
    nodes = _text_to_image(KONTEXT, "Make it a rainy night, keep everything else", "kontext", guidance=2.5)
    nodes["image"] = load_image("The image to edit")
    nodes["scale"] = node("FluxKontextImageScale", (1, 480, 60), image=Link("image"))
    nodes["latent"] = node("VAEEncode", (1, 620, 80), pixels=Link("scale"), vae=Link("vae"))
    nodes["reference"] = node(
        "ReferenceLatent", (1, 780, 80), conditioning=Link("prompt"), latent=Link("latent")
    )
    nodes["sample"].inputs["positive"] = Link("reference")
    return nodes


def fill() -> Graph:
    nodes = _text_to_image(FILL, "a red balloon in the sky", "fill", guidance=30.0)
    nodes["image"] = load_image("The image: right click, Open in MaskEditor")
    nodes["empty"] = node("ConditioningZeroOut", (1, 480, 60), conditioning=Link("prompt"))
    nodes["latent"] = node(
        "InpaintModelConditioning",
        (1, 620, 170),
        positive=Link("prompt"),
        negative=Link("empty"),
        vae=Link("vae"),
        pixels=Link("image"),
        mask=Link("image", 1),
        noise_mask=True,
    )
    nodes["soft"] = node("DifferentialDiffusion", (1, 0, 80), model=Link("model"), strength=1.0)
    changed = dict(model=Link("soft"), positive=Link("latent"), latent=Link("latent", 2))
    nodes["sample"].inputs.update(changed)
    return nodes


def controlnet() -> Graph:
    text = "a glass house in a pine forest, golden hour"
    nodes = _text_to_image(DEV, text, "controlnet", steps=28)
    nodes["image"] = load_image("The image whose edges are kept")
    nodes["edges"] = node("Canny", (1, 700, 110), image=Link("image"), low_threshold=0.2, high_threshold=0.4)
    nodes["control"] = node("ControlNetLoader", (1, 880, 80), files=[CANNY], control_net_name=CANNY.name)
    nodes["empty"] = node("ConditioningZeroOut", (1, 0, 60), conditioning=Link("prompt"))
    nodes["apply"] = node(
        "ControlNetApplyAdvanced",
        (2, 560, 210),
        positive=Link("prompt"),
        negative=Link("empty"),
        control_net=Link("control"),
        image=Link("edges"),
        vae=Link("vae"),
        strength=0.7,
        start_percent=0.0,
        end_percent=0.8,
    )
    nodes["sample"].inputs["positive"] = Link("apply")
    return nodes


_FP4 = "On an RTX 50 choose the fp4 file instead of the int4 one; both run on every card."

WORKFLOWS = (
    Workflow(
        "flux1-dev",
        "FLUX.1-dev, text to image",
        "Text to image with FLUX.1-dev in 4 bits. SVDQuant Sample is KSampler with FLUX guidance built in; KSampler "
        f"works as well. {_FP4} With less than 12 GB of VRAM ComfyUI keeps a part of the model in RAM by itself.",
        dev,
    ),
    Workflow(
        "flux1-low-memory",
        "FLUX.1-dev on a small card",
        "FLUX.1-dev with its text encoder in 4 bits, too: less to download, and less RAM. The picture is smaller and "
        "decoded in tiles. What still does not fit on the card ComfyUI keeps in RAM by itself. If the text encoder is "
        "what does not fit, set its device to cpu.",
        low_memory,
    ),
    Workflow(
        "flux1-dev-lora",
        "FLUX.1-dev with a LoRA",
        "A LoRA joins the 4-bit model as additional rank: no conversion, no requantizing, and strength 0 is exactly "
        "the model without it. Choose any FLUX LoRA, in any trainer's naming. The node reports what matched. "
        "ComfyUI's own LoRA loaders do the same.",
        dev_lora,
    ),
    Workflow(
        "flux1-schnell",
        "FLUX.1-schnell, four steps",
        f"FLUX.1-schnell draws in four steps and needs no guidance. {_FP4} LoRAs for FLUX.1-dev mostly work here, too: "
        "put SVDQuant Apply LoRA between model and sampler.",
        schnell,
    ),
    Workflow(
        "flux1-kontext",
        "FLUX.1-Kontext, editing an image",
        "Choose an image and say in the prompt what should change and what should stay. The picture comes out in the "
        f"size of the image, scaled to about one megapixel. {_FP4}",
        kontext,
    ),
    Workflow(
        "flux1-fill",
        "FLUX.1-Fill, painting into a mask",
        "Choose an image, right click on it, open the MaskEditor and paint over what should be new. The prompt says "
        f"what appears there. Fill wants a guidance of about 30. {_FP4}",
        fill,
    ),
    Workflow(
        "flux1-controlnet",
        "FLUX.1-dev with a ControlNet",
        "The edges of an image steer FLUX.1-dev through a ControlNet. Nothing in it is special to 4 bits: the model is "
        "an ordinary ComfyUI model. Any FLUX ControlNet that ComfyUI loads can take this one's place. Lower the "
        "strength where the picture sticks to the edges too much.",
        controlnet,
    ),
)
