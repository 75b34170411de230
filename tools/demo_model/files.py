"""Where the demo's files are, below the pack's `demo/` or any other folder given as --out.

The folders are called as ComfyUI calls its own, so that the host's file lists can show what is in them.
"""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "demo"
MODEL = Path("diffusion_models", "svdquant-demo-bf16.safetensors")
INT4 = Path("diffusion_models", "svdquant-demo-int4.safetensors")
LORA = Path("loras", "svdquant-demo-lora.safetensors")
VAE = Path("vae", "svdquant-demo-vae.safetensors")


def place(out: Path, name: Path) -> Path:
    """The path of a file to write; its folder is made."""
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
