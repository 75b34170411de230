"""The workflow that runs anywhere: the tiny model that ships with the pack."""

from __future__ import annotations

from .graph import Graph, Link, Workflow, node


def demo() -> Graph:
    star = "a big yellow star at the center on a navy background"
    return {
        "model": node(
            "SVDQuantLoadModel", (0, 0, 130), model_name="svdquant-demo-int4.safetensors", activations="auto"
        ),
        "lora": node(
            "SVDQuantApplyLora",
            (1, 0, 200),
            "Raise the strength to 1 to see the LoRA",
            model=Link("model"),
            lora_name="svdquant-demo-lora.safetensors",
            strength=0.0,
            more="0",
        ),
        "prompt": node("SVDQuantDemoPrompt", (1, 280, 160), "Prompt", text=star),
        "empty": node("SVDQuantDemoPrompt", (1, 520, 160), "Negative (empty)", text=""),
        "latent": node("EmptySD3LatentImage", (1, 760, 140), "64 x 64", width=64, height=64, batch_size=1),
        "sample": node(
            "SVDQuantSample",
            (2, 0, 480),
            model=Link("lora"),
            positive=Link("prompt"),
            negative=Link("empty"),
            latent=Link("latent"),
            seed=7,
            steps=20,
            cfg=2.0,
            guidance=3.5,
            sampler="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "vae": node("SVDQuantDemoVAE", (2, 560, 60)),
        "decode": node("VAEDecode", (3, 0, 80), samples=Link("sample"), vae=Link("vae")),
        "enlarge": node(
            "ImageScaleBy", (3, 160, 110), image=Link("decode"), upscale_method="nearest-exact", scale_by=8.0
        ),
        "save": node("SaveImage", (3, 350, 420), images=Link("enlarge"), filename_prefix="svdquant-demo"),
    }


WORKFLOWS = (
    Workflow(
        "demo",
        "the tiny model of the pack",
        "This runs on any machine, with nothing to download. The model is a tiny FLUX that draws one shape on "
        "64 x 64 pixels; the picture is enlarged. Change the prompt's shape (circle, square, triangle, ring, cross, "
        "star), color or place: point at the text to see all words. The LoRA starts at strength 0: raise it to 1 and "
        "run again.",
        demo,
        picture=("demo/drawings.png", (0, 128, 128, 256)),
    ),
)
