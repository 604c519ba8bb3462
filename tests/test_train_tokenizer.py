"""The losses are the published ones; the recipes are the published ones; training learns."""
import argparse
import math

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizer
from support import checkpoints, data, loops, pictures, runtime, sources
import train_tokenizer as stage1
from helpers import assert_same, call, error_line, fill_module, golden, logged, newest, refused

# A model so small that a step takes milliseconds, with every term of the objective switched on.
TINY = ["--blocks", 1, "--image-size", 16, "--bits", 6]
EVERYTHING = [*TINY, "--gan-weight", 0.1, "--discriminator", "blurpool", "--lecam-weight", 0.05,
              "--entropy-weight", 0.1, "--entropy-anneal-steps", 4, "--adaptive-gan-weight",
              "--global-batch-size", 4, "--warmup", 2, "--log-every", 1, "--checkpoint-every", 1]
CLIPS = ["--preset", "toy-video", "--image-size", 16, "--bits", 6, "--frames", 5, "--global-batch-size", 2,
         "--log-every", 1]


def train(directory, *flags):
    """Train in this process."""
    call(stage1, "--results-dir", directory, *flags)


# ---- networks and losses ----------------------------------------------------------------------------------

def test_discriminators_and_losses_equal_the_official_ones():
    expected = golden("gan")
    patchgan, blurpool, patchgan_3d = [fill_module(kind(), "loss.discriminator.") for kind in (
        stage1.PatchGAN, stage1.BlurPoolDiscriminator, stage1.PatchGAN3D)]
    x = expected["x2d"]
    with torch.no_grad():
        real, fake = patchgan(x), patchgan(-x)
        for logits, name in ((real, "patchgan2d"), (fake, "patchgan2d_neg"),
                             (blurpool(x[:, :, :32, :32]), "blurgan2d"),
                             (patchgan_3d(expected["x3d"]), "patchgan3d")):
            torch.testing.assert_close(logits, expected[name], atol=1e-5, rtol=0)
    regulariser, lecam = stage1.lecam_loss(torch.zeros(2), real, fake)
    for value, name in ((lecam[0], "lecam_real_ema"), (lecam[1], "lecam_fake_ema"), (regulariser, "lecam"),
                        (stage1.lecam_loss(torch.zeros(2), 8 * real, 8 * fake)[0], "lecam_x8"),
                        (stage1.hinge_loss(real, fake), "hinge_d"),
                        (stage1.hinge_loss(8 * real, 8 * fake), "hinge_d_x8"),
                        (stage1.non_saturating_loss(fake), "non_saturating_g"),
                        (stage1.non_saturating_loss(8 * fake), "non_saturating_g_x8")):
        assert math.isclose(float(value), expected[name].item(), rel_tol=1e-6), name
    _, after = stage1.lecam_loss(torch.tensor([1.0, -1.0]), torch.full((2, 1), math.nan), torch.ones(2, 1))
    assert after[0] == 1 and after[1] == pytest.approx(-0.998)             # a batch with NaNs moves nothing


# ---- recipes ----------------------------------------------------------------------------------------------

# What the published tokenizers were trained with: section 4.1 of the paper and, where it is silent (eps, EMA,
# LeCAM, schedules in steps), the settings of the official code. An epoch of this test has 1,000 steps.
OFFICIAL = dict(
    global_batch_size=256, accumulation=1, flip=False, resize=None, lr=1e-4, lr_schedule="milestones",
    warmup=0, final_lr=0.0, betas=(0.5, 0.9), max_grad_norm=0.0, ema_decay=0.999, ema_warmup=False,
    l1_weight=1.0, l2_weight=0.0, perceptual_weight=1.0, gan_weight=0.1, adaptive_gan_weight=False,
    gan_start=0, discriminator="patchgan", lecam_weight=0.05, entropy_weight=0.1, entropy="exact", tau=0.01,
    entropy_eps=1e-5, entropy_anneal_steps=0, commitment_weight=0.25)
OFFICIALLY = {
    "in1k-256": dict(length=270_000, milestones=[200_000, 250_000]),
    "in1k-128": dict(length=350_000, milestones=[250_000, 300_000], lecam_weight=0.01),
    "pt-256-2^18": dict(length=1_500_000, milestones=[799_999, 999_999]),
    "pt-256-2^14": dict(length=1_500_000, milestones=[], lr_schedule="cosine", warmup=5000, final_lr=0.01,
                        discriminator="blurpool"),
    "ucf-128": dict(length=2_000_000, milestones=[], lr_schedule="cosine", warmup=2000, final_lr=0.01,
                    global_batch_size=128, gan_weight=0.3, discriminator="patchgan-3d")}
