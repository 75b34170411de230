"""Forms are measured as they will be stored, a choice keeps its limit, and a mixed file is read back as chosen."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from svdquant_nodes.loaders import natural
from svdquant_nodes.loaders.detect import open_checkpoint
from svdquant_nodes.loaders.source import open_source
from svdquant_nodes.svdquant.adapters.families import resolve
from svdquant_nodes.svdquant.adapters.quantizing.plans import make_plan
from svdquant_nodes.svdquant.core.weights import INT4, INT4_UNSIGNED, NVFP4
from svdquant_nodes.svdquant.quantizer import choices, recipes, sensitivity, stream
from svdquant_nodes.svdquant.quantizer.branch import take_branch
from svdquant_nodes.svdquant.quantizer.jobs import round_weights
from svdquant_nodes.svdquant.quantizer.sensitivity import Limit, Option, branches, stored_bytes
from svdquant_nodes.svdquant.quantizer.task import freeze, relative_error, start
from svdquant_nodes.tests.quantizer import tiny
from svdquant_nodes.tests.quantizer.layer import make_task
from svdquant_nodes.tests.quantizer.test_stream import svdquant

SETTINGS = stream.Settings("instant")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model") / "tiny.safetensors", tiny.flux())


@pytest.fixture(scope="module")
def plan(source):
    return make_plan(open_source(source), rank=16)


@pytest.fixture(scope="module")
def measured(plan):
    return sensitivity.measure(plan, ("int4", "plain"), SETTINGS)


@pytest.mark.parametrize("spec", [INT4, INT4_UNSIGNED, NVFP4], ids=["int4", "int4-unsigned", "nvfp4"])
def test_bytes_are_those_of_the_file(spec):
    made = freeze(recipes.run("instant", make_task(spec, rank=16)))
    stored = sum(t.nbytes for t in natural.encode_linear(made, packed=True).values())
    assert 0 <= stored_bytes(spec.format, 192, 128, 16) - stored <= 4


def test_bytes_of_weight_only_linears_are_those_of_the_file():
    made = round_weights(torch.randn(192, 128), torch.randn(192))
    stored = sum(t.nbytes for t in natural.encode_linear(made, packed=True).values())
    assert stored_bytes("awq", 192, 128) == stored


@pytest.mark.parametrize("spec", [INT4, NVFP4], ids=["int4", "nvfp4"])
def test_one_decomposition_tells_the_error_of_every_rank(spec):
    """Without a search in between: the same error as a branch of that rank made alone."""
    task = make_task(spec, rank=64)
    bare = make_task(spec, rank=64).__class__(task.weight, task.bias, spec, 64)
    found = branches(bare)
    assert list(found) == [0, 16, 32, 48, 64]
    assert list(found.values()) == sorted(found.values(), reverse=True)
    for rank, error in found.items():
        alone = bare.__class__(task.weight, task.bias, spec, rank)
        fit = recipes.round_nearest(take_branch(start(alone)), clipped=False)
        assert error == pytest.approx(relative_error(fit), rel=0.01)


def test_with_statistics_the_error_is_of_outputs_on_held_out_rows():
    task = make_task(rank=32)
    found = branches(task)
    assert found[32] < found[0]
    assert (
        relative_error(recipes.run("fast", task)) < found[32] < 2 * relative_error(recipes.run("fast", task))
    )


def test_error_of_weight_only_linears():
    w, x = torch.randn(64, 128).double(), torch.randn(50, 128).double()
    near = w.unflatten(1, (-1, 64))
    scale = (near.abs().amax(-1, keepdim=True) / 7).bfloat16().double()
    zero = (-7 * scale).bfloat16().double()
    near = (((near / scale).round().clamp(-7, 7) + 7) * scale + zero).flatten(1)
    expected = (x @ (near - w).T).norm() / (x @ w.T).norm()
    assert sensitivity.weight_only_error(w.float(), x.float()) == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("limit", [790_000, 850_000, 1_000_000, 1_400_000])
def test_files_keep_their_size_and_are_what_was_chosen(plan, measured, tmp_path, limit):
    choice = sensitivity.choose(plan, measured, Limit(nbytes=limit))
    target = tmp_path / "out.safetensors"
    stream.quantize(sensitivity.chosen(plan, choice), target, SETTINGS)
    assert target.stat().st_size <= limit
    made = open_checkpoint(target)
    found = {name: (info.spec.format, info.rank) for name, info in made.info.items()}
    assert found == {n: (o.precision, o.rank) for n, o in choice.items() if o.precision != "plain"}
    mapped = resolve(made).map_names(made)
    assert mapped.left_over == ()
    exact = load_file(plan.source.path)
    kept = {job.source for job in plan.jobs if choice[job.name].precision == "plain"}
    assert set(mapped.linears).isdisjoint(kept)
    for name in kept:
        assert torch.equal(mapped.plain[f"{name}.weight"].read(made.plain), exact[f"{name}.weight"])


def test_more_room_is_less_error(plan, measured):
    errors = [
        sensitivity.overall_error(sensitivity.choose(plan, measured, Limit(nbytes=size)))
        for size in range(800_000, 2_000_000, 200_000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


@pytest.mark.parametrize("error", [0.12, 0.08, 0.03, 0.0])
def test_an_error_is_kept(plan, measured, error):
    choice = sensitivity.choose(plan, measured, Limit(error=error))
    assert sensitivity.overall_error(choice) <= error + 1e-9
    for job in plan.jobs:
        together = {choice[one.name].precision == "plain" for one in plan.jobs if one.source == job.source}
        assert len(together) == 1


def test_all_in_16_bits_is_no_quantized_file(plan, measured):
    choice = sensitivity.choose(plan, measured, Limit(error=0.0))
    with pytest.raises(ValueError, match="expected linears to quantize, got 16 bits for all"):
        sensitivity.chosen(plan, choice)


def test_a_size_that_nothing_keeps(plan, measured):
    with pytest.raises(
        ValueError, match=r"budget: expected at least 0\.\d+ MB for the whole file, got 0\.10 MB"
    ):
        sensitivity.choose(plan, measured, Limit(nbytes=100_000))


def test_a_decision_in_words_and_numbers(plan):
    # 1 + 3 MB; errors of 3 % and 1 %, every linear alike: sqrt((9 + 1) / 2) = 2.24 %
    small, plain = Option("int4", 16, 2**20, 0.03), Option("plain", 0, 3 * 2**20, 0.01)
    choice, limit = {"a": small, "b": plain}, Limit(error=0.05)
    decision = choices.Decision(plan, choice, {"a": [small, plain], "b": [plain]}, limit)
    assert decision.as_text().splitlines() == [
        "1 int4, 1 plain linears (plain: 16 bits), 4.0 MB, measured error 2.24 %",
        f"  {'a':<44} int4   r16       1.00 MB    3.00 %",
        f"  {'b':<44} plain  r0        3.00 MB    1.00 %",
    ]
    told = decision.as_dict({"a": 0.02})
    assert told["limit"] == {"nbytes": None, "error": 0.05}
    assert told["measured_error"] == pytest.approx(0.05**0.5 / 10)
    assert [one["reached"] for one in told["linears"].values()] == [0.02, None]
    assert [len(one["forms"]) for one in told["linears"].values()] == [2, 1]


def test_a_target_that_cannot_be_written_is_told_before_anything_is_measured(plan, tmp_path):
    target = tmp_path / "nowhere" / "out.safetensors"
    with pytest.raises(ValueError, match="nowhere"):
        choices.decide(plan, Limit(error=0.1), ("int4",), target, SETTINGS, progress=pytest.fail)


def test_a_stopped_measurement_goes_on(plan, tmp_path, monkeypatch):
    kept, seen = tmp_path / "kept.json", []

    def stop(name, done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity.measure(plan, ("int4", "plain"), SETTINGS, kept=kept, progress=stop)
    real = sensitivity.measure_linear
    monkeypatch.setattr(
        sensitivity, "measure_linear", lambda p, job, *rest: seen.append(job.name) or real(p, job, *rest)
    )
    whole = sensitivity.measure(plan, ("int4", "plain"), SETTINGS, kept=kept)
    assert seen == [job.name for job in plan.jobs[4:]]
    assert {name: list(o) for name, o in whole.items()} == sensitivity.measure(
        plan, ("int4", "plain"), SETTINGS
    )


def test_unknown_formats(plan):
    with pytest.raises(ValueError, match="formats: expected some of int4, nvfp4, awq, plain, got int8"):
        sensitivity.measure(plan, ("int4", "int8"), SETTINGS)


def test_a_model_of_any_names_may_mix_every_format(tmp_path):
    """Three linears that differ in what four bits do to them: low rank, outliers, and one of little use."""
    draw = torch.Generator().manual_seed(0)
    spiky = torch.randn(256, 256, generator=draw)
    spiky[::7, ::5] *= 60
    tensors = {
        "blocks.0.low.weight": torch.randn(256, 16, generator=draw) @ torch.randn(16, 256, generator=draw),
        "blocks.0.spiky.weight": spiky,
        "blocks.0.even.weight": torch.randn(256, 256, generator=draw),
    }
    plan = make_plan(open_source(tiny.write(tmp_path / "model.safetensors", tensors)), rank=16)
    found = sensitivity.measure(plan, sensitivity.FORMATS, SETTINGS)
    kinds = {(o.precision, o.rank) for o in found["blocks.0.even"]}
    assert {("int4", 0), ("nvfp4", 256), ("awq", 0), ("plain", 0)} <= kinds
    low = next(o for o in found["blocks.0.low"] if (o.precision, o.rank) == ("int4", 16))
    assert low.error < 0.01
    limit = 3 * stored_bytes("nvfp4", 256, 256, 16) + 20_000
    choice = sensitivity.choose(plan, found, Limit(nbytes=limit))
    target = tmp_path / "out.safetensors"
    stream.quantize(sensitivity.chosen(plan, choice), target, SETTINGS)
    info = open_checkpoint(target).info
    assert {name: (i.spec.format, i.rank) for name, i in info.items()} == {
        name: (o.precision, o.rank) for name, o in choice.items()
    }
    assert choice["blocks.0.low"].rank == 16


def test_what_a_16_bit_linear_cannot_fold_is_not_centred(source):
    """qkv in 16 bits keeps its bias, so the mean of the attention's output stays, in both streams."""
    centred = make_plan(open_source(source), rank=16, centred=True)
    choice = {
        job.name: Option(
            "plain" if job.name == "transformer_blocks.0.qkv_proj" else job.precision, job.rank, 0, 0
        )
        for job in centred.jobs
    }
    jobs = {job.name: job for job in sensitivity.chosen(centred, choice).jobs}
    assert jobs["transformer_blocks.0.out_proj"].center is None
    assert jobs["transformer_blocks.0.out_proj_context"].center is None
    assert jobs["transformer_blocks.0.qkv_proj_context"].folds == ()
    assert [fold.input for fold in jobs["transformer_blocks.0.norm1.linear"].folds] == [
        "double_blocks.0.img_mlp.0"
    ]
    assert jobs["transformer_blocks.0.mlp_fc1"].center == "double_blocks.0.img_mlp.0"


