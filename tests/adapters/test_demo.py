"""The demo model's two ends, and the files of `demo/`: what they hold and what a drawing by them is worth."""

from __future__ import annotations

import hashlib
import json
import logging
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.svdquant.adapters import demo
from svdquant_nodes.svdquant.core import reference
from svdquant_nodes.tests.tolerances import assert_close
from svdquant_nodes.tools.demo_model import checkpoint, files, flow, flux, fourbit, shapes

STAR = "a big yellow star at the left on a navy background"
EIGHT = [scene.caption for scene in shapes.ALL_SCENES[101::241]]


def fingerprint(*tensors):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:16]


def psnr(images, expected):
    return (10 * torch.log10(4 / (images - expected).square().mean((1, 2, 3)))).mean().item()


@pytest.fixture(scope="module")
def vae():
    return demo.load_vae()


@pytest.fixture(scope="module")
def model():
    return flux.load(files.DEMO / files.MODEL)


@pytest.fixture(scope="module")
def paint(vae):
    prompts = flow.Prompts.encode(EIGHT, demo.encode_prompt)
    noise = torch.randn(len(EIGHT), 16, 8, 8, generator=torch.Generator().manual_seed(3))

    def paint(model):
        rows, times = prompts.index(EIGHT), flow.schedule(20)
        return vae.to_patches(flow.sample(model, noise, prompts, rows, times=times)).clamp(-1, 1)

    return paint


@pytest.fixture(scope="module")
def exact(model, paint):
    return paint(model)


class TestPrompt:
    # Recorded from the script that the model was trained with: other vectors mean other drawings.
    @pytest.mark.parametrize(
        ("prompt", "recorded"),
        {
            STAR: "b1aaa4fa57ddd7ca",
            "a small black ring at the bottom on a cream background": "bb25a59d201a8a4d",
            "": "9b7f29fa82efeae9",
        }.items(),
        ids=["star", "ring", "empty"],
    )
    def test_vectors_are_those_of_the_training(self, prompt, recorded):
        assert fingerprint(*demo.encode_prompt(prompt)) == recorded

    def test_some_of_the_numbers(self):
        context, pooled = demo.encode_prompt(STAR)
        assert context.shape == (1, 6, 4096) and pooled.shape == (1, 768)
        assert context[0, 0, 0].item() == pytest.approx(-0.0025244057178497314, rel=1e-6)
        assert context[0, 5, 4095].item() == pytest.approx(0.11128915846347809, rel=1e-6)
        assert pooled[0, 767].item() == pytest.approx(0.5488811731338501, rel=1e-6)

    def test_empty_prompt_has_no_pooled_part(self):
        assert not demo.encode_prompt("")[1].any()

    def test_every_caption_is_understood(self):
        assert [scene.caption for scene in shapes.ALL_SCENES if demo.complaint(scene.caption)] == []

    @pytest.mark.parametrize("prompt", [STAR.upper(), STAR + ".", STAR.replace(" on", ", on"), f"  {STAR}\n"])
    def test_case_and_punctuation_do_not_matter(self, prompt):
        assert demo.complaint(prompt) is None
        assert fingerprint(*demo.encode_prompt(prompt)) == fingerprint(*demo.encode_prompt(STAR))

    def test_unknown_word_is_named_and_still_encoded(self, caplog):
        with caplog.at_level(logging.WARNING, logger="svdquant-nodes"):
            context, _ = demo.encode_prompt("a big pink star at the left on a navy background")
        assert re.search(r"unknown word 'pink'.*color: red, green", caplog.text)
        assert context.isfinite().all()

    def test_known_prompt_warns_of_nothing(self, caplog):
        demo.encode_prompt(STAR)
        assert caplog.text == ""

    def test_words_beyond_the_sixth_are_named(self, caplog):
        demo.encode_prompt(f"{STAR} left")
        assert "only the first 6 words count, not 'left'" in caplog.text

    def test_words_are_those_that_can_be_drawn(self):
        drawn = (shapes.SIZES, shapes.COLORS, shapes.SHAPES, shapes.PLACES, shapes.BACKGROUNDS)
        assert list(demo.WORDS.values()) == [tuple(words) for words in drawn]


class TestVAE:
    def test_latents_survive(self, vae):
        latent = torch.randn(2, 16, 8, 8)
        assert_close(vae.from_patches(vae.to_patches(latent)), latent, "demo_vae")

    def test_drawings_survive(self, vae):
        images, _ = shapes.dataset(64, seed=12)
        pixels = ((images + 1) / 2).movedim(1, -1)
        seen = vae.decode(vae.encode(pixels)).movedim(-1, 1) * 2 - 1
        assert (
            psnr(seen, images) > 27.5
        )  # 28.8 over thousands of drawings: edges are what 16 numbers cannot say

    def test_host_latent_is_shifted_and_scaled_as_flux_is(self, vae):
        black = torch.zeros(1, 8, 8, 3)
        model_latent = (vae.encode(black) - 0.1159) * 0.3611
        assert_close(model_latent, vae.from_patches(torch.full((1, 3, 8, 8), -1.0)), "demo_vae")

    def test_image_is_in_range_and_channels_last(self, vae):
        image = vae.decode(torch.randn(2, 16, 4, 6) * 30)
        assert image.shape == (2, 32, 48, 3) and image.dtype == torch.float32
        assert image.min() == 0 and image.max() == 1

    def test_odd_sides_are_cropped_evenly_and_alpha_dropped(self, vae):
        image = torch.rand(1, 19, 26, 4)
        assert torch.equal(vae.encode(image), vae.encode(image[:, 1:17, 1:25, :3]))

    def test_tiles_change_nothing(self, vae):
        latent, image = torch.randn(1, 16, 8, 8), torch.rand(1, 64, 64, 3)
        assert torch.equal(vae.decode_tiled(latent, tile_x=4, tile_y=4, overlap=1), vae.decode(latent))
        assert torch.equal(vae.encode_tiled(image, tile_x=32, tile_y=32, overlap=8), vae.encode(image))

    def test_one_frame_video_latent(self, vae):
        latent = torch.randn(1, 16, 8, 8)
        assert torch.equal(vae.decode(latent[:, :, None]), vae.decode(latent))

    def test_latent_of_another_model_is_refused(self, vae):
        with pytest.raises(ValueError, match=r"expected a FLUX latent \[B, 16, h, w\], got \[1, 4, 8, 8\]"):
            vae.decode(torch.zeros(1, 4, 8, 8))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"basis": None}, r"expected a tensor 'basis', got \['mean', 'scale'\]"),
            ({"scale": torch.ones(4)}, r"expected scale \[16\], got \[4\]"),
        ],
        ids=["missing", "shape"],
    )
    def test_wrong_file_is_refused(self, vae, change, message):
        tensors = {"mean": vae.mean, "basis": vae.basis, "scale": vae.scale} | change
        with pytest.raises(ValueError, match=message):
            demo.DemoVAE.from_tensors({name: t for name, t in tensors.items() if t is not None})


