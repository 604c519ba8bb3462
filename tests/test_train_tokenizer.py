"""The losses are the published ones; training is exact over ranks, over interruptions, and learns."""
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import runtime
import tokenizer as tok
import train_tokenizer as stage1
from helpers import ROOT, assert_same, environment, fill_module, golden, logged, newest, run_script

# A model so small that a step takes milliseconds, with every term of the objective switched on.
TINY = ["--blocks", 1, "--image-size", 16, "--bits", 6]
EVERYTHING = [
    *TINY,
    "--gan-weight",
    0.1,
    "--discriminator",
    "blurpool",
    "--lecam-weight",
    0.05,
    "--perceptual-weight",
    0,
    "--entropy-weight",
    0.1,
    "--entropy-anneal-steps",
    4,
    "--adaptive-gan-weight",
    "--global-batch-size",
    4,
    "--warmup",
    2,
    "--log-every",
    1,
    "--checkpoint-every",
    1,
]


def train(directory, *flags):
    """Train in this process: starting Python and torch anew would take longer than these runs."""
    stage1.main(stage1.get_args(["--results-dir", str(directory), *map(str, flags)]))


def train_as_user(directory, *flags, **kwargs):
    return run_script("train_tokenizer.py", "--results-dir", directory, *flags, **kwargs)


# ---- networks and losses ----------------------------------------------------------------------------------

def test_discriminators_and_their_losses_equal_the_official_ones():
    expected = golden("gan")
    patchgan = fill_module(stage1.PatchGAN(), "loss.discriminator.")
    blurpool = fill_module(stage1.BlurPoolDiscriminator(), "loss.discriminator.")
    with torch.no_grad():
        real, fake = patchgan(expected["x2d"]), patchgan(-expected["x2d"])
        torch.testing.assert_close(real, expected["patchgan2d"], atol=1e-5, rtol=0)
        torch.testing.assert_close(fake, expected["patchgan2d_neg"], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            blurpool(expected["x2d"][:, :, :32, :32]), expected["blurgan2d"], atol=1e-5, rtol=0
        )

    def close(value, name):
        assert math.isclose(float(value), expected[name].item(), rel_tol=1e-6), name
    averages = stage1.update_lecam(torch.zeros(2), real, fake)
    close(averages[0], "lecam_real_ema"), close(averages[1], "lecam_fake_ema")
    (
        close(stage1.hinge_loss(real, fake), "hinge_d"),
        close(stage1.hinge_loss(8 * real, 8 * fake), "hinge_d_x8"),
    )
    close(stage1.non_saturating_loss(fake), "non_saturating_g")
    close(stage1.non_saturating_loss(8 * fake), "non_saturating_g_x8")
    close(stage1.lecam_loss(averages, real, fake), "lecam")
    close(stage1.lecam_loss(8 * averages, 8 * real, 8 * fake), "lecam_x8")


def test_lpips_equals_the_reference_package():
    lpips = pytest.importorskip("lpips")
    for net, taps in (("vgg", 5), ("alex", 5)):
        torch.manual_seed(0)
        reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
        ours = stage1.LPIPS(net)
        trunk = {
            f"features.{name.split('.', 1)[1]}": tensor for name, tensor in reference.net.state_dict().items()
        }
        heads = {f"heads.{i}": getattr(reference, f"lin{i}").model[1].weight for i in range(taps)}
        runtime.load_state_strictly(ours, {**trunk, **heads}, "lpips")
        x, y = torch.rand(2, 3, 64, 80) * 2 - 1, torch.rand(2, 3, 64, 80) * 2 - 1
        with torch.no_grad():
            torch.testing.assert_close(ours(x, y), reference(x, y).flatten(), atol=1e-6, rtol=1e-6)
            assert ours(x, x).abs().max() == 0


