"""Draw with a 16-bit model and its 4-bit form in a ComfyUI of its own, and fetch the panels and the report."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ..host import client, install, places, restart, server, steps

COMPARE, LOADERS = "SVDQuantCompare", {"UNETLoader": "unet_name", "SVDQuantLoadModel": "model_name"}
OTHERS = ("text_encoders", "clip", "vae")  # folders of models that a workflow may want besides
FAILURES = (places.SetupError, client.PromptRefused, client.PromptFailed, client.PromptInterrupted)


def draw(
    source: Path, made: Path, out: Path, *, workflow: Path | None, models: Path | None, device: str
) -> str:
    """Save a picture of panels for every drawing: 16-bit, 4-bit, difference. Returns the node's report.

    out       the PNG to write; of a batch the second is NAME-2.png
    workflow  in API form, with a SVDQuantCompare; None: the demo model's
    models    a ComfyUI's models folder, for text encoders and VAE
    device    cpu, or auto for what ComfyUI finds

    Raises ValueError where the host cannot be started or the workflow fails.
    """
    prompt = client.read_prompt(workflow) if workflow else demo_prompt()
    prompt = with_files(prompt, source.name, made.name)
    progress = steps.Steps()
    try:
        restart.restart_in(install.ensure_python(progress), progress)
        host = install.ensure_host(places.NEWEST, progress)
        with tempfile.TemporaryDirectory(prefix="svdquant-compare-") as base:
            link_models(Path(base, "models"), (source, made), models)
            with server.ComfyServer(host, Path(base), device=device) as comfy:
                result = comfy.client.run(prompt)
                pictures = [comfy.client.view(image) for image in result.images()]
    except FAILURES as failure:
        raise ValueError(f"compare: {failure}") from None
    for i, picture in enumerate(pictures):
        (out if i == 0 else out.with_name(f"{out.stem}-{i + 1}{out.suffix}")).write_bytes(picture)
    return "\n".join(line for output in result.outputs.values() for line in output.get("text", ()))


def with_files(prompt: dict[str, Any], source: str, made: str) -> dict[str, Any]:
    """The workflow with these two files in its loaders, and its panels saved. ValueError where it compares nothing."""
    by_class = {node["class_type"]: key for key, node in prompt.items()}
    if missing := [name for name in (COMPARE, *LOADERS) if name not in by_class]:
        raise ValueError(
            f"--workflow: expected a node {missing[0]} in it, got none. Start from compare-flux.json."
        )
    filled = json.loads(json.dumps(prompt))
    for (kind, name), file in zip(LOADERS.items(), (source, made), strict=True):
        filled[by_class[kind]]["inputs"][name] = file
    return filled


def link_models(folder: Path, models: tuple[Path, ...], others: Path | None) -> None:
    """Show a host the two models, and the text encoders and VAEs of another one."""
    (folder / "diffusion_models").mkdir(parents=True)
    for path in models:
        (folder / "diffusion_models" / path.name).symlink_to(path.resolve())
    for kind in OTHERS if others else ():
        if (others / kind).is_dir():
            (folder / kind).symlink_to((others / kind).resolve(), target_is_directory=True)


def demo_prompt() -> dict[str, Any]:
    """Four drawings by the demo model."""
    settings = dict(seed=7, steps=20, cfg=2.0, guidance=3.5, sampler="euler", scheduler="simple")
    text = "a big yellow star at the center on a navy background"
    nodes = {
        "exact": ("UNETLoader", dict(unet_name="", weight_dtype="default")),
        "made": ("SVDQuantLoadModel", dict(model_name="", activations="4 bit")),
        "prompt": ("SVDQuantDemoPrompt", dict(text=text)),
        "empty": ("SVDQuantDemoPrompt", dict(text="")),
        "latent": ("EmptySD3LatentImage", dict(width=64, height=64, batch_size=4)),
        "vae": ("SVDQuantDemoVAE", {}),
        "compare": (
            COMPARE,
            dict(
                model_16bit=["exact", 0],
                model_4bit=["made", 0],
                positive=["prompt", 0],
                negative=["empty", 0],
            )
            | dict(latent=["latent", 0], vae=["vae", 0])
            | settings,
        ),
        "save": ("SaveImage", dict(images=["compare", 0], filename_prefix="compare")),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def default_models() -> Path | None:
    """The models folder of the ComfyUI that COMFYUI_PATH names."""
    host = places.users_host()
    return host.tree / "models" if host else None
