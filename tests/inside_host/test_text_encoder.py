"""A 4-bit T5 on the host's own class gives what the host's fp32 T5 gives, through whatever the host does to it."""

from __future__ import annotations

import gc
import weakref

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.text_encoders.t5
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_merging import CLIPSave, save_checkpoint
from safetensors.torch import load_file

from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters.encoder_types import TYPES, available
from svdquant_nodes.svdquant.adapters.load import load_model
from svdquant_nodes.svdquant.adapters.operations import quantized_linears
from svdquant_nodes.svdquant.adapters.text_encoder import Request, load_clip
from svdquant_nodes.svdquant.quantizer import text_encoder
from svdquant_nodes.tests.inside_host import encoders
from svdquant_nodes.tests.inside_host.encoders import encode
from svdquant_nodes.tests.inside_host.test_memory import load_part_of
from svdquant_nodes.tests.inside_host.twins import DEMO_BF16, DEMO_INT4, error
from svdquant_nodes.tests.loaders import made
from svdquant_nodes.tests.tolerances import assert_close


@pytest.fixture(scope="module")
def encoder():
    return encoders.small()


@pytest.fixture(scope="module")
def path(encoder, tmp_path_factory):
    return encoders.write(tmp_path_factory.mktemp("models") / "t5.safetensors", encoder)


@pytest.fixture(autouse=True)
def small_ones_count(monkeypatch):
    """The host knows T5-XXL by its depth and width."""
    monkeypatch.setattr(comfy.sd, "detect_te_model", lambda state: comfy.sd.TEModel.T5_XXL)


@pytest.fixture
def clip(path):
    return load_clip(Request((path,), "pixart"))


@pytest.fixture
def host(encoder):
    return encoders.host_clip(encoder)


def test_is_the_hosts_own_patcher_and_model(clip):
    assert type(clip.patcher) is comfy.model_patcher.CoreModelPatcher
    assert type(clip.cond_stage_model.t5xxl.transformer) is comfy.text_encoders.t5.T5
    assert len(list(quantized_linears(clip.patcher.model))) == 2 * 7


ALONE = [kind for kind in available() if "T5" in TYPES[kind].names and 1 in TYPES[kind].counts]


@pytest.mark.parametrize("kind", [kind for kind in ALONE if kind != "hunyuan_image"])  # whose T5 is a ByT5
def test_equals_the_hosts_own_encoder(encoder, tmp_path, kind):
    encoder = (
        encoders.small(24) if kind == "hidream" else encoder
    )  # there the host looks at the depth once more
    ours = load_clip(Request((encoders.write(tmp_path / "t5.safetensors", encoder),), kind))
    assert_close(encode(ours), encode(encoders.host_clip(encoder, kind)), "host_twin")


def test_activations_beyond_fp16_stay_finite(tmp_path):
    """T5's residual stream overflows fp16, in which its weights are stored."""
    loud, peaks = encoders.small(loud=2.0**15), []
    host = encoders.host_clip(loud)
    host.cond_stage_model.t5xxl.transformer.encoder.block[-1].register_forward_hook(
        lambda module, args, output: peaks.append(output[0].abs().max())
    )
    expected = encode(host)
    assert max(peaks) > 65504
    ours = load_clip(Request((encoders.write(tmp_path / "t5.safetensors", loud),), "pixart"))
    assert_close(encode(ours), expected, "host_twin")


def test_quantized_here_is_near_the_original(tmp_path):
    """Gaussian weights, whose rounding errors nothing hides: 9 % a weight, a little more behind two blocks."""
    original = encoders.gaussian()
    path = made.save(tmp_path / "fp16.safetensors", {name: t.half() for name, t in original.dense.items()})
    text_encoder.quantize(open_source(path), tmp_path / "int4.safetensors")
    ours = load_clip(Request((tmp_path / "int4.safetensors",), "pixart"))
    assert 0.01 < error(encode(ours), encode(encoders.host_clip(original))) < 0.2


def with_lora(clip, strength=0.7):
    return comfy.sd.load_lora_for_models(None, clip, encoders.lora(), 0, strength)[1]


def test_lora_by_the_hosts_loader(clip, host):
    plain, expected = encode(host), encode(with_lora(host))
    assert error(expected, plain) > 0.05
    assert_close(encode(with_lora(clip)), expected, "host_twin")
    assert_close(encode(clip), plain, "host_twin")


def hooked(clip, keyframes):
    """What SetClipHooks does."""
    group = comfy.hooks.create_hook_lora(encoders.lora(), 0, 1.0)
    if keyframes:
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.5))
        group.set_keyframes_on_hooks(frames)
    clip = clip.clone(disable_dynamic=True)
    clip.patcher.forced_hooks = group.clone()
    clip.use_clip_schedule = keyframes
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip)
    key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    assert key_map
    clip.patcher.register_all_hook_patches(group, target)
    return clip


