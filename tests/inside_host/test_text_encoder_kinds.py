"""Every 4-bit text encoder on the host's own class gives what that class gives in fp32 on the weights it stands for."""

from __future__ import annotations

from contextlib import contextmanager

import comfy.model_management
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.svdquant.adapters.text_encoder import Request, load_clip
from svdquant_nodes.svdquant.quantizer import text_encoder
from svdquant_nodes.tests import small_encoders
from svdquant_nodes.tests.inside_host import encoders
from svdquant_nodes.tests.inside_host.test_memory import load_part_of
from svdquant_nodes.tests.inside_host.twins import error
from svdquant_nodes.tests.loaders import made
from svdquant_nodes.tests.small_models import detecting_t5
from svdquant_nodes.tests.tolerances import assert_close

PROMPT = "a (red:1.3) fox under an oak, painted in oils"


def meaning(stored):
    """The dense linears of a natural file, read apart from its reader: code * scale + zero."""
    dense = {}
    for layer in [name.removesuffix(".nibbles") for name in stored if name.endswith(".nibbles")]:
        nibbles, scales, zeros = (stored[f"{layer}.{field}"] for field in ("nibbles", "scales", "zeros"))
        codes = torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1).double()
        scale, zero = (t.double().repeat_interleave(codes.shape[1] // t.shape[1], 1) for t in (scales, zeros))
        dense[layer] = (codes * scale + zero).float()
    return dense


def host_clip(case, others, dense=None):
    """The host's own CLIP on the unquantized tensors, or with other weights in its linears."""
    kind = getattr(comfy.sd.CLIPType, case.kind.upper())
    states = [case.tensors(), *(load_file(path) for path in others)]
    clip = comfy.sd.load_text_encoder_state_dicts(states, clip_type=kind, model_options=case.settings())
    linears = {
        m: module
        for m, module in clip.cond_stage_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for name, weight in (dense or {}).items():
        inside = f".transformer.{name.replace('language_model.', '')}"
        [module] = [module for path, module in linears.items() if path.endswith(inside)]
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return clip


def encode(clip, **more):
    """What CLIPTextEncode makes of a prompt: every tensor of it, by name."""
    [[cond, extra]] = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT, **more))
    return {"cond": cond} | {name: t for name, t in extra.items() if torch.is_tensor(t)}


@pytest.fixture
def beside(tmp_path):
    """Files of encoders that stay in 16 bits."""
    makers = {"CLIP-L": encoders.empty_clip_l}
    return lambda case: [makers[name](tmp_path / f"{name}.safetensors") for name in case.beside]


def quantized(case, folder, **options):
    source = made.save(folder / f"{case.config}-bf16.safetensors", case.tensors())
    target = folder / f"{case.config}-int4.safetensors"
    text_encoder.quantize(open_source(source), target, **options)
    return target


@contextmanager
def both(name, folder, others=()):
    """A case by our loader, and the host's own fp32 products of the same weights."""
    case = small_encoders.CASES[name]
    with small_encoders.detecting(case):
        path = quantized(case, folder)
        ours = load_clip(Request((path, *others), case.kind))
        yield case, ours, host_clip(case, others, meaning(load_file(path)))


@pytest.mark.parametrize("name", small_encoders.known())
def test_equals_the_hosts_own_encoder(tmp_path, beside, name):
    others = beside(small_encoders.CASES[name])
    with both(name, tmp_path, others) as (case, ours, host):
        each = 6 if case.name == "T5 1.0" else 7
        assert sum(1 for _ in quantized_linears(ours.patcher.model)) == each * case.depth
        got, want, exact = encode(ours), encode(host), encode(host_clip(case, others))
    assert got.keys() == want.keys()
    for one, tensor in want.items():
        assert_close(got[one], tensor, "host_twin")
    what = "conditioning_llama3" if case.kind == "hidream" else "cond"
    # Gaussian weights, 9 % wrong each, up to 36 layers of them and nothing trained to bear it
    assert 0.01 < error(got[what], exact[what]) < 0.5


@pytest.mark.parametrize("name", ["z-image", "flux2-klein-9b", "qwen-image", "gemma3", "flux2-dev"])
def test_what_is_not_quantized_keeps_its_bits(tmp_path, name):
    case = small_encoders.CASES[name]
    with small_encoders.detecting(case):
        loaded = load_clip(Request((quantized(case, tmp_path),), case.kind)).cond_stage_model.state_dict()
        host = host_clip(case, ()).cond_stage_model.state_dict()
    plain = {name: t for name, t in host.items() if "_proj.weight" not in name}
    assert len(plain) > 10 and loaded.keys() == host.keys()
    assert all(made.same(loaded[name], t) for name, t in plain.items())


PICTURE = torch.rand(1, 56, 84, 3, generator=torch.Generator().manual_seed(3))
SEEING = [name for name in ("qwen-image", "krea2") if name in small_encoders.known()]


@pytest.mark.parametrize("name", SEEING)
def test_pictures(tmp_path, name):
    """Qwen-Image-Edit shows its encoder the picture; the tower that sees it stays in 16 bits."""
    with both(name, tmp_path) as (_, ours, host):
        blind, got, want = encode(ours), encode(ours, images=[PICTURE]), encode(host, images=[PICTURE])
    assert got["cond"].shape[1] != blind["cond"].shape[1]
    assert_close(got["cond"], want["cond"], "host_twin")


def test_writes_what_the_host_writes(tmp_path):
    """The host's Generate Text, whose logits come from the token table."""
    with both("z-image", tmp_path) as (_, ours, host):
        words = [
            clip.generate(clip.tokenize("a red fox"), do_sample=False, max_length=8) for clip in (ours, host)
        ]
    assert words[0] == words[1] and len(words[0]) == 8


def test_lora_by_the_hosts_loader(tmp_path):
    layer = "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.v_proj"
    draw = torch.Generator().manual_seed(5)
    lora = {f"{layer}.lora_up.weight": torch.randn(128, 4, generator=draw)}
    lora[f"{layer}.lora_down.weight"] = torch.randn(4, 128, generator=draw)
    with both("z-image", tmp_path) as (_, ours, host):
        plain = encode(ours)["cond"]
        pair = [comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.7)[1] for clip in (ours, host)]
        got, want = (encode(clip)["cond"] for clip in pair)
    assert error(got, plain) > 0.02
    assert_close(got, want, "host_twin")


