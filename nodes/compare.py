"""The node that shows what quantization changed: pictures, numbers, and the linears that differ most."""

from __future__ import annotations

from comfy_api.latest import io

from ..svdquant.adapters import sampling
from ..svdquant.adapters.quantizing import compare as host
from ..svdquant.quantizer import compare
from ..svdquant.quantizer.statistics import Statistics
from .reported import reported
from .sample import SETTINGS

ROWS = 256  # input rows kept of a linear
WORST = 5  # linears named in the report


class SVDQuantCompare(io.ComfyNode):
    """Two MODELs in, panels and a report out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantCompare",
            display_name="SVDQuant Compare",
            category="SVDQuant/quantize",
            search_aliases=["compare models", "psnr", "ssim", "quality", "quantization error"],
            description=(
                "Sample a 16-bit model and its 4-bit form from the same noise: panels with the difference, PSNR, SSIM, "
                "time, memory, and the linears that differ most."
            ),
            inputs=[
                io.Model.Input("model_16bit", tooltip="The original."),
                io.Model.Input("model_4bit", tooltip="From SVDQuant Load Model."),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Latent.Input("latent", tooltip="An empty latent; a batch is compared picture by picture."),
                io.Vae.Input("vae", tooltip="Decodes both."),
                *SETTINGS,
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to steer away from; needed when cfg is not 1."
                ),
            ],
            outputs=[
                io.Image.Output(
                    tooltip="16-bit, 4-bit, and their difference around grey, four times enlarged."
                ),
                io.String.Output("report", display_name="report", tooltip="All numbers."),
            ],
        )

    @classmethod
    def execute(
        cls, model_16bit, model_4bit, positive, latent, vae, negative=None, **settings
    ) -> io.NodeOutput:
        seen = Statistics(ROWS)
        scene = vae, positive, negative, latent, sampling.Settings(**settings, denoise=1.0)
        exact = host.draw(host.watched_clone(model_16bit, seen.see), *scene)
        near = host.draw(model_4bit, *scene)
        inputs = {name: sample.rows for name, sample in seen.items()}
        text = report(exact, near, host.layer_errors(model_16bit, model_4bit, inputs))
        panels = compare.panel(near.images, exact.images)
        return reported(panels, text, text=text)


def report(exact: host.Drawn, near: host.Drawn, errors: dict[str, float]) -> str:
    """PSNR and SSIM by picture, LPIPS where it is installed, both samplers' reports, the worst linears."""
    psnr, ssim = (measure(near.images, exact.images) for measure in (compare.psnr, compare.ssim))
    lines = [
        f"picture {i}: PSNR {p:.2f} dB, SSIM {s:.4f}"
        for i, (p, s) in enumerate(zip(psnr, ssim, strict=True), 1)
    ]
    lines.append(f"mean: PSNR {psnr.mean():.2f} dB, SSIM {ssim.mean():.4f}")
    far = compare.lpips(near.images, exact.images)
    lines.append("LPIPS: not installed" if far is None else f"mean: LPIPS {far.mean():.4f}")
    lines += [f"16-bit: {exact.report}", f"4-bit: {near.report}"]
    for name, error in list(errors.items())[:WORST]:
        lines.append(f"{name}: output error {100 * error:.2f} %")
    return "\n".join(lines)
