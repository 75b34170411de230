"""The main job in a real ComfyUI, through its API: a 4-bit file goes in, the right picture comes out, every time."""

from __future__ import annotations

import io
import json
import math
import shutil
import struct
import threading
import time

import pytest

from svdquant_nodes.tools.commands.compare_pictures import demo_prompt, with_files
from svdquant_nodes.tools.host.client import PromptFailed, PromptInterrupted, PromptRefused
from svdquant_nodes.tools.host.places import ROOT

DEMO = json.loads((ROOT / "workflows" / "api" / "demo.json").read_text())
INT4 = ROOT / "demo" / "diffusion_models" / "svdquant-demo-int4.safetensors"
HINT = {"width": 64, "height": 64, "batch_size": 1, "color": 0x3366CC}
NODE = {node["class_type"]: name for name, node in DEMO.items()}


def demo(**changes):
    """The demo prompt with some inputs changed: demo(SVDQuantSample={"steps": 4}) and a name that no cache knows."""
    prompt = json.loads(json.dumps(DEMO))
    for node, inputs in changes.items():
        prompt[NODE[node]]["inputs"] |= inputs
    return prompt


def with_stock_loader(prompt, file="svdquant-demo-bf16.safetensors"):
    """The same prompt on the 16-bit model through ComfyUI's own loader."""
    prompt[NODE["SVDQuantLoadModel"]] = {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": file, "weight_dtype": "default"},
    }
    return prompt


def with_stock_lora(prompt, strength):
    node = prompt[NODE["SVDQuantApplyLora"]]
    lora = {
        "lora_name": node["inputs"]["lora_name"],
        "strength_model": strength,
        "model": node["inputs"]["model"],
    }
    prompt[NODE["SVDQuantApplyLora"]] = {"class_type": "LoraLoaderModelOnly", "inputs": lora}
    return prompt


def picture(comfy, prompt):
    """The saved image as numbers 0..1."""
    import numpy as np
    from PIL import Image

    result = comfy.client.run(prompt)
    data = comfy.client.view(result.images()[0])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64) / 255


def psnr(a, b) -> float:
    error = float(((a - b) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


@pytest.fixture(scope="module")
def drawing(comfy):
    """The demo as it ships."""
    return picture(comfy, demo())


def test_the_drawing_is_what_the_prompt_says(drawing):
    """A big yellow star at the center on a navy background: yellow in the middle, navy in the corners."""
    height, width, _ = drawing.shape
    red, green, blue = drawing[height // 2 - 8 : height // 2 + 8, width // 2 - 8 : width // 2 + 8].mean(
        (0, 1)
    )
    assert red > 0.7
    assert green > 0.6
    assert blue < 0.4
    corners = [
        drawing[y : y + 32, x : x + 32].mean((0, 1)) for y in (0, height - 32) for x in (0, width - 32)
    ]
    assert all(corner[2] > corner[0] + 0.1 and corner[2] < 0.5 for corner in corners)


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_4_bit_is_plainly_the_16_bit_drawing(comfy, seed):
    prompt = demo(SVDQuantSample={"seed": seed})
    ours, theirs = picture(comfy, prompt), picture(comfy, with_stock_loader(prompt))
    assert psnr(ours, theirs) > 25, "another drawing than the 16-bit model's"


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_8_bit_is_nearer_to_the_16_bit_drawing(comfy, seed):
    four = demo(SVDQuantSample={"seed": seed})
    eight = demo(SVDQuantSample={"seed": seed}, SVDQuantLoadModel={"activations": "8 bit"})
    exact = picture(comfy, with_stock_loader(demo(SVDQuantSample={"seed": seed})))
    assert psnr(picture(comfy, eight), exact) > psnr(picture(comfy, four), exact)


def test_4_bit_by_name_is_what_a_cpu_takes(comfy, drawing):
    prompt = demo(SVDQuantLoadModel={"activations": "4 bit"}, SaveImage={"filename_prefix": "four"})
    assert psnr(picture(comfy, prompt), drawing) == math.inf


def test_another_width_is_refused(comfy):
    with pytest.raises(PromptRefused, match="activations"):
        comfy.client.run(demo(SVDQuantLoadModel={"activations": "16 bit"}))


def test_progress_and_report(comfy):
    result = comfy.client.run(demo(SVDQuantSample={"seed": 101, "steps": 6}))
    sampled = [
        e.data for e in result.events if e.kind == "progress" and e.data["node"] == NODE["SVDQuantSample"]
    ]
    assert [data["value"] for data in sampled][-1] == 6
    assert all(data["max"] == 6 for data in sampled)
    (report,) = result.outputs[NODE["SVDQuantSample"]]["text"]
    assert report.startswith("6 steps, ")
    assert " on cpu" in report


def test_same_prompt_same_picture(comfy, drawing):
    again = demo(SaveImage={"filename_prefix": "again"})
    assert psnr(picture(comfy, again), drawing) == math.inf


def test_lora_changes_the_drawing_and_half_changes_it_less(comfy, drawing):
    full, half = (picture(comfy, demo(SVDQuantApplyLora={"strength": s})) for s in (1.0, 0.5))
    assert psnr(full, drawing) < 20
    assert psnr(half, drawing) > psnr(full, drawing) + 2


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.5])
def test_stock_lora_loader_draws_the_same(comfy, strength):
    prompt = demo(SVDQuantApplyLora={"strength": strength})
    assert psnr(picture(comfy, prompt), picture(comfy, with_stock_lora(prompt, strength))) == math.inf


