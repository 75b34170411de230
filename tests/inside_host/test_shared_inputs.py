"""q, k and v that the host keeps apart: which of them share a quantization, and that no host feature can tell."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from dataclasses import replace

import comfy.hooks
import comfy.model_management
import pytest
import torch
import torch._dynamo.testing

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.svdquant.adapters import load as host_loading
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.svdquant.core.sharing import Slot
from svdquant_nodes.tests import layers
from svdquant_nodes.tests.inside_host import loras, published, small
from svdquant_nodes.tests.inside_host.publishers import (
    Publisher,
    publish_flux2,
    publish_qwen,
    publish_qwen_kitchen,
    publish_sdxl,
    publish_z_image,
)
from svdquant_nodes.tests.inside_host.test_memory import as_loaded, load_part_of  # noqa: F401
from svdquant_nodes.tests.small_models import SMALL, detecting, random_weights


def publish_sdxl_as_the_host_names_it(source):
    model = Publisher(source)
    for block in model.blocks(".attn1."):
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v"):
            model.move(f"{block}.{name}", f"{block}.{name}")
    return model


CASES = {  # family, how to publish it, in which dialect, inputs and linears that read them
    "sdxl": ("sdxl", publish_sdxl, "natural", 9, 27),
    "sdxl-apart": ("sdxl", publish_sdxl_as_the_host_names_it, "natural", 9, 27),
    "qwen-image": ("qwen-image", publish_qwen, "natural", 4, 12),
    "qwen-image-apart": ("qwen-image", publish_qwen_kitchen, "kitchen", 4, 12),
    "z-image": ("z-image", publish_z_image, "natural", 2, 4),
    "flux2-in-one-layer": ("flux2", publish_flux2, "lite", 2, 6),
}


def feeding(name):
    """What reads the same tensor has the same smoothing: the name without its q, k or v."""
    return re.sub(r"(to|add)_[qkv](_proj)?$", r"\1", name)


def smoothed(name, layer, own=lambda name, field: False):
    """Smoothing and a branch of the input's, except for fields that are this linear's own."""
    if layer.spec.format == "awq":
        return layer

    def random(field, *shape, scale=1.0):
        of = name if own(name, field) else feeding(name)
        return layers.random(*shape, seed=zlib.crc32(f"{of}.{field}".encode()), scale=scale)

    (n, k), dtype = (layer.out_features, layer.in_features), layer.up.dtype
    smooth, down = torch.exp2(random("smooth", k).clamp(-1, 1)), random("down", 16, k, scale=k**-0.5)
    up = random("up", n, 16, scale=0.3)
    return replace(layer, smooth=smooth.to(dtype), down=down.to(dtype), up=up.to(dtype))


def write(case, folder, activations="auto", **own):
    family, publish, dialect, *_ = CASES[case]
    model = publish(random_weights(SMALL[family].model()))
    linears = {name: smoothed(name, layer, **own) for name, layer in model.layers.items()}
    published.write(folder / "model.safetensors", linears, model.plain, dialect)
    with detecting():
        return load_model(folder / "model.safetensors", activations=activations)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Models by their case, each made once."""
    made = {}

    def loaded(case):
        if case not in made:
            made[case] = write(case, tmp_path_factory.mktemp(case))
        return made[case]

    return loaded


@pytest.fixture
def sdxl(load):
    return load("sdxl")


def inputs(model):
    """What is shared: {name: keys of the layers that read it, a key for each part}."""
    found = defaultdict(list)
    for key, layer in quantized_linears(model.model):
        for entry in layer.weight._params.entries:
            if entry.reader:
                found[entry.reader.input].append(key)
    assert all(shared.readers == len(keys) for shared, keys in found.items())
    return {shared.name: keys for shared, keys in found.items()}


@pytest.fixture
def seen(monkeypatch):
    """Counts what slots make and hand out, and makes it anew each time: the same to the last bit?"""
    count, recall = Counter(), Slot.recall

    def watched(self, x, reader, make):
        made = Counter()

        def counted():
            made["made"] += 1
            return make()

        got = recall(self, x, reader, counted)
        for one, fresh in zip(got, make(), strict=True):
            assert torch.equal(one.view(torch.uint8), fresh.view(torch.uint8)), reader.input.name
        count["made" if made else "handed"] += 1
        return got

    monkeypatch.setattr(Slot, "recall", watched)
    return count


def apart(run, monkeypatch):
    """What comes out where nothing is shared."""
    with monkeypatch.context() as patch:
        patch.setattr(Slot, "recall", lambda self, x, reader, make: make())
        return run()


