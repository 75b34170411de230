"""Two nodes for the demo model that ships with the pack: words in, pixels out."""

from __future__ import annotations

from comfy_api.latest import io

from ..svdquant.adapters import demo

CATEGORY = "SVDQuant/demo"


class SVDQuantDemoPrompt(io.ComfyNode):
    """Words to CONDITIONING, for the demo model only."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantDemoPrompt",
            display_name="SVDQuant Demo Prompt",
            category=CATEGORY,
            search_aliases=["svdquant demo", "shapes"],
            description=f"Demo only: turn a sentence like “{demo.GRAMMAR}” into conditioning for the tiny demo model.",
            inputs=[
                io.String.Input(
                    "text",
                    default="a big yellow star at the center on a navy background",
                    multiline=True,
                    tooltip=f"{demo.GRAMMAR}. Words: "
                    + "; ".join(f"{slot}: {', '.join(words)}" for slot, words in demo.WORDS.items()),
                )
            ],
            outputs=[
                io.Conditioning.Output(tooltip="For the demo model; other models need a real text encoder.")
            ],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        context, pooled = demo.encode_prompt(text)
        return io.NodeOutput([[context, {"pooled_output": pooled}]])


class SVDQuantDemoVAE(io.ComfyNode):
    """The demo model's VAE, for the stock VAE Decode."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantDemoVAE",
            display_name="SVDQuant Demo VAE",
            category=CATEGORY,
            search_aliases=["svdquant demo"],
            description="Demo only: the linear VAE of the tiny demo model (13 KB), for VAE Decode and VAE Encode.",
            inputs=[],
            outputs=[io.Vae.Output(tooltip="For the demo model only.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(demo.load_vae())