def controlled(prompt):
    """The same prompt with a ControlNet on both its texts, by ComfyUI's own nodes."""
    sampled = prompt[NODE["SVDQuantSample"]]["inputs"]
    texts = {"positive": sampled["positive"], "negative": sampled["negative"]}
    how = {"control_net": ["net", 0], "image": ["hint", 0], "strength": 0.5}
    how |= {"start_percent": 0.0, "end_percent": 1.0, "vae": [NODE["SVDQuantDemoVAE"], 0]}
    sampled |= {"positive": ["steered", 0], "negative": ["steered", 1]}
    return prompt | {
        "net": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "small-flux.safetensors"}},
        "hint": {"class_type": "EmptyImage", "inputs": HINT},
        "steered": {"class_type": "ControlNetApplyAdvanced", "inputs": texts | how},
    }


def test_a_controlnet_steers_4_bits_as_it_steers_16(comfy, drawing):
    comfy.client.run({"1": {"class_type": "TestSmallControlNet", "inputs": {"family": "flux"}}})
    ours, theirs = (picture(comfy, controlled(prompt)) for prompt in (demo(), with_stock_loader(demo())))
    assert psnr(theirs, drawing) < 20
    assert psnr(ours, theirs) > 25


def test_lora_removed_is_the_first_drawing_again(comfy, drawing):
    picture(comfy, demo(SVDQuantApplyLora={"strength": 1.0}, SVDQuantSample={"seed": 55}))
    assert psnr(picture(comfy, demo(SaveImage={"filename_prefix": "removed"})), drawing) == math.inf


def test_two_loras_in_one_node_are_two_nodes_in_a_row(comfy):
    name = DEMO[NODE["SVDQuantApplyLora"]]["inputs"]["lora_name"]
    together = demo(
        SVDQuantApplyLora={"strength": 0.3, "more": "1", "more.lora_name_2": name, "more.strength_2": 0.4}
    )
    once = demo(SVDQuantApplyLora={"strength": 0.7})
    assert psnr(picture(comfy, together), picture(comfy, once)) > 45


def test_inspect_describes_the_file(comfy):
    prompt = {"1": {"class_type": "SVDQuantInspect", "inputs": {"model_name": INT4.name}}}
    (text,) = comfy.client.run(prompt).outputs["1"]["text"]
    assert text.startswith(f"{INT4.name}: nunchaku_v1, FLUX.1")
    assert "transformer_blocks.0.mlp_fc2" in text
    assert "shift 0.171875" in text
    assert "int4 layers on cpu: " in text