def test_half_of_it_loaded(tmp_path, monkeypatch):
    with both("z-image", tmp_path) as (_, ours, host):
        want = encode(host)["cond"]
        comfy.model_management.unload_all_models()
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: None)
        load_part_of(ours.patcher, most=False)
        assert 0 < ours.patcher.loaded_size() < ours.patcher.model_size()
        assert_close(encode(ours)["cond"], want, "host_twin")
        ours.patcher.detach()


def test_two_in_4_bits(tmp_path):
    """HiDream's Llama beside T5 in the published layout: each is computed as if it were alone."""
    llama = small_encoders.CASES["hidream"]
    t5 = encoders.write(tmp_path / "t5.safetensors", encoders.small(24))
    with small_encoders.detecting(llama), detecting_t5():
        path = quantized(llama, tmp_path)
        together, *alone = (
            encode(load_clip(Request(paths, "hidream"))) for paths in ((path, t5), (path,), (t5,))
        )
    assert made.same(together["conditioning_llama3"], alone[0]["conditioning_llama3"])
    assert made.same(together["cond"], alone[1]["cond"])


def test_groups_of_64_are_nearer(tmp_path):
    """And T5 then in the natural layout: the published one has no place for them."""
    case, found = small_encoders.CASES["cosmos"], {}
    for group in text_encoder.GROUPS:
        path = quantized(case, tmp_path, group=group)
        checkpoint = open_checkpoint(path)
        assert {info.spec.group for info in checkpoint.info.values()} == {group}
        found[group] = meaning(load_file(path))
    dense = {name.removesuffix(".weight"): t.float() for name, t in case.tensors().items()}
    far = {
        group: sum(error(w, dense[name]) ** 2 for name, w in each.items()) for group, each in found.items()
    }
    assert 0.7 < far[64] / far[128] < 0.9


# ---- refused ----

NORM = "model.layers.0.post_attention_layernorm.weight"
REFUSED = {  # changes of a 4-bit Qwen3, type, message
    "missing-norm": ({NORM: None, "model.norm.weight": None}, "lumina2", "is missing, and 1 more like it"),
    "missing-table": ({"model.embed_tokens.weight": None}, "lumina2", r"model\.embed_tokens\.weight is missing"),
    "wider-norm": ({NORM: torch.ones(256).bfloat16()}, "lumina2", "encoder class disagrees with the file"),
    "another-type": ({}, "qwen_image", r"type qwen_image \(Qwen2\.5-VL\), got Qwen3\. Choose another file, or"),
    "type-of-two": ({}, "hunyuan_video", r"expected 2 files \(Llama 3\.1 and CLIP-L\), got 1"),
    "no-such-type": ({}, "sdxl", "type: expected one of flux, sd3"),
    "nan": ({"model.layers.1.mlp.up_proj.zeros": torch.full((256, 1), torch.nan).half()}, "lumina2", "expected finite"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, changes, kind, message):
    case = small_encoders.CASES["z-image"]
    stored = load_file(quantized(case, tmp_path)) | changes
    path = made.save(tmp_path / "bad.safetensors", {name: t for name, t in stored.items() if t is not None})
    with small_encoders.detecting(case), pytest.raises(ValueError, match=message):
        load_clip(Request((path,), kind))


def test_a_host_that_makes_something_else(tmp_path, monkeypatch):
    case = small_encoders.CASES["z-image"]
    path = quantized(case, tmp_path)
    monkeypatch.setattr(comfy.sd, "detect_te_model", lambda state: comfy.sd.TEModel.CLIP_L)
    with pytest.raises(ValueError, match="this ComfyUI makes no Qwen3 of these files for type lumina2"):
        load_clip(Request((path,), "lumina2"))


@pytest.mark.parametrize("name", ["wan", "lumina2", "gemma3"])
def test_a_file_without_its_tokenizer(tmp_path, name):
    case = small_encoders.CASES[name]
    names = {"model.layers.0.post_feedforward_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"}
    names |= {f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight" for i in (0, 1)}
    tensors = {n: t for n, t in case.tensors().items() if n in names}
    path = made.save(tmp_path / "no-tokenizer.safetensors", tensors)
    with pytest.raises(
        ValueError, match=r"no-tokenizer\.safetensors: spiece_model: expected the tokenizer in the file"
    ):
        load_clip(Request((path,), case.kind))