@pytest.mark.parametrize("case", CASES)
def test_what_is_shared(case, load):
    found = inputs(load(case))
    assert (len(found), sum(map(len, found.values()))) == CASES[case][3:]
    for keys in found.values():
        modules, names = zip(*(key.rsplit(".", 2)[:2] for key in keys), strict=True)
        assert len(set(modules)) == 1 and set(names) in (
            {"to_q", "to_k", "to_v"},
            {"add_q_proj", "add_k_proj", "add_v_proj"},
            {"w1", "w3"},
            {"qkv"},
        )


@pytest.mark.parametrize("case", ["sdxl", "qwen-image", "z-image"])
def test_a_linear_that_is_fused_in_the_file_is_decoded_once(case, tmp_path, monkeypatch):
    decoded, decode = [], host_loading.apply_role
    monkeypatch.setattr(host_loading, "apply_role", lambda *linear: decoded.append(linear) or decode(*linear))
    write(case, tmp_path)
    assert len(decoded) == len(open_checkpoint(tmp_path / "model.safetensors").info)


@pytest.mark.parametrize("field", ["smooth", "down"])
def test_who_differs_in_either_reads_alone(field, tmp_path):
    odd = ("0.attn.to_k", "1.attn.add_q_proj")
    model = write("qwen-image-apart", tmp_path, own=lambda name, which: which == field and name.endswith(odd))
    groups = sorted(sorted(key.split(".")[-2] for key in keys) for keys in inputs(model).values())
    assert groups == [
        ["add_k_proj", "add_q_proj", "add_v_proj"],
        ["add_k_proj", "add_v_proj"],
        ["to_k", "to_q", "to_v"],
        ["to_q", "to_v"],
    ]


@pytest.mark.parametrize("case", CASES)
def test_sharing_changes_no_bit(case, load, seen, monkeypatch):
    """Batch 2 with guidance, two steps; `seen` compares what every layer is handed with what it would make."""
    model, family = load(case), CASES[case][0]

    def run():
        return small.sample(family, model, 2, batch=2, cfg=2.0)

    shared = run()
    groups, linears = CASES[case][3:]
    calls = seen["made"] // groups
    assert calls >= 2 and seen == {"made": calls * groups, "handed": calls * (linears - groups)}
    assert torch.equal(shared, apart(run, monkeypatch))
    assert layer_class(model).slot._held is None


def layer_class(model):
    return type(next(layer for _, layer in quantized_linears(model.model)))


# ---- what nodes do to self-attention ----


