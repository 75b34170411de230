"""Every family as a user has it, through the API: watched, quantized, loaded, sampled, with a LoRA and a ControlNet.

The models are small and random, of the host's own classes; the nodes of small_nodes.py write their 16-bit files.
Everything is sampled in batches of two with guidance.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pytest

from svdquant_nodes.tests.host.small_graphs import Graph, model_file, node, on_small_model, saved, write_lora
from svdquant_nodes.tests.tolerances import TOLERANCES, distance


@dataclass(frozen=True)
class Case:
    """How a family is run.

    layout     the dialect its file is written in, as SVDQuant Inspect calls it
    lora       a strength that changes the picture by about a half
    pixels     side of a picture; PixArt's positions want more
    recipe     how it is quantized
    control    the kind of its ControlNet: a model beside it, a patch of it, or none in the host
    templates  its workflows that need no picture
    others     files as others publish them, cases of publishers.py in dialects that our quantizer does not write
    """

    layout: str
    lora: float
    pixels: int = 64
    recipe: str = "instant"
    control: str = ""
    templates: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


CASES = {
    "sdxl": Case("nunchaku_v1, SDXL", 2.0, control="net", templates=("sdxl", "sdxl-turbo")),
    "pixart-sigma": Case(
        "natural", 3.0, pixels=320, templates=("pixart-sigma",), others=("pixart-sigma-lite",)
    ),
    "qwen-image": Case(
        "nunchaku_v2, Qwen-Image",
        4.0,
        control="net",
        templates=("qwen-image", "qwen-image-lightning"),
        others=("qwen-image-kitchen",),
    ),
    "z-image": Case("nunchaku_v2, Z-Image", 2.5, control="patch", templates=("z-image-turbo",)),
    "chroma": Case("natural", 0.5, recipe="fast", others=("chroma-lite",)),
    "flux2": Case("natural", 4.0, others=("flux2-lite",)),
    "wan": Case("natural", 2.0),
}
CONTROLLED = [family for family, case in CASES.items() if case.control]
TEMPLATES = [family for family, case in CASES.items() if case.templates]
PUBLISHED = [family for family, case in CASES.items() if case.others]


@dataclass(frozen=True)
class Run:
    """What became of a family.

    file     the 4-bit file's name
    layers   root mean square of the errors of its linears' outputs, as the quantizer told them
    latents  what each model drew, [2, ...]
    """

    file: str
    layers: float
    latents: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=CASES)
def run(request, comfy):
    family, case = request.param, CASES[request.param]
    files = {str(seed): node("TestSmallModel", family=family, seed=seed) for seed in (0, 1)}
    if case.control == "net":
        files["net"] = node("TestSmallControlNet", family=family)
    files |= {other: node("TestPublishedModel", case=other) for other in case.others}
    comfy.client.run(files)
    write_lora(comfy.base_dir / "models", family)
    report = quantize(comfy, family, case)
    errors = [float(error) / 100 for error in re.findall(r"^  \S+ +(\S+) %$", report, re.MULTILINE)]
    layers = math.sqrt(sum(error**2 for error in errors) / len(errors))
    file = f"small-{family}-int4.safetensors"
    return Run(file, layers, saved(comfy, drawings(family, case, file).nodes))


def quantize(comfy, family, case):
    """Watch the 16-bit model while it samples, and make the 4-bit file; the node's report."""
    graph = Graph(family, case.pixels)
    watched, statistics = graph.add("SVDQuantCalibrate", model=graph.exact(), tokens=128, seed=0)[0], 1
    names = dict(source=model_file(family), file_name=f"small-{family}-int4")
    options = dict(precision="int4", rank=16, recipe=case.recipe, center=False, seed=0)
    seen = dict(statistics=[watched, statistics], after=graph.sample([watched, 0]))
    graph.nodes["quantize"] = node("SVDQuantQuantize", **names, **options, **seen)
    return comfy.client.run(graph.nodes).outputs["quantize"]["text"][0]