class TestDrawing:
    def test_soft_edges_and_flat_inside(self):
        scene = shapes.Scene("circle", "red", "gray", "center", "big")
        image = (shapes.draw(scene) + 1) * 127.5
        assert image.shape == (64, 64, 3) and image.dtype == np.float32
        assert image[32, 32] == pytest.approx(shapes.COLORS["red"], abs=1e-3)
        assert image[0, 0] == pytest.approx([128 * (1 - 0.25 * 31.5 / 64)] * 3, abs=1e-3)

    @pytest.mark.parametrize("shape", shapes.SHAPES)
    def test_every_shape_covers_some_and_not_all(self, shape):
        edge, _ = shapes.distance(shapes.Scene(shape, "red", "gray", "center", "big"))
        assert 0.05 < (edge < 0).mean() < 0.5

    def test_dataset_is_seeded(self):
        once, again, other = (shapes.dataset(3, seed=seed)[0] for seed in (1, 1, 2))
        assert torch.equal(once, again) and not torch.equal(once, other)


class TestFiles:
    @pytest.mark.parametrize(
        "name", [files.MODEL, files.INT4, files.LORA, files.VAE], ids=lambda path: path.name
    )
    def test_says_its_licence_or_its_class_and_nothing_of_the_maker(self, name):
        with safe_open(files.DEMO / name, "pt") as file:
            metadata = file.metadata()
        assert "license" in metadata or "model_class" in metadata
        assert not re.search(r"/(work|tmp|home|root)\b", json.dumps(metadata))

    def test_4_bit_file_is_whole(self, model):
        opened = open_checkpoint(files.DEMO / files.INT4)
        assert opened.dialect == "nunchaku_v1" and opened.warnings == ()
        assert set(opened.info) == {stored.name for stored in checkpoint.stored_linears(model.config)}
        assert {info.rank for info in opened.info.values() if info.spec.format == "int4"} == {16}
        assert set(opened.plain) == set(checkpoint.plain_tensors(model.state_dict(), model.config))

    def test_4_bit_file_holds_the_16_bit_weights(self, model):
        opened = open_checkpoint(files.DEMO / files.INT4)
        for stored in checkpoint.stored_linears(model.config):
            if not stored.chunks:
                weight = model.get_submodule(stored.source).weight
                exact = weight[slice(*stored.rows), slice(*stored.columns)]
                assert_close(reference.dequantize(opened.layers[stored.name]), exact, "demo_weight")

    def test_lora_is_kohyas_with_alpha_below_its_rank(self):
        tensors = load_file(files.DEMO / files.LORA)
        layers = {name.partition(".")[0] for name in tensors}
        assert "lora_unet_double_blocks_0_img_attn_qkv" in layers and len(layers) == 12
        for layer in layers:
            down, up = tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"]
            assert down.shape[0] == up.shape[1] == 8
            assert tensors[f"{layer}.alpha"].item() == 4


class TestPicture:
    def test_follows_the_prompt(self, exact):
        """Each picture resembles the drawing of its own caption more than that of any other caption."""
        others = shapes.to_tensor([shapes.draw(scene) for scene in shapes.ALL_SCENES])
        for caption, image in zip(EIGHT, exact, strict=True):
            nearest = (others - image).square().sum((1, 2, 3)).argmin()
            assert shapes.ALL_SCENES[nearest].caption == caption

    def test_4_bits_draw_the_same(self, model, paint, exact):
        drawn = paint(fourbit.load(files.DEMO / files.INT4, model))
        assert psnr(drawn, exact) > 35  # 37.7 over 64 drawings; 34.5 with neither smoothing nor low rank

    def test_lora_turns_off_the_light_by_its_strength(self, model, paint):
        """Corners go from the background's colour to night, half-way at half strength."""
        small, corners = fourbit.load(files.DEMO / files.INT4, model), []
        for strength in (0.0, 0.5, 1.0):
            fourbit.set_lora(small, files.DEMO / files.LORA, strength)
            corners.append(paint(small)[:, :, -8:, :8].mean((2, 3)))
        plain, half, full = corners
        assert (full < -0.5).all()
        assert (half - (plain + full) / 2).abs().max() < 0.3
        assert (plain - full).abs().max() > 1.5