# Flags that are no part of a recipe: where, how fast, what is kept and shown.
FREE = set("""preset data_path val_data_path split_list val_split_list init_from freeze results_dir resume
    keep weights_dir mixed_precision channels_last compile activation_checkpointing num_workers device
    frame_stride global_seed log_every checkpoint_every dry_run""".split())


@pytest.mark.parametrize("preset", OFFICIALLY)
def test_every_flag_of_a_published_recipe_is_the_official_one(preset):
    args = stage1.get_args(["--preset", preset])
    config = stage1.TOKENIZER_PRESETS[preset]
    assert runtime.config_from_args(config, args) == config
    found = {name: value for name, value in vars(args).items() if name not in FREE | vars(config).keys()}
    found["length"], found["warmup"], *found["milestones"] = [
        loops.to_steps(text, 1000)
        for text in (args.length, stage1.TOKENIZER_RECIPES[preset]["warmup"], *args.milestones)]
    assert found == {**OFFICIAL, **OFFICIALLY[preset]}
    expected = golden("lfq_losses")                                        # made with official eps and tau
    z = expected["z"].requires_grad_()
    lfq = tokenizer.LFQ(tokenizer.TokenizerConfig(bits=12))
    terms, _ = lfq.losses(z, lfq(z)[0], args.tau, args.entropy_eps, None)
    model = argparse.Namespace(quantizer=lfq)
    loss = stage1.objective(terms, args, 0, model)
    official = 0.1 * expected["entropy_loss"] + 0.25 * expected["commitment"]
    assert math.isclose(loss.item(), official.item(), rel_tol=1e-6)
    terms["entropy"].backward()
    assert (z.grad - expected["entropy_grad"]).abs().max() <= 2e-5 * expected["entropy_grad"].abs().max()


@pytest.mark.parametrize("flags, rates", [
    (["--lr-schedule", "constant"], {0: 0, 5: 0.5, 10: 1, 100: 1}),
    (["--lr-schedule", "milestones"], {5: 0.5, 19: 1, 20: 0.1, 49: 0.1, 50: 0.01, 100: 0.01}),
    (["--lr-schedule", "cosine", "--final-lr", "0.01"], {5: 0.5, 10: 1, 55: 0.505, 100: 0.01}),
    (["--lr-schedule", "linear", "--final-lr", "0"], {5: 0.5, 10: 1, 55: 0.5, 100: 0})])
def test_learning_rate_hits_its_landmarks(flags, rates):
    args = stage1.get_args(["--lr", "1", *flags])
    assert [stage1.learning_rate(step, 101, 10, [20, 50], args) for step in rates] == pytest.approx(
        list(rates.values()))


@pytest.mark.parametrize("flags, steps", [
    ([], 50), (["--length", 1200], 50), (["--length", 600], 30), (["--length", 9000], 50),
    (["--length", 600, "--warmup", 50], 50), (["--length", "0.032ep"], 1), (["--length", 1], 0)])
def test_a_run_shorter_than_its_recipe_warms_up_for_a_twentieth(tmp_path, capsys, flags, steps):
    train(tmp_path / "run", "--dry-run", *flags)
    assert f"warm-up {steps} steps" in capsys.readouterr().out


# ---- terms ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_term_without_a_weight_is_a_bug_and_one_with_it_is_shown(tmp_path, monkeypatch, capsys):
    class Round(tokenizer.LFQ):
        """With a term of its own."""

        def losses(self, z, *rest):
            terms, report = super().losses(z, *rest)
            return {**terms, "roundness": (z.abs() - 1).square().mean()}, report

    monkeypatch.setitem(tokenizer.QUANTIZERS, "round", Round)
    flags = [*TINY, "--quantizer", "round", "--global-batch-size", 4, "--length", 1]
    with pytest.raises(AssertionError, match="--roundness-weight"):        # with a traceback, in no one line
        train(tmp_path / "a", *flags)
    Round.own_terms = {"roundness": 0.5}
    train(tmp_path / "b", *flags)
    assert "loss/roundness" in logged(tmp_path / "b")[1] and "| roundness " in capsys.readouterr().out