def drawings(family, case, file):
    """One prompt for all: the 4-bit model and the 16-bit one, each as it is, with the LoRA and with the ControlNet."""
    graph, lora = Graph(family, case.pixels), f"small-{family}.safetensors"
    quantized, exact = graph.add("SVDQuantLoadModel", model_name=file), graph.exact()
    for bits, model in (("4", quantized), ("16", exact)):
        graph.save(bits, graph.sample(model))
        patched = graph.add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=case.lora)
        graph.save(f"{bits} lora", graph.sample(patched))
        if case.control:
            graph.save(f"{bits} control", controlled(graph, case, model))
    ours = graph.add("SVDQuantApplyLora", model=quantized, lora_name=lora, strength=case.lora, more="0")
    graph.save("4 our lora", graph.sample(ours))
    for other in case.others:
        model = graph.add("SVDQuantLoadModel", model_name=f"published-{other}.safetensors")
        graph.save(other, graph.sample(model))
    graph.save("another", graph.sample(graph.exact(seed=1)))
    return graph


def controlled(graph, case, model):
    """Sampled with the family's ControlNet."""
    hint = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x3366CC)
    vae = graph.add("TestSmallVAE", video=case.control == "net")
    if case.control == "patch":
        patch = dict(model_patch=graph.add("TestSmallModelPatch"), vae=vae, image=hint, strength=0.5)
        return graph.sample(graph.add("ZImageFunControlnet", model=model, **patch))
    net = graph.add("ControlNetLoader", control_net_name=f"small-{graph.family}.safetensors")
    given = dict(control_net=net, image=hint, vae=vae, strength=0.5, start_percent=0.0, end_percent=1.0)
    positive, negative = graph.texts
    name, _ = graph.add("ControlNetApplyAdvanced", positive=positive, negative=negative, **given)
    return graph.sample(model, texts=([name, 0], [name, 1]))


def error(actual, expected):
    return distance(actual, expected).norm


def missed(drawn, what):
    """How far what changes the 4-bit model's picture is from what changes the 16-bit one's; no change at all is 1."""
    ours, theirs = (drawn[f"{bits} {what}"] - drawn[bits] for bits in ("4", "16"))
    return error(ours, theirs)


def test_the_file_is_in_its_familys_layout(comfy, run, request):
    case = CASES[request.node.callspec.params["run"]]
    told = comfy.client.run({"1": node("SVDQuantInspect", model_name=run.file)}).outputs["1"]["text"][0]
    assert told.startswith(f"{run.file}: {case.layout}")


def test_4_bit_draws_what_16_bit_draws(run):
    """As far off as its layers are: their errors add to one stream as noise does, and guidance of 2 doubles them."""
    assert 0.02 < run.layers < 0.2
    for ours, theirs, another in zip(*(run.latents[name] for name in ("4", "16", "another")), strict=True):
        assert 0.1 * run.layers < error(ours, theirs) < 3 * run.layers < error(ours, another)
    first, second = run.latents["16"]
    assert error(first, second) > 0.5, "a batch of one picture twice"


@pytest.mark.parametrize("run", PUBLISHED, indirect=True)
def test_files_of_other_dialects_draw_what_16_bits_draw(run, request):
    """Their linears are rounded to nearest, without branch and smoothing."""
    layers = math.hypot(TOLERANCES["int4_weight"].norm, TOLERANCES["int4_layer"].norm)
    for other in CASES[request.node.callspec.params["run"]].others:
        found = [error(run.latents[other], run.latents[name]) for name in ("16", "another")]
        assert 0.1 * layers < found[0] < 3 * layers < found[1]


@pytest.mark.parametrize("run", TEMPLATES, indirect=True)
def test_its_templates_draw_with_4_bits_what_16_draw(comfy, run, request):
    family, case = request.node.callspec.params["run"], CASES[request.node.callspec.params["run"]]
    loaders = [node("SVDQuantLoadModel", model_name=run.file)]
    loaders += [
        node("UNETLoader", unet_name=model_file(family, seed), weight_dtype="default") for seed in (0, 1)
    ]
    for template in case.templates:
        graphs = [on_small_model(template, family, loader, case.pixels) for loader in loaders]
        ours, theirs, another = (saved(comfy, graph)["save"] for graph in graphs)
        assert 0 < error(ours, theirs) < 3 * run.layers < error(ours, another), template


def test_a_lora_changes_4_bits_as_it_changes_16(run):
    drawn = run.latents
    assert error(drawn["16 lora"], drawn["16"]) > 0.3
    assert missed(drawn, "lora") < 0.8
    assert np.array_equal(drawn["4 our lora"], drawn["4 lora"])


@pytest.mark.parametrize("run", CONTROLLED, indirect=True)
def test_a_controlnet_steers_4_bits_as_it_steers_16(run):
    drawn = run.latents
    assert error(drawn["16 control"], drawn["16"]) > 0.1
    assert missed(drawn, "control") < 0.8