def test_lpips_comes_out_of_a_published_tokenizer_file(tmp_path):
    torch.manual_seed(0)
    source, state = stage1.LPIPS("vgg"), {"encoder.x": torch.zeros(1)}
    for i, layer in enumerate(source.features):
        for name, tensor in layer.named_parameters():
            part = 1 + sum(i > tap for tap in stage1.LPIPS_TAPS["vgg"])
            state[f"loss.perceptual_loss.net.slice{part}.{i}.{name}"] = tensor
    for i, head in enumerate(source.heads):
        state[f"loss.perceptual_loss.lin{i}.model.1.weight"] = head
    state["loss.perceptual_loss.scaling_layer.shift"] = torch.zeros(1, 3, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    loaded = stage1.load_lpips("vgg", path=tmp_path / "a.ckpt")
    assert_same(dict(loaded.state_dict()), dict(source.state_dict()))
    torch.save({"state_dict": {k: v for k, v in state.items() if "lin3" not in k}}, tmp_path / "b.ckpt")
    with pytest.raises(runtime.UserError, match="heads.3"):
        stage1.load_lpips("vgg", path=tmp_path / "b.ckpt")


def test_learning_rate_schedules_hit_their_landmarks():
    def at(step, schedule, **kwargs):
        return stage1.learning_rate_factor(step, 100, schedule, **kwargs)
    assert [at(s, "constant", warmup=10) for s in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    assert [at(s, "milestones", milestones=(20, 50)) for s in (19, 20, 50)] == pytest.approx([1, 0.1, 0.01])
    assert [at(s, "cosine", warmup=20, final=0.01) for s in (20, 60, 100)] == pytest.approx([1, 0.505, 0.01])
    assert [at(s, "linear", warmup=20) for s in (10, 20, 60, 100)] == pytest.approx([0.5, 1, 0.5, 0])


def test_presets_carry_the_published_hyper_parameters():
    args = stage1.get_args(["--preset", "in1k-128"])
    assert (args.lr, args.global_batch_size, args.beta1, args.beta2, args.ema_decay) == (
        1e-4,
        256,
        0.5,
        0.9,
        0.999,
    )
    assert (
        args.l1_weight,
        args.perceptual_weight,
        args.gan_weight,
        args.entropy_weight,
        args.commitment_weight,
        args.lecam_weight,
        args.tau,
    ) == (1, 1, 0.1, 0.1, 0.25, 0.01, 0.01)
    assert [runtime.to_steps(d, 5004) for d in (args.length, *args.milestones)] == [
        350 * 5004,
        250 * 5004,
        300 * 5004,
    ]
    assert stage1.get_args(["--preset", "in1k-256"]).lecam_weight == 0.05
    cosine = stage1.get_args(["--preset", "pt-256-2^14"])
    assert (cosine.lr_schedule, cosine.warmup, cosine.final_lr, cosine.length) == (
        "cosine",
        "5000",
        0.01,
        "1500000",
    )
    assert (
        cosine.discriminator == "blurpool" and stage1.config_from_args(cosine) == tok.PRESETS["pt-256-2^14"]
    )


# ---- exactness --------------------------------------------------------------------------------------------

def test_two_ranks_equal_one_process_with_the_double_batch(tmp_path):
    flags = [*EVERYTHING, "--length", 3, "--lr", 1e-4]
    train(tmp_path / "one", *flags)
    train_as_user(tmp_path / "two", *flags, ranks=2)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert one.keys() == two.keys() == {1, 2, 3}
    for step in one:
        assert one[step].keys() == two[step].keys()
        for name, value in one[step].items():
            assert two[step][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)
    for part in ("model", "ema", "discriminator", "discriminator_ema"):
        for name, tensor in newest(tmp_path / "one")[part].items():
            torch.testing.assert_close(
                newest(tmp_path / "two")[part][name], tensor, atol=1e-5, rtol=1e-5, msg=name
            )
    torch.testing.assert_close(newest(tmp_path / "two")["lecam"], newest(tmp_path / "one")["lecam"])


def test_accumulation_of_micro_batches_is_the_same_gradient_for_terms_that_are_means(tmp_path):
    # Entropy and LeCAM see micro-batches, as --help says; everything else must not notice.
    flags = [
        *TINY,
        "--entropy-weight",
        0,
        "--gan-weight",
        0,
        "--perceptual-weight",
        0,
        "--global-batch-size",
        4,
        "--length",
        3,
        "--lr",
        1e-4,
        "--warmup",
        0,
        "--log-every",
        1,
    ]
    train(tmp_path / "one", *flags)
    train(tmp_path / "two", *flags, "--accumulation", 2)
    one, two = newest(tmp_path / "one")["model"], newest(tmp_path / "two")["model"]
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5, msg=name)


def killed_and_resumed(directory, flags, ranks):
    """Train with `flags`, kill -9 after the checkpoint of step 3, and resume to the end."""
    command = [sys.executable, *(["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
                                 if ranks > 1 else []),
               str(ROOT / "train_tokenizer.py"), "--results-dir", str(directory), *map(str, flags)]
    process = subprocess.Popen(command, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(directory.glob("step-00000003.pt")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (directory / "step-00000008.pt").exists(), "killed too late to prove anything"
    train_as_user(directory, *flags, "--resume", ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_bit_identical_to_uninterrupted(tmp_path, ranks):
    # log-every 3 does not divide the checkpoints' steps: the averages between two lines must survive as well.
    flags = [*EVERYTHING[:-4], "--log-every", 3, "--checkpoint-every", 1, "--length", 8, "--usage-window", 4,
             "--grid-every", 4, "--crop", "random"]
    train_as_user(tmp_path / "whole", *flags, ranks=ranks)
    killed_and_resumed(tmp_path / "killed", flags, ranks)
    whole, killed = newest(tmp_path / "whole"), newest(tmp_path / "killed")
    for checkpoint in (whole, killed):
        checkpoint["args"] = None                                          # --results-dir and --resume differ
    assert_same(whole, killed)
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")


def test_sigterm_saves_and_resume_continues(tmp_path):
    flags = [*EVERYTHING[:-4], "--log-every", 1, "--checkpoint-every", 1000, "--length", 1000]
    command = [
        sys.executable,
        str(ROOT / "train_tokenizer.py"),
        "--results-dir",
        str(tmp_path),
        *map(str, flags),
    ]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and "stopped by signal 15" in rest
    step = newest(tmp_path)["step"]
    train(tmp_path, *flags[:-2], "--length", step + 1, "--resume")
    assert newest(tmp_path)["step"] == step + 1


# ---- learning ---------------------------------------------------------------------------------------------

def test_one_batch_of_8_toy_images_is_overfitted_to_30_db(tmp_path):
    import data
    torch.manual_seed(0)
    dataset = data.build_dataset(None, "train", 32)
    x = data.to_float(torch.stack([dataset[i][0] for i in range(8)]))
    args = stage1.get_args([])
    model = tok.Tokenizer(stage1.config_from_args(args))
    optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(args.beta1, args.beta2))
    for step in range(600):
        optimizer.param_groups[0]["lr"] = args.lr * stage1.learning_rate_factor(step, 600, "linear", 20)
        terms = stage1.generator_terms(args, x, model(x), None, step)
        optimizer.zero_grad()
        sum(term * weight for term, weight in terms.values()).backward()
        optimizer.step()
    with torch.no_grad():
        psnr = -10 * torch.log10(F.mse_loss(model(x)[0].clamp(-1, 1), x) / 4)
    assert psnr > 30, psnr


def test_without_the_entropy_term_the_codebook_collapses(tmp_path):
    flags = ["--data-path", "generated", "--length", 150, "--image-size", 16, "--log-every", 150,
             "--usage-window", 60]
    bits = []
    for weight in (0.0, 0.02):
        train(tmp_path / str(weight), *flags, "--entropy-weight", weight)
        bits.append(logged(tmp_path / str(weight))[150]["codebook_bits"])
    assert bits[0] < bits[1] - 1.5, bits                                   # less than a third of the codes


# ---- flags and mistakes -----------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed-precision", "bf16"],
        ["--mixed-precision", "fp16", "--gan-weight", 0],
        ["--channels-last"],
        ["--activation-checkpointing"],
        ["--quantizer", "vq", "--codebook-size", 33],
        ["--max-grad-norm", 1],
        ["--flip"],
        ["--discriminator", "patchgan", "--image-size", 32],
        ["--disc-start", 1, "--gan-start", 2, "--lecam-start", 2, "--accumulation", 2],
        ["--num-workers", 1],
        ["--lr-schedule", "cosine", "--final-lr", 0.1, "--warmup", "0.0004ep"],
        ["--no-ema-warmup"],
    ],
)
def test_every_training_flag_runs(tmp_path, flags):
    train(tmp_path, *EVERYTHING, "--length", 3, *flags)
    assert all(math.isfinite(v) for v in logged(tmp_path)[3].values() if isinstance(v, float))


def test_compiled_training_runs_and_learns_the_same(tmp_path):
    flags = [*TINY, "--length", 2, "--lr", 1e-4, "--global-batch-size", 4, "--log-every", 1]
    train(tmp_path / "eager", *flags)
    train(tmp_path / "compiled", *flags, "--compile")
    eager, compiled = logged(tmp_path / "eager")[2], logged(tmp_path / "compiled")[2]
    assert compiled["loss/l1"] == pytest.approx(eager["loss/l1"], rel=1e-3)


@pytest.mark.parametrize("broken_steps, stops", [({2, 3}, False), (set(range(2, 30)), True)])
def test_a_loss_that_is_not_finite_skips_the_step_and_ten_in_a_row_stop(
    tmp_path, monkeypatch, broken_steps, stops
):
    calls, real = [], stage1.data.to_float

    def to_float(images):
        if len(images) == 4:  # a training batch, not the fixed grid
            calls.append(len(calls) + 1)
            return real(images) * (math.nan if calls[-1] in broken_steps else 1)
        return real(images)

    monkeypatch.setattr(stage1.data, "to_float", to_float)
    flags = [*EVERYTHING, "--length", 20 if stops else 5, "--lr-schedule", "constant"]
    if stops:
        with pytest.raises(runtime.UserError, match="loss/l1 was not finite in 10 steps in a row"):
            train(tmp_path, *flags)
        assert len(calls) == 11
    else:
        train(tmp_path, *flags)
        assert newest(tmp_path)["skipped"] == 2 and logged(tmp_path)[5]["skipped_steps"] == 2
        assert all(t.isfinite().all() for t in newest(tmp_path)["model"].values())
        before, after = (runtime.load_checkpoint(tmp_path / f"step-0000000{n}.pt") for n in (3, 4))
        assert before["optimizer"]["state"][0]["step"] == 1 and after["optimizer"]["state"][0]["step"] == 2


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    train(tmp_path / "run", "--preset", "in1k-256", "--dry-run")
    plan = capsys.readouterr().out
    assert "encoder 49.75 M, decoder 65.38 M" in plan and "262,144 codes" in plan
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, message", [
    (["--data-path", "/no/such/folder"], "/no/such/folder"),
    (["--global-batch-size", 0], "--global-batch-size"),
    (["--global-batch-size", 10, "--accumulation", 3], "--accumulation"),
    (["--global-batch-size", 100000], "--global-batch-size"),
    (["--image-size", 30], "--image-size"),
    (["--channels", 40], "--channels"),
    (["--length", "ten"], "--length"),
    (["--gan-start", 1, "--disc-start", 2], "--gan-start"),
    (["--perceptual-weight", 1, "--weights-dir", "/dev/null/x"], "--perceptual-weight 0"),
    (["--perceptual-weight", 1, "--lpips-checkpoint", "/no/such.ckpt"], "/no/such.ckpt"),
    (["--resume", "/no/such.pt"], "/no/such.pt"),
    (["--tau", 0], "--tau"),
    (["--gan-weight", 1, "--image-size", 16], "--discriminator blurpool"),
    (["--nonsense"], "--nonsense"),
])
def test_mistakes_name_the_flag(tmp_path, capsys, flags, message):
    with pytest.raises((runtime.UserError, SystemExit)) as caught:
        train(tmp_path / "run", *flags)
    text = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert message in text and len(text.strip().splitlines()) == 1, text
    assert not (tmp_path / "run").exists()


def test_mistakes_end_the_script_with_one_line_and_status_2(tmp_path):
    for flags in (["--data-path", "/no/such/folder"], ["--global-batch-size", 0]):
        result = train_as_user(tmp_path / "run", *flags, check=False)
        assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_run_is_neither_overwritten_nor_continued_with_another_model(tmp_path):
    train(tmp_path, *EVERYTHING, "--length", 1)
    before = (tmp_path / "step-00000001.pt").read_bytes()
    for flags, message in (
        (["--length", 2], "--resume"),
        (["--length", 2, "--resume", "--bits", 7], "bits: 6"),
        (["--length", 2, "--resume", "--global-batch-size", 8], "global_batch_size: 4"),
    ):
        with pytest.raises(runtime.UserError, match=message):
            train(tmp_path, *EVERYTHING, *flags)
    assert (tmp_path / "step-00000001.pt").read_bytes() == before
