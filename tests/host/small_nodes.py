"""Custom nodes for the tests' ComfyUI: files of small models, and what to sample them with. Not a part of the pack."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io, ui
from safetensors.torch import load_file, save_file


def _name_the_pack() -> None:
    """Give the tests' modules the names they have under pytest; those read here import loaders and core alone."""
    file = Path(__file__).resolve().parents[2] / "tools" / "pack.py"
    spec = importlib.util.spec_from_file_location("pack", file)
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    pack.alias()


_name_the_pack()
from svdquant_nodes.tests import small_controlnets, small_encoders  # noqa: E402
from svdquant_nodes.tests.inside_host import publishers  # noqa: E402
from svdquant_nodes.tests.small_models import SMALL, detecting, detecting_t5, prompt, random_weights  # noqa: E402

ALWAYS = contextlib.ExitStack()  # as long as this process lives
ALWAYS.enter_context(detecting())
ALWAYS.enter_context(detecting_t5())
QWEN3 = small_encoders.narrow("z-image", width=SMALL["z-image"].text)
ALWAYS.enter_context(small_encoders.detecting(QWEN3))


class TestSmallModel(io.ComfyNode):
    """The 16-bit file of a family's small model, small-FAMILY-SEED."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Combo.Input("family", options=list(SMALL)), io.Int.Input("seed")]
        return io.Schema(node_id="TestSmallModel", inputs=inputs, is_output_node=True)

    @classmethod
    def execute(cls, family: str, seed: int) -> io.NodeOutput:
        return written("diffusion_models", f"small-{family}-{seed}", SMALL[family].tensors(seed))


class TestPublishedModel(io.ComfyNode):
    """Its 4-bit file as others publish it, without branch or smoothing: published-CASE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Combo.Input("case", options=list(publishers.CASES))]
        return io.Schema(node_id="TestPublishedModel", inputs=inputs, is_output_node=True)

    @classmethod
    def execute(cls, case: str) -> io.NodeOutput:
        path, (family, *_) = place("diffusion_models", f"published-{case}"), publishers.CASES[case]
        publishers.write(case, path, random_weights(SMALL[family].model()))
        return io.NodeOutput(ui=ui.PreviewText(path.name))


class TestSmallControlNet(io.ComfyNode):
    """The file of a ControlNet for it, small-FAMILY."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Combo.Input("family", options=list(small_controlnets.CASES))]
        return io.Schema(node_id="TestSmallControlNet", inputs=inputs, is_output_node=True)

    @classmethod
    def execute(cls, family: str) -> io.NodeOutput:
        return written("controlnet", f"small-{family}", small_controlnets.tensors(family))


def place(kind: str, name: str) -> Path:
    path = Path(folder_paths.models_dir) / kind / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    return path


def written(kind: str, name: str, tensors: dict[str, torch.Tensor]) -> io.NodeOutput:
    path = place(kind, name)
    save_file(tensors, path)
    return io.NodeOutput(ui=ui.PreviewText(path.name))


class TestSmallPrompt(io.ComfyNode):
    """Random text of the family's widths."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Combo.Input("family", options=list(SMALL)), io.Int.Input("seed")]
        return io.Schema(node_id="TestSmallPrompt", inputs=inputs, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, family: str, seed: int) -> io.NodeOutput:
        return io.NodeOutput(prompt(SMALL[family], torch.Generator().manual_seed(seed)))


class TestSmallVAE(io.ComfyNode):
    """Encodes the hint of a ControlNet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestSmallVAE", inputs=[io.Boolean.Input("video")], outputs=[io.Vae.Output()]
        )

    @classmethod
    def execute(cls, video: bool) -> io.NodeOutput:
        return io.NodeOutput(small_controlnets.LatentVAE(video))


class TestSmallModelPatch(io.ComfyNode):
    """Z-Image's ControlNet, which the host's own loader knows in one width only."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="TestSmallModelPatch", inputs=[], outputs=[io.ModelPatch.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model, device = small_controlnets.z_image(), comfy.model_management.get_torch_device()
        return io.NodeOutput(comfy.model_patcher.CoreModelPatcher(model, device, torch.device("cpu")))


class TestSmallT5(io.ComfyNode):
    """The host's own 16-bit T5 of whatever width the file has."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.String.Input("file_name")]
        return io.Schema(node_id="TestSmallT5", inputs=inputs, outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls, file_name: str) -> io.NodeOutput:
        state = load_file(Path(folder_paths.models_dir) / "text_encoders" / file_name)
        options = {"t5xxl_model_config": t5_sizes(state)}
        pixart = comfy.sd.CLIPType.PIXART
        return io.NodeOutput(
            comfy.sd.load_text_encoder_state_dicts([state], clip_type=pixart, model_options=options)
        )


def t5_sizes(state: dict[str, torch.Tensor]) -> dict[str, int]:
    first = "encoder.block.0.layer."
    words, width = state["shared.weight"].shape
    heads = state[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape[1]
    inner, hidden = (
        state[first + name].shape[0] for name in ("0.SelfAttention.q.weight", "1.DenseReluDense.wi_0.weight")
    )
    depth = sum(name.endswith("SelfAttention.q.weight") for name in state)
    return dict(
        **dict(vocab_size=words, d_model=width, num_heads=heads, d_kv=inner // heads),
        **dict(d_ff=hidden, num_layers=depth),
    )


class TestSmallEncoder(io.ComfyNode):
    """The 16-bit file of an encoder for the small Z-Image, small-qwen3-SEED, and the host's own CLIP of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Int.Input("seed")]
        outputs = [io.Clip.Output()]
        return io.Schema(node_id="TestSmallEncoder", inputs=inputs, outputs=outputs, is_output_node=True)

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        tensors = QWEN3.tensors(seed)
        save_file(tensors, place("text_encoders", f"small-qwen3-{seed}"))
        lumina2 = comfy.sd.CLIPType.LUMINA2
        return io.NodeOutput(
            comfy.sd.load_text_encoder_state_dicts(
                [tensors], clip_type=lumina2, model_options=QWEN3.settings()
            )
        )


class TestTextAsLatent(io.ComfyNode):
    """Text as numbers that the host's Save Latent writes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Conditioning.Input("text")]
        return io.Schema(node_id="TestTextAsLatent", inputs=inputs, outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, text: list) -> io.NodeOutput:
        return io.NodeOutput({"samples": text[0][0]})


class SmallNodes(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [value for name, value in globals().items() if name.startswith("Test")]


async def comfy_entrypoint() -> SmallNodes:
    return SmallNodes()