# ---- learning ---------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--accumulation", 2], ["--compile"]])
def test_same_gradient_however_it_is_computed(tmp_path, monkeypatch, flags):
    compile = torch.nn.Module.compile                                    # inductor would take a minute
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile(self, backend="eager", **kw))
    # Entropy and LeCAM see micro-batches, as --help says; everything else must not notice.
    same = [*TINY, "--entropy-weight", 0, "--global-batch-size", 4, "--length", 2, "--lr", 5e-5, "--warmup",
            0]
    train(tmp_path / "plain", *same)
    train(tmp_path / "other", *same, *flags)
    other = newest(tmp_path / "other")["model"]
    for name, tensor in newest(tmp_path / "plain")["model"].items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
def test_without_the_entropy_term_the_codebook_collapses(tmp_path):
    flags = ["--data-path", "generated", "--length", 150, "--image-size", 16, "--log-every", 75]
    bits = []
    for weight in (0.0, 0.02):
        train(tmp_path / str(weight), *flags, "--entropy-weight", weight)
        log = logged(tmp_path / str(weight))
        bits.append(log[150]["codebook_bits"])
        assert log[150]["loss/l1"] < 0.8 * log[75]["loss/l1"] and log[150]["grid_psnr"] > 13       # it learns
    assert bits[0] < bits[1] - 1.5, bits                                   # less than a third of the codes