PATCHES = {  # attn1 patch, share of what is handed
    "passes-through": (lambda n, context, value, extra: (n, context, value), 2 / 3),
    "other-context": (lambda n, context, value, extra: (n, 1.5 * context, 0.5 * value), 0),
    "other-value": (lambda n, context, value, extra: (n, context, value.flip(1)), 1 / 3),
    "one-context-for-both": (lambda n, context, value, extra: (n, *[1.5 * context] * 2), 1 / 3),
    "equal-copies": (lambda n, context, value, extra: (n, context.clone(), value.clone()), 0),
    "written-in-place": (lambda n, context, value, extra: (n.mul_(1.5), context, value), 2 / 3),
    "longer-context": (lambda n, context, value, extra: (n, *[torch.cat((context, context), 1)] * 2), 1 / 3),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_attn1_patches(patch, sdxl, seen, monkeypatch):
    patched, (function, handed) = sdxl.clone(), PATCHES[patch]
    patched.set_model_attn1_patch(function)

    def run():
        return small.sample("sdxl", patched, batch=2, cfg=2.0)

    got = run()
    assert seen["handed"] == pytest.approx(handed * seen.total())
    assert torch.equal(got, apart(run, monkeypatch))


def test_attn1_replacement(sdxl, seen, monkeypatch):
    patched = sdxl.clone()
    patched.set_model_attn1_replace(lambda q, k, v, extra: q + k - v, "input", 4)

    def run():
        return small.sample("sdxl", patched)

    got = run()
    assert seen["handed"] == 2 * seen["made"]
    assert torch.equal(got, apart(run, monkeypatch))
    assert not torch.equal(got, small.sample("sdxl", sdxl))


def attentions(model):
    """Every self-attention with an input for it."""
    for path, module in model.model.diffusion_model.named_modules():
        if path.endswith("attn1"):
            yield module, layers.random(1, 8, 320, seed=3, dtype=torch.bfloat16)


def write_into_x(module, arguments, y=None):
    arguments[0].mul_(2)


HOOKS = {
    "hands-on-a-copy": ("register_forward_pre_hook", lambda module, arguments: (2 * arguments[0],)),
    "writes-before": ("register_forward_pre_hook", write_into_x),
    "writes-after": ("register_forward_hook", write_into_x),
    "looks-only": ("register_forward_pre_hook", lambda module, arguments: None),
}


@pytest.mark.parametrize("where", ["to_q", "to_k", "to_v"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_on_one_of_them(hook, where, sdxl, monkeypatch):
    attn, x = next(attentions(sdxl))
    register, function = HOOKS[hook]
    handle = getattr(getattr(attn, where), register)(function)

    def run():
        again = x.clone()
        return [projection(again) for projection in (attn.to_q, attn.to_k, attn.to_v)]

    try:
        for got, want in zip(run(), apart(run, monkeypatch), strict=True):
            assert torch.equal(got, want)
    finally:
        handle.remove()


# ---- LoRA, memory, compile ----


def lora(*projections):
    """On some of q, k, v of one block's self-attention."""
    random, out = loras._Random(3, 4), {}
    for x in projections:
        name = f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_{x}"
        up, down = random.pair(320, 320)
        out |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return out


@pytest.mark.parametrize("on", ["q", "k", "v", "qv", "qkv"])
def test_lora_on_some_of_them(on, sdxl, seen, monkeypatch):
    """The rank of a LoRA is in the hidden values, so those layers make their own and the others share."""
    model = loras.stock(sdxl, lora(*on))

    def run():
        return small.sample("sdxl", model, batch=2, cfg=2.0)

    got = run()
    calls = seen.total() / (27 - len(on))
    assert seen["made"] == calls * (8 if len(on) == 3 else 9)
    assert torch.equal(got, apart(run, monkeypatch))
    assert not torch.equal(got, small.sample("sdxl", sdxl, batch=2, cfg=2.0))


def test_lora_hook_on_one_conditioning(sdxl, seen, monkeypatch):
    group, wanted = comfy.hooks.create_hook_lora(lora("q", "v"), 1.0, 0), small.prompt

    def hooked(*arguments):
        [[context, more]] = wanted(*arguments)
        prompts.append(context)
        return [[context, more | ({"hooks": group} if len(prompts) % 2 else {})]]

    def run():
        prompts.clear()
        return small.sample("sdxl", sdxl.clone(), 2, cfg=2.0)

    prompts = []
    monkeypatch.setattr(small, "prompt", hooked)
    got = run()
    assert seen["handed"] > seen["made"]
    assert torch.equal(got, apart(run, monkeypatch))


@pytest.mark.parametrize("most", [False, True], ids=["few-layers", "most-layers"])
def test_partly_loaded(most, load, seen, as_loaded):  # noqa: F811
    """Some of q, k and v stay where they are, others are copied in for the step: they share all the same."""
    model = load("qwen-image")
    want, before = small.sample("qwen-image", model, cfg=2.0), Counter(seen)
    seen.clear()
    load_part_of(model, most)
    assert 0 < model.loaded_size() < model.model_size()
    assert torch.equal(small.sample("qwen-image", model, cfg=2.0), want)
    assert seen == before
    model.detach()


def test_in_eight_bits(tmp_path, seen, monkeypatch):
    """Wider weights and activations, the same smoothing and branch input."""
    model = write("qwen-image", tmp_path, activations="8 bit")
    got = small.sample("qwen-image", model, batch=2)
    assert seen["made"] >= 4 and seen["handed"] == 2 * seen["made"]
    assert torch.equal(got, apart(lambda: small.sample("qwen-image", model, batch=2), monkeypatch))


def test_compiled_without_a_break(sdxl):
    """A graph has nothing to remember, so each projection quantizes; and one graph serves the blocks of a size."""
    comfy.model_management.load_models_gpu([sdxl])
    graphs = torch._dynamo.testing.CompileCounter()

    def projections(attn, x):
        return attn.to_q(x), attn.to_k(x), attn.to_v(x)

    compiled = torch.compile(projections, fullgraph=True, backend=graphs)
    for attn, x in attentions(sdxl):
        want = projections(attn, x)
        attn.to_q(x)
        for got, expected in zip(compiled(attn, x), want, strict=True):
            assert torch.equal(got, expected)
    assert graphs.frame_count == 1
    torch._dynamo.reset()