@pytest.mark.parametrize("keyframes", [False, True], ids=["constant", "scheduled"])
def test_lora_hooks(clip, host, keyframes):
    def encodings(one):
        one = hooked(one, keyframes)
        return [
            cond for cond, _ in one.encode_from_tokens_scheduled(one.tokenize("a red fox"), show_pbar=False)
        ]

    ours, theirs, plain = encodings(clip), encodings(host), encode(host, "a red fox")
    assert len(ours) == len(theirs) == (2 if keyframes else 1)
    assert all(error(cond, plain) > 0.01 for cond in theirs)
    for got, want in zip(ours, theirs, strict=True):
        assert_close(got, want, "host_twin")
    assert_close(encode(clip, "a red fox"), plain, "host_twin")


@pytest.mark.parametrize("most", [False, True], ids=["few-layers", "most-layers"])
def test_partial_load(clip, host, monkeypatch, most):
    ours, expected = with_lora(clip), encode(with_lora(host))
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: None)
    load_part_of(ours.patcher, most)
    assert 0 < ours.patcher.loaded_size() < ours.patcher.model_size()
    assert_close(encode(ours), expected, "host_twin")
    ours.patcher.detach()


def test_model_size_is_that_of_four_bits(clip, encoder):
    linears = sum(t.nbytes for name, t in encoder.stored.items() if name.endswith(".qweight"))
    rest = sum(t.nbytes for name, t in encoder.stored.items() if t.dtype == torch.float16)
    assert linears < clip.patcher.model_size() < linears + rest + 2**16


def test_padding_of_prompts(path):
    lengths = {n: encode(load_clip(Request((path,), "pixart", min_length=n)), "a").shape[1] for n in (0, 40)}
    assert lengths == {0: 3, 40: 40}


def test_on_the_cpu_when_asked(path):
    clip = load_clip(Request((path,), "pixart", device="cpu"))
    assert clip.patcher.load_device == clip.patcher.offload_device == torch.device("cpu")


def test_non_dynamic_delegate_can_be_rebuilt(clip):
    build, arguments, *_ = clip.patcher.cached_patcher_init
    rebuilt = build(*arguments, disable_dynamic=True)
    assert type(rebuilt) is comfy.model_patcher.ModelPatcher
    assert len(list(quantized_linears(rebuilt.model))) == 2 * 7


def test_freed_by_reference_count(clip):
    gc.disable()
    try:
        copy = with_lora(clip)
        seen = weakref.ref(copy.patcher)
        del copy
        assert seen() is None, "something of ours keeps a cycle through the patcher"
    finally:
        gc.enable()


# ---- beside CLIP-L, and what is refused ----


@pytest.fixture(scope="module")
def clip_l(tmp_path_factory):
    """CLIP-L in its real size, every weight zero, without the projection that FLUX does not use."""
    return encoders.empty_clip_l(tmp_path_factory.mktemp("models") / "clip_l.safetensors")


@pytest.mark.parametrize("order", [1, -1], ids=["clip-l-first", "t5-first"])
def test_flux_has_clip_l_beside_it(path, encoder, clip_l, order):
    clip = load_clip(Request((clip_l, path)[::order], "flux"))
    tokens = clip.tokenize("a red fox")
    [[cond, extra]] = clip.encode_from_tokens_scheduled(tokens)
    assert cond.shape == (1, 256, encoders.WIDTH) and extra["pooled_output"].shape == (1, 768)
    host = encoders.host_clip(encoder, "flux", load_file(clip_l))
    assert_close(cond, host.encode_from_tokens_scheduled(tokens)[0][0], "host_twin")


@pytest.fixture
def sixteen_bits(encoder, tmp_path):
    return made.save(tmp_path / "t5-fp16.safetensors", {n: t.half() for n, t in encoder.dense.items()})


def test_ordinary_files_go_to_the_hosts_loader(sixteen_bits):
    with pytest.raises(
        RuntimeError, match="size mismatch for"
    ):  # a T5-XXL of its own, which this one is too small for
        load_clip(Request((sixteen_bits,), "pixart"))