def test_command_line_by_size(source, tmp_path):
    target = tmp_path / "out.safetensors"
    done = svdquant(source, target, "--budget", "900KB", "--quiet")
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size <= 900 * 1024
    told = json.loads((tmp_path / "out.choices.json").read_text())
    assert told["limit"] == {"nbytes": 921600, "error": None}
    assert set(told["linears"]) == {job.name for job in make_plan(open_source(source), rank=16).jobs}
    assert "linears (plain: 16 bits)" in done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.choices.json", "out.safetensors"]
    assert json.loads(open_checkpoint(target).metadata["svdquant_limit"])["nbytes"] == 921600


def test_command_line_by_error(source, tmp_path):
    done = svdquant(
        source, tmp_path / "out.safetensors", "--error", "6%", "--formats", "nvfp4,plain", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out.choices.json").read_text())
    assert told["measured_error"] <= 0.06
    assert {one["precision"] for one in told["linears"].values()} <= {"nvfp4", "awq", "plain"}


BAD = {
    "both": (("--budget", "1GB", "--error", "5"), "expected one of them, got both"),
    "size": (("--budget", "large"), "expected a size such as 6.5GB, 900MB"),
    "percentage": (("--error", "small"), "expected a percentage above 0, such as 5, got 'small'"),
    "formats-alone": (("--formats", "int4"), "expected --budget or --error beside it"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_command_line_refuses(source, tmp_path, arguments, message):
    done = svdquant(source, tmp_path / "out.safetensors", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_missing_statistics_are_told_before_anything_is_measured(plan, tmp_path):
    with pytest.raises(ValueError, match="recipe best: expected statistics of every linear"):
        choices.decide(
            plan, Limit(error=0.1), ("int4",), tmp_path / "out.safetensors", stream.Settings("best")
        )
    assert list(tmp_path.iterdir()) == []