@pytest.mark.slow
def test_inflated_training_starts_from_the_image_tokenizer(tmp_path):
    train(tmp_path / "images", *TINY, "--channel-multipliers", 1, 1, 2, "--length", 1)
    train(tmp_path / "clips", *CLIPS, "--init-from", tmp_path / "images", "--length", 1, "--lr", 0)
    images, clips = newest(tmp_path / "images")["ema"], newest(tmp_path / "clips")["model"]
    name = "encoder.conv_in.weight"
    assert torch.equal(clips[name][:, :, -1], images[name]) and not clips[name][:, :, :-1].any()
    model, info = checkpoints.load_tokenizer(tmp_path / "clips")
    assert model.encode(torch.zeros(1, 3, 5, 16, 16)).shape == (1, 2, 2, 2) and info["preset"] == "custom"


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run of two steps with every term of the objective."""
    folder = tmp_path_factory.mktemp("two")
    train(folder, *EVERYTHING, "--length", 2)
    return folder


@pytest.mark.slow
def test_fine_tuning_starts_with_both_networks_of_a_file(tmp_path, two_steps, capsys):
    flags = [*EVERYTHING, "--init-from", two_steps, "--length", 1]
    train(tmp_path / "b", *flags, "--lr", 0)
    before, after = newest(two_steps), newest(tmp_path / "b")
    assert_same(dict(before["ema"]), dict(after["model"]))
    assert_same(dict(before["discriminator"]), dict(after["discriminator"]))
    assert after["step"] == 1 and "anew: nothing" in capsys.readouterr().out
    train(tmp_path / "c", *flags, "--bits", 5, "--gan-weight", 0)
    said = capsys.readouterr().out
    assert all(name in said for name in ("encoder.conv_out", "decoder.conv_in", "decoder.adaptive.0.beta"))
    refused("; give --channels 32$", train, tmp_path / "d", *flags, "--channels", 64)


@pytest.mark.slow
def test_a_batch_for_fine_tuning_is_lowered_to_a_small_set(tmp_path, two_steps, capsys, monkeypatch):
    for i in range(7):
        pictures.save_image(tmp_path / "photos" / f"{i}.png", np.full((16, 16, 3), 30 * i, np.uint8))
    flags = [*EVERYTHING, "--data-path", tmp_path / "photos", "--global-batch-size", 64, "--length", "2ep"]
    refused("size 64 is more than the 7 images of .*; lower it", train, tmp_path / "a", *flags)
    flags += ["--init-from", two_steps]
    for more, size in (([], 7), (["--accumulation", 3], 6), (["--accumulation", 3, "--resume"], 6)):
        train(tmp_path / str(size), *flags, *more)
        out = capsys.readouterr().out
        assert f"--global-batch-size 64 is lowered to {size}, as " in out
        assert "grid_psnr is of training" in out
        assert newest(tmp_path / str(size))["step"] == 2
    train(tmp_path / "b", *flags, "--global-batch-size", 5, "--dry-run")
    assert "lowered" not in capsys.readouterr().out
    refused("too few for 1 ranks and --accumulation 8", train, tmp_path / "c", *flags, "--accumulation", 8)
    monkeypatch.setattr(runtime, "world_size", lambda: 3)                  # which each need two
    args = stage1.get_args([*map(str, flags), "--accumulation", "2"])
    assert len(stage1.build_datasets(args)[0]) == 7 and args.global_batch_size == 6


@pytest.mark.slow
def test_a_frozen_encoder_leaves_every_code_as_it_was(tmp_path, two_steps):
    train(tmp_path, *EVERYTHING, "--init-from", two_steps, "--freeze", "encoder", "--length", 3)
    old, new = [checkpoints.load_tokenizer(path)[0] for path in (two_steps, tmp_path)]
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    ids = old.encode(x)
    assert torch.equal(ids, new.encode(x)) and not torch.equal(old.decode(ids), new.decode(ids))


# ---- flags and mistakes -----------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--mixed-precision", "bf16", "--image-size", 8], ["--mixed-precision", "fp16", "--gan-weight", 0],
    ["--channels-last", "--flip", "--num-workers", 1, "--lr-schedule", "cosine", "--warmup", "0.0004ep"],
    ["--activation-checkpointing", "--upsampler", "nearest", "--downsampler", "average"],
    ["--quantizer", "vq", "--codebook-size", 33, "--no-adaptive-norm", "--max-grad-norm", 1],
    ["--discriminator", "patchgan", "--image-size", 32, "--global-batch-size", 2],
    ["--gan-start", 2, "--accumulation", 2], ["--quantizer", "bsq", "--entropy", "bits"],
    ["--quantizer", "fsq"], ["--quantizer", "simvq", "--codebook-size", 33],
    ["--bits", 32, "--groups", 4, "--entropy", "groups"]])
def test_every_training_flag_runs(tmp_path, flags):
    train(tmp_path, *EVERYTHING, "--length", 3, "--checkpoint-every", 3, *flags)
    assert all(math.isfinite(v) for v in logged(tmp_path)[3].values() if isinstance(v, float))
    assert (tmp_path / "reconstructions-00000003.png").exists()


def test_usage_and_dead_bits_are_those_of_each_group(capsys):
    lfq = tokenizer.LFQ(tokenizer.TokenizerConfig(bits=32, groups=4))
    ids = torch.arange(256) | torch.arange(256) // 128 << 8 | 1 << 31      # all codes, two, one and one
    usage = lfq.count(ids)
    report = stage1.usage_report(usage, lfq)
    assert report["usage"] == (256 + 2 + 1 + 1) / 1024 and not usage.any()
    assert report["perplexity"] == pytest.approx((256 + 2 + 1 + 1) / 4)
    assert report["bit_balance"] == [0.5] * 9 + [0] * 22 + [1] and report["dead_bits"] == 23
    assert f"bits {list(range(9, 32))} are dead" in capsys.readouterr().out


@pytest.mark.slow
def test_clips_train_with_their_discriminator_and_an_ema_out_of_the_graph(tmp_path, monkeypatch):
    seen = []
    real = stage1.reconstructed
    monkeypatch.setattr(stage1, "reconstructed", lambda x, ema: seen.extend(ema.parameters()) or real(x, ema))
    train(tmp_path, *CLIPS, "--length", 2, "--gan-weight", 0.1, "--lecam-weight", 0.05, "--channels-last")
    log = logged(tmp_path)[2]
    assert {"loss/gan", "loss/discriminator", "loss/lecam", "grid_psnr", "usage"} <= log.keys()
    assert (tmp_path / "reconstructions-00000002.webp").exists()
    assert seen and not any(p.requires_grad or p.grad_fn for p in seen)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_many_stop(tmp_path, monkeypatch):
    calls = []
    real = pictures.to_float

    def to_float(images):
        if len(images) != 4:                                               # a preview, no training batch
            return real(images)
        calls.append(images)
        return real(images) * (math.nan if len(calls) in (2, 3) or len(calls) > 5 else 1)

    monkeypatch.setattr(pictures, "to_float", to_float)
    refused("loss/l1 was not finite in 10 steps in a row", train, tmp_path, *EVERYTHING, "--length", 20,
            "--lr-schedule", "constant")
    assert len(calls) == 15
    assert newest(tmp_path)["skipped"] == 2 and logged(tmp_path)[5]["skipped_steps"] == 2
    assert all(t.isfinite().all() for t in newest(tmp_path)["model"].values())
    steps = [checkpoints.read(path)["optimizer"]["state"][0]["step"]
             for path in runtime.list_checkpoints(tmp_path)]
    assert steps == [1, 2, 3]                                              # none while steps were skipped


@pytest.mark.slow
@pytest.mark.parametrize("guilty", ["hinge_loss", "lecam_loss", "non_saturating_loss"])
def test_a_step_that_either_gradient_spoils_changes_nothing(tmp_path, monkeypatch, guilty):
    real = getattr(stage1, guilty)
    calls = []

    def spoilt(*logits):
        calls.append(logits)
        bad = math.nan if len(calls) == 4 else 1                           # the second half of step 2
        found = real(*logits)
        return found * bad if torch.is_tensor(found) else (found[0] * bad, found[1])

    flags = [*TINY, "--image-size", 32, "--gan-weight", 0.1, "--lecam-weight", 0.05, "--global-batch-size", 4,
             "--accumulation", 2, "--warmup", 0, "--lr-schedule", "constant", "--log-every", 1]
    train(tmp_path / "one", *flags, "--length", 1)
    monkeypatch.setattr(stage1, guilty, spoilt)
    train(tmp_path / "two", *flags, "--length", 2)
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    assert (one.pop("step"), one.pop("skipped"), two.pop("step"), two.pop("skipped")) == (1, 0, 2, 1)
    del one["rng"], two["rng"]
    assert_same(one, two)                            # weights, EMA, Adam's states, LeCAM, BatchNorm's means
    assert logged(tmp_path / "two")[2].keys() == {"step", "lr", "skipped_steps", "grid_psnr"}


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_signs_of_life_come_early(tmp_path, capsys):
    train(tmp_path / "run", "--preset", "in1k-256", "--dry-run")
    plan = capsys.readouterr().out
    assert "encoder 49.75 M, decoder 65.38 M" in plan and "262,144 ids" in plan
    assert not (tmp_path / "run").exists()
    train(tmp_path, *TINY, "--global-batch-size", 2, "--length", 12, "--log-every", 8)
    said = [line.split("/")[0] for line in capsys.readouterr().out.splitlines() if " | ETA " in line]
    assert said == [f"step {step}" for step in (1, 2, 5, 8, 10, 12)] and list(logged(tmp_path)) == [8, 12]


@pytest.mark.slow
def test_a_checkpoint_outlives_its_picture_and_only_some_are_kept(tmp_path, monkeypatch):
    flags = [*TINY, "--global-batch-size", 2, "--checkpoint-every", 1, "--keep", 1]
    train(tmp_path, *flags, "--length", 2)
    assert [path.name for path in runtime.list_checkpoints(tmp_path)] == ["step-00000002.pt"]

    def full(*grid):
        raise OSError(28, "No space left on device", "x.png")
    monkeypatch.setattr(pictures, "save_samples", full)
    with pytest.raises(OSError):
        train(tmp_path, *flags, "--length", 3, "--resume")
    assert newest(tmp_path)["step"] == 3


@pytest.mark.parametrize("flags, message", [
    (["--data-path", "/no/such/folder"], "/no/such/folder"),
    (["--global-batch-size", 0], "--global-batch-size"),
    (["--global-batch-size", 10, "--accumulation", 3], "--global-batch-size"),
    (["--global-batch-size", 100000], "--global-batch-size"), (["--length", "0.0001ep"], "--length 0.0001ep"),
    (["--length", 0], "give at least 1"), (["--betas", 0.5, 1], "--betas"), (["--final-lr", 2], "--final-lr"),
    (["--image-size", 30], "30"), (["--channels", 40], "channels 40"), (["--length", "ten"], "--length"),
    (["--perceptual-weight", 1, "--weights-dir", "/dev/null/x"], "--perceptual-weight 0"),
    (["--resume", "/no/such.pt"], "/no/such.pt"), (["--tau", 0], "tau"),
    (["--results-dir", "/dev/null/x"], "--results-dir: /dev/null may not be written to"),
    (["--gan-weight", 1, "--image-size", 16], "--discriminator blurpool"),
    (["--gan-weight", 1, "--discriminator", "patchgan-3d"], "patchgan-3d"),
    (["--init-from", "/no/such.pt"], "/no/such.pt"), (["--split-list", "x.txt"], "--val-split-list"),
    (["--bits", 10, "--groups", 4], "groups 4 of bits 10"), (["--levels"], "levels"),
    (["--preset", "toy-video", "--frames", 6], "frames 6"), (["--nonsense"], "--nonsense")])
def test_mistakes_name_the_flag(tmp_path, flags, message):
    for dry in ([], ["--dry-run"] if "--weights-dir" not in flags else []):
        assert message in error_line(stage1, "--results-dir", tmp_path / "run", *flags, *dry)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_damaged_older_and_second_runs_are_told_apart(tmp_path, capsys):
    train(tmp_path, *EVERYTHING, "--length", 3, "--resume")               # there is nothing to continue yet
    assert "starting from scratch" in capsys.readouterr().out
    assert newest(tmp_path)["step"] == 3
    first, second, third = [tmp_path / f"step-0000000{step}.pt" for step in (1, 2, 3)]
    whole = third.read_bytes()
    refused("holds newer ones, up to step 3", train, tmp_path, *EVERYTHING, "--length", 4, "--resume", first)
    flipped = bytearray(whole)
    flipped[whole.index(b"exp_avg") + len(whole) // 2] ^= 1                # somewhere among the tensors
    for damaged in (bytes(flipped), whole[:-100]):
        third.write_bytes(damaged)
        (tmp_path / ".step-00000009.1.pt").write_bytes(b"of a kill")
        train(tmp_path, *EVERYTHING, "--length", 3, "--resume")
        said = capsys.readouterr().out
        assert "trying the one before" in said and f"resuming {second} at step 2" in said
        assert newest(tmp_path)["step"] == 3 and not list(tmp_path.glob(".step-*"))


@pytest.mark.slow
def test_a_run_is_neither_overwritten_nor_continued_otherwise(tmp_path):
    train(tmp_path, *EVERYTHING, "--length", 1)
    path = tmp_path / "step-00000001.pt"
    before = path.read_bytes()
    for flags, message in ((["--length", 2], "--resume"),
                           (["--length", 2, "--resume", "--bits", 7], "bits: 6"),
                           (["--length", 2, "--resume", "--gan-weight", 0], "--gan-weight"),
                           (["--length", 2, "--resume", "--data-path", "generated"], "fingerprint"),
                           (["--length", 2, "--resume", "--global-batch-size", 8], "global_batch_size: 4")):
        for dry in ([], ["--dry-run"]):
            refused(message, train, tmp_path, *EVERYTHING, *flags, *dry)
    assert path.read_bytes() == before
    saved = torch.load(path, weights_only=True)
    state = saved["optimizer"]["state"]
    for name, damage in (("lecam", {k: v for k, v in saved.items() if k != "lecam"}),
                         ("optimizer", {**saved, "optimizer": {**saved["optimizer"], "state": {
                             key: {**state[key], "exp_avg": torch.zeros(3)} for key in state}}})):
        torch.save(damage, path)
        refused(name, train, tmp_path, *EVERYTHING, "--length", 2, "--resume")
    saved["dataset"] = {"length": saved["dataset"]["length"]}             # as older versions wrote it
    for new in ("keep", "milestones"):
        saved["args"].pop(new)
    torch.save(saved, path)
    train(tmp_path, *EVERYTHING, "--length", 2, "--resume", "--betas", 0.8, 0.99)
    assert newest(tmp_path)["optimizer"]["param_groups"][0]["betas"] == [0.8, 0.99]


@pytest.mark.slow
def test_an_unreadable_image_to_look_at_is_left_out(tmp_path, capfd):
    for part, count in (("train", 4), ("val", 3)):
        for i in range(count):
            pictures.save_image(tmp_path / part / f"{i}.png", np.full((16, 16, 3), 60 * i, np.uint8))
    flags = [*TINY, "--data-path", tmp_path, "--global-batch-size", 2, "--length", 1]
    (tmp_path / "val" / "1.png").write_bytes(b"no image")
    train(tmp_path / "a", *flags)
    grid = Image.open(tmp_path / "a" / "reconstructions-00000001.png")
    assert "1.png" in capfd.readouterr().err and grid.width < grid.height * 1.2                 # two columns
    for i in (0, 2):
        (tmp_path / "val" / f"{i}.png").write_bytes(b"no image")
    refused("3 of the 3 images", train, tmp_path / "b", *flags)