SAVES = {
    "encoder": lambda clip: CLIPSave().save(clip, "encoder"),
    "checkpoint": lambda clip: save_checkpoint(
        comfy.sd.load_diffusion_model(str(DEMO_BF16)),
        clip=clip,
        filename_prefix="all",
        output_dir=folder_paths.get_output_directory(),
    ),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("which", ["fresh", "used", "clone"])
def test_saving_is_refused(clip, tmp_path, which, save):
    folder_paths.set_output_directory(str(tmp_path))
    before = None if which == "fresh" else encode(clip)
    with pytest.raises(ValueError, match="cannot be saved by ComfyUI's save nodes"):
        save(clip.clone() if which == "clone" else clip)
    assert list(tmp_path.iterdir()) == []
    assert before is None or torch.equal(encode(clip), before)


def without(encoder, *names):
    return {name: t for name, t in encoder.stored.items() if not any(part in name for part in names)}


REFUSED = {  # files, type, message
    "missing-norm": (lambda e: without(e, "1.layer.1.layer_norm"), "pixart", r"1\.layer_norm\.weight is missing"),
    "missing-linear": (lambda e: without(e, "1.layer.0.SelfAttention.v"), "pixart", r"Attention\.v\.weight is missing"),
    "missing-table": (lambda e: without(e, "shared", "embed_tokens"), "pixart", r"shared\.weight is missing"),
    "wider-norm": (
        lambda e: e.stored | {"encoder.final_layer_norm.weight": torch.ones(256).half()},
        "pixart",
        "encoder class disagrees with the file",
    ),
    "block-far-beyond": (
        lambda e: e.stored | {"encoder.block.999999999.layer.0.layer_norm.weight": torch.ones(128).half()},
        "pixart",
        r"t5\.safetensors: encoder\.block\.999999999\..*: expected blocks 0 to \d, got another",
    ),
    "flux-without-clip-l": (lambda e: e.stored, "flux", r"type flux: expected 2 files \(CLIP-L and T5\), got 1"),
    "no-such-type": (lambda e: e.stored, "sdxl", "type: expected one of flux, sd3"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(encoder, tmp_path, tensors, kind, message):
    path = made.save(tmp_path / "t5.safetensors", tensors(encoder))
    with pytest.raises(ValueError, match=message):
        load_clip(Request((path,), kind))


def test_the_same_twice(path):
    with pytest.raises(ValueError, match=r"got T5 a second time, after t5\.safetensors"):
        load_clip(Request((path, path), "flux"))


def test_quantized_partner(path, tmp_path):
    layer = "text_model.encoder.layers.0.mlp.fc1"
    scaled = {f"{layer}.scale_weight": torch.ones(1), f"{layer}.weight": torch.ones(2, 2)}
    other = made.save(tmp_path / "clip_l.safetensors", scaled)
    with pytest.raises(
        ValueError, match="fc1.scale_weight: expected a 16-bit text encoder beside the 4-bit one"
    ):
        load_clip(Request((other, path), "flux"))


DIFFUSION = {"double_blocks.0.img_attn.qkv.weight": torch.ones(4, 4)}
OPENAI = {f"transformer.resblocks.{i}.ln_1.weight": torch.ones(4) for i in range(12)}
CLIP_G = {f"text_model.encoder.layers.{i}.mlp.fc1.bias": torch.ones(4) for i in range(32)}
UNFIT = {  # a file beside CLIP-L, type, message
    "clip-l-twice": (None, "flux", r"clip_l\.safetensors: .* got CLIP-L a second time, after clip_l"),
    "clip-l-twice-in-openai-names": (OPENAI, "flux", r"other\.safetensors: .* got CLIP-L a second time, after clip_l"),
    "diffusion-model": (DIFFUSION, "flux", r"other\.safetensors: .* \(CLIP-L and T5\), got none: an ordinary"),
    "clip-g": (CLIP_G, "flux", r"got CLIP-G\. Choose another"),
    "vae": ({"decoder.conv_in.weight": torch.ones(4)}, "sd3", "got a VAE. Load it with ComfyUI's Load VAE"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "kind", "message"), UNFIT.values(), ids=UNFIT)
def test_files_that_do_not_go_together(clip_l, tmp_path, tensors, kind, message):
    other = made.save(tmp_path / "other.safetensors", tensors) if tensors else clip_l
    with pytest.raises(ValueError, match=message):
        load_clip(Request((clip_l, other), kind))


def test_an_unfit_file_beside_four_bits(path, tmp_path):
    other = made.save(tmp_path / "other.safetensors", DIFFUSION)
    with pytest.raises(ValueError, match=r"other\.safetensors: .* got none: an ordinary 16-bit model"):
        load_clip(Request((other, path), "flux"))


def test_a_16_bit_encoder_of_the_same_kind(path, sixteen_bits):
    with pytest.raises(ValueError, match=r"t5\.safetensors: .* got T5 a second time, after t5-fp16"):
        load_clip(Request((sixteen_bits, path), "flux"))


def test_one_encoder_that_the_type_does_not_have(clip_l):
    with pytest.raises(
        ValueError, match=r"type pixart \(T5\), got CLIP-L\. Choose another file, or the type"
    ):
        load_clip(Request((clip_l,), "pixart"))


def test_each_kind_of_file_names_its_node(path):
    with pytest.raises(
        ValueError, match=r"t5\.safetensors: .* got a text encoder. Load it with SVDQuant Load Text Encoder"
    ):
        load_model(path)
    with pytest.raises(ValueError, match="got a diffusion model. Load it with SVDQuant Load Model"):
        load_clip(Request((DEMO_INT4,), "pixart"))