def test_interrupt_then_a_good_prompt(comfy, drawing):
    def stop_soon():
        time.sleep(1.0)
        comfy.client.interrupt()

    threading.Thread(target=stop_soon).start()
    with pytest.raises(PromptInterrupted):
        comfy.client.run(demo(SVDQuantSample={"steps": 2000, "seed": 202}))
    assert psnr(picture(comfy, demo(SaveImage={"filename_prefix": "after-interrupt"})), drawing) == math.inf


def _damage(name, path):
    data = bytearray(INT4.read_bytes())
    if name == "truncated":
        data = data[: len(data) // 2]
    elif name == "zip":
        data[:4] = b"PK\x03\x04"
    elif name == "pickle":
        data[:2] = b"\x80\x04"
    elif name == "lying-header":
        data[:8] = (2**40).to_bytes(8, "little")
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", ["truncated", "zip", "pickle", "lying-header", "16-bit"])
def test_a_bad_file_is_refused_in_one_sentence_before_anything_runs_and_the_next_prompt_works(
    comfy, drawing, damage
):
    folder = comfy.base_dir / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    bad = folder / f"bad-{damage}.safetensors"
    if damage == "16-bit":
        shutil.copy(INT4.with_name("svdquant-demo-bf16.safetensors"), bad)
    else:
        _damage(damage, bad)
    with pytest.raises(PromptRefused) as refusal:
        comfy.client.run(demo(SVDQuantLoadModel={"model_name": bad.name}))
    (error,) = refusal.value.details["node_errors"][NODE["SVDQuantLoadModel"]]["errors"]
    assert error["details"].startswith(f"model_name - {bad.name}: ")
    assert "\n" not in error["details"]
    assert len(error["details"]) < 400
    good = demo(SaveImage={"filename_prefix": f"after-{damage}"})
    assert psnr(picture(comfy, good), drawing) == math.inf


def test_a_path_outside_the_model_folders_is_refused(comfy):
    with pytest.raises(PromptRefused, match="model_name"):
        comfy.client.run(demo(SVDQuantLoadModel={"model_name": str(INT4)}))


def test_names_with_the_other_slash_or_from_another_folder_are_found(comfy, drawing):
    lora = {"lora_name": "flux\\svdquant-demo-lora.safetensors"}
    prompt = demo(SVDQuantLoadModel={"model_name": f"flux\\{INT4.name}"}, SVDQuantApplyLora=lora)
    assert psnr(picture(comfy, prompt), drawing) == math.inf


def test_guidance_without_a_negative_says_what_to_do(comfy):
    prompt = demo()
    del prompt[NODE["SVDQuantSample"]]["inputs"]["negative"]
    with pytest.raises(
        PromptFailed, match=r"cfg 2 needs a negative conditioning. Connect one or set cfg to 1"
    ):
        comfy.client.run(prompt)


def test_a_workflow_made_for_comfyui_nunchaku_runs(comfy, drawing):
    """Its loader is not installed here; the host puts ours in its place."""
    prompt = demo(SaveImage={"filename_prefix": "replaced"})
    prompt[NODE["SVDQuantLoadModel"]] = {
        "class_type": "NunchakuFluxDiTLoader",
        "inputs": {
            "model_path": INT4.name,
            "cache_threshold": 0,
            "attention": "nunchaku-fp16",
            "cpu_offload": "auto",
            "device_id": 0,
            "data_type": "bfloat16",
        },
        "_meta": {"title": "Nunchaku FLUX DiT Loader"},
    }
    assert psnr(picture(comfy, prompt), drawing) == math.inf


def test_the_comparing_command_gets_panels_and_a_report(comfy):
    prompt = with_files(demo_prompt(), "svdquant-demo-bf16.safetensors", INT4.name)
    result = comfy.client.run(prompt)
    panels = [struct.unpack(">II", comfy.client.view(image)[16:24]) for image in result.images()]
    assert panels == [(3 * 64, 64)] * 4
    [report] = [text for output in result.outputs.values() for text in output.get("text", ())]
    assert "mean: PSNR" in report and "LPIPS" in report and "output error" in report
