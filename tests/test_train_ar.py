"""Tokens are stored once and verified; training is exact over ranks and over interruptions, and learns."""
import json
import math
import multiprocessing
import os
import pathlib
import re
import signal
import socket
import time

import numpy as np
import pytest
import torch
from PIL import Image

import ar_model
import data
import runtime
import sample
import tokenizer as tok
import train_ar
from helpers import ROOT, assert_same, logged, newest

# A model so small that a step takes milliseconds, for tokens of 4 x 4 and 3 + 3 bits.
TINY = ["--split", 3, 3, "--width", 32, "--heads", 2, "--inter-blocks", 1, "--global-batch-size", 4,
        "--warmup", 2, "--log-every", 1, "--grid-size", 3, "--encode-batch-size", 2]
DROPOUT = ["--token-dropout", 0.1, "--attention-dropout", 0.1, "--ffn-dropout", 0.1]
NO_DROPOUT = ["--token-dropout", 0, "--attention-dropout", 0, "--ffn-dropout", 0, "--label-dropout", 0]


@pytest.fixture(autouse=True)
def one_thread():
    """As in child processes: other numbers of threads add in other orders, so bits would differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_tokenizer(path, data_path=None, seed=0, **changes):
    """A checkpoint as train_tokenizer.py leaves it, untrained: 16 x 16 pixels to 4 x 4 codes of 6 bits."""
    torch.manual_seed(seed)
    shape = dict(resolution=16, channels=32, channel_multipliers=(1, 2), blocks=1, mid_blocks=0, patch=2)
    config = tok.TokenizerConfig(**{**shape, "bits": 6, **changes})
    state = tok.Tokenizer(config).state_dict()
    runtime.save_checkpoint(path, {"format": tok.Tokenizer.format, "config": tok.config_to_dict(config),
                                   "step": 7, "model": state, "ema": {}, "args": {"data_path": data_path}})
    return str(path)


def save_images(folder, seed=0, train=40, val=5):
    """Noise of 20 x 18 pixels in three classes, in train/ and val/."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for name in ("ant", "bee", "cat"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (18, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i:02d}.png")
    return str(folder)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """(path of a tokenizer, path of the images that it says it was trained on)."""
    folder = tmp_path_factory.mktemp("stage1")
    images = save_images(folder / "images")
    return save_tokenizer(folder / "tokenizer.pt", images), images


def train(directory, *flags):
    """Train in this process: starting Python and torch anew would take longer than these runs."""
    train_ar.main(train_ar.get_args(["--results-dir", str(directory), *map(str, flags)]))


def run_rank(script, flags, rank, ranks, port):
    """What torchrun starts: `script` (train_ar or sample) as one of several ranks."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    module = {"train_ar": train_ar, "sample": sample}[script]
    runtime.run_script(module.main, lambda: module.get_args(flags))


def start_ranks(script, *flags, ranks):
    """The processes of a run as under torchrun: forks of a server that imports torch once for all tests,
    which is most of the time that a short run takes."""
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train_ar"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [str(flag) for flag in flags]
    processes = [context.Process(target=run_rank, args=(script, flags, rank, ranks, port))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    os.environ.clear()
    os.environ.update(before)
    return processes


def run_ranks(script, *flags, ranks):
    """Run to the end, without errors."""
    processes = start_ranks(script, *flags, ranks=ranks)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * ranks


def kill_when(condition, processes):
    """Kill -9 all processes as soon as `condition()` holds, and wait for their end."""
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.002)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def tokens_in(path):
    """(codes (images, n, N), header) of a tokens file, read without the code under test."""
    header = json.loads(path.with_suffix(".json").read_text())
    return np.fromfile(path, "<u4").reshape(header["shape"]), header


# ---- numbers of the paper ---------------------------------------------------------------------------------

def test_learning_rate_hits_its_landmarks():
    def at(step):
        return train_ar.learning_rate_factor(step, 301, 100, start=0.005, constant=0.05, final=0.1)
    assert [at(0), at(50), at(100), at(110)] == pytest.approx([0.005, 0.5025, 1, 1])
    assert [at(205), at(300), at(400)] == pytest.approx([0.55, 0.1, 0.1])
    assert train_ar.learning_rate_factor(0, 1) == 1


@pytest.mark.parametrize("preset, lr, warmup, epochs, tera", [
    ("AR-B", 3e-4, 6, 300, 0.569), ("AR-L", 3e-4, 6, 300, 1.337), ("AR-XL", 2.4e-4, 7, 350, 2.474)])
def test_presets_carry_the_published_hyper_parameters(preset, lr, warmup, epochs, tera):
    args = train_ar.get_args(["--preset", preset])
    assert (args.lr, args.warmup, args.length) == (lr, f"{warmup}ep", f"{epochs}ep")
    assert args.global_batch_size == 768
    assert (args.beta1, args.beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.95, 0.05, 1)
    assert (args.warmup_start, args.constant_part, args.final_lr, args.ema_decay) == (0.005, 0.05, 0.1, 0)
    assert train_ar.rate_is_per_epoch(args)
    dropouts = (args.token_dropout, args.attention_dropout, args.ffn_dropout, args.label_dropout)
    assert dropouts == (0.1, 0.1, 0.1, 0.1) and args.split == [6, 12]
    args.tokenizer, tokenizer = "it", tok.Tokenizer(tok.TokenizerConfig(blocks=1))
    config = train_ar.config_from_args(args, tokenizer, (256, 256), ["name"] * 1000)
    assert config == ar_model.PRESETS[preset]
    assert train_ar.flops_per_image(config) / 1e12 == pytest.approx(tera, abs=5e-4)


def test_matrices_decay_and_vectors_do_not():
    model = ar_model.ARModel(ar_model.PRESETS["toy"])
    matrices, vectors = train_ar.parameter_groups(model, 0.05)
    assert matrices["weight_decay"] == 0.05 and vectors["weight_decay"] == 0
    assert {id(p) for p in vectors["params"]} == {id(m.weight) for m in model.modules()
                                                  if isinstance(m, ar_model.RMSNorm)}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_mfu_of_a_known_gpu_is_the_part_of_its_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    report = train_ar.speed_report(ar_model.PRESETS["AR-B"], 617, torch.device("cuda"))
    assert report["tflops"] == pytest.approx(351, abs=1)
    assert report["mfu"] == pytest.approx(351 / 989, abs=1e-3)
    assert report["tokens/s"] == 617 * 256
    assert "mfu" not in train_ar.speed_report(ar_model.PRESETS["AR-B"], 617, torch.device("cpu"))


# ---- tokens -----------------------------------------------------------------------------------------------

def test_stored_tokens_are_the_codes_of_every_image(tmp_path, stage1):
    path, images = stage1
    train(tmp_path, *TINY, "--tokenizer", path, "--length", 1)
    tokenizer, info = tok.load_tokenizer(path)
    for name, split, count in (("tokens", "train", 120), ("tokens-val", "val", 15)):
        codes, header = tokens_in(tmp_path / f"{name}.bin")
        dataset = data.build_dataset(images, split, 16)
        expected = tokenizer.encode(data.to_float(torch.stack([dataset[i][0] for i in range(count)])))
        expected = expected.reshape(count, 1, 16).numpy()
        assert codes.shape == expected.shape and (codes == expected).mean() > 0.999
        assert header["labels"] == [i // (count // 3) for i in range(count)] and header["missing"] == []
        assert header["classes"] == ["ant", "bee", "cat"] and header["grid"] == [4, 4]
        made_with = {"path": path, "sha256": info["sha256"], "weights": "raw", "preset": "custom"}
        assert header["tokenizer"] == made_with
        assert header["vocabulary"] == 64 and header["image_size"] == 16 and header["data"]["length"] == count
    assert not list(tmp_path.glob("*.parts"))


def test_ten_crops_are_stored_and_the_seed_chooses_among_them(tmp_path, stage1):
    path, images = stage1
    train(tmp_path, *TINY, "--tokenizer", path, "--length", 1, "--ten-crop")
    codes, header = tokens_in(tmp_path / "tokens.bin")
    dataset, tokenizer = data.build_dataset(images, "train", 16), tok.load_tokenizer(path)[0]
    expected = tokenizer.encode(data.to_float(data.ten_crop(dataset.load(77), 16))).flatten(1)
    assert codes.shape == (120, 10, 16) and header["flips"] and (codes[77] == expected.numpy()).mean() > 0.99
    tokens = train_ar.Tokens(tmp_path / "tokens.bin", header)
    seen = {tuple(tokens[77, seed][0].tolist()) for seed in range(50)}
    assert seen == {tuple(row) for row in codes[77].tolist()}
    assert tokens_in(tmp_path / "tokens-val.bin")[0].shape == (15, 1, 16)


def test_a_broken_image_is_recorded_as_missing_and_skipped(tmp_path):
    images = pathlib.Path(save_images(tmp_path / "images"))
    (images / "train" / "bee" / "03.png").write_bytes(b"no picture")
    flags = [*TINY, "--tokenizer", save_tokenizer(tmp_path / "a.pt"), "--data-path", images, "--length", 30]
    train(tmp_path / "run", *flags)                                       # an epoch: every image is asked for
    codes, header = tokens_in(tmp_path / "run" / "tokens.bin")
    assert header["missing"] == [43] and (codes[43] == train_ar.MISSING).all() and codes[44].max() < 64
    tokens = train_ar.Tokens(tmp_path / "run" / "tokens.bin", header)
    assert tokens[43] is None and tokens[44] is not None

    (images / "train" / "bee" / "04.png").write_bytes(b"no picture")
    with pytest.raises(runtime.UserError, match="broken, more than 1 %"):
        train(tmp_path / "other", *flags)
    assert not (tmp_path / "other" / "tokens.bin").exists()


def test_encoding_continues_where_it_was_interrupted(tmp_path, stage1, monkeypatch):
    flags = [*TINY, "--tokenizer", stage1[0], "--length", 1]
    train(tmp_path / "whole", *flags)
    saved, save_part, parts = [], runtime.save_part, tmp_path / "cut" / "tokens.bin.parts"

    def killed(folder, part, array):
        if folder == parts and len(saved) == 2:
            raise KeyboardInterrupt
        saved.append((folder, part))
        save_part(folder, part, array)
    # The held-out tokens are done first: 15 images in one part. Then 120 images in parts of 32.
    monkeypatch.setattr(runtime, "save_part", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", *flags)
    assert [part for _, part in saved] == [0, 0] and not (tmp_path / "cut" / "tokens.bin").exists()

    with pytest.raises(runtime.UserError, match="tokens.bin.parts .*encode_batch_size: 2 there, 4 here"):
        train(tmp_path / "cut", *flags, "--encode-batch-size", 4)
    monkeypatch.setattr(runtime, "save_part", lambda *args: (saved.append(args[:2]), save_part(*args)))
    train(tmp_path / "cut", *flags)
    assert [part for _, part in saved[2:]] == [1, 2, 3]
    for name in ("tokens.bin", "tokens-val.bin", "tokens.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_tokens_of_another_tokenizer_data_set_or_crop_are_refused_with_both_names(tmp_path, stage1):
    path, images = stage1
    tokens = tmp_path / "tokens.bin"
    flags = [*TINY, "--tokenizer", path, "--length", 1, "--tokens", tokens]
    train(tmp_path / "a", *flags)
    other = save_tokenizer(tmp_path / "other.pt", images, seed=1)
    others = save_images(tmp_path / "others", seed=1)
    for i, (more, message) in enumerate((
        (["--tokenizer", other], f"{re.escape(path)}.*{re.escape(other)}.*tokenizer: "),
        (["--data-path", others], f"{re.escape(images)}.*{re.escape(others)}.*data: "),
        (["--image-size", 8], "grid: \\[4, 4\\] there, \\[2, 2\\] here"),
        (["--token-precision", "bf16"], "precision: 'fp32' there, 'bf16' here"),
        (["--ten-crop"], "crops: 'centre' there"),
    )):
        with pytest.raises(runtime.UserError, match=message):
            train(tmp_path / f"b{i}", *flags, *more)
    train(tmp_path / "c", *flags)                                          # the right ones are used again

    moved = pathlib.Path(images).rename(tmp_path / "moved")                # same images, another place
    try:
        train(tmp_path / "d", *flags, "--data-path", moved)
    finally:
        moved.rename(images)
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1])
    with pytest.raises(runtime.UserError, match="does not have the 7,680 bytes"):
        train(tmp_path / "e", *flags)
    tokens.write_bytes(whole)
    tokens.with_suffix(".json").write_text("[]")
    with pytest.raises(runtime.UserError, match="does not describe stored tokens"):
        train(tmp_path / "e", *flags)


# ---- exactness --------------------------------------------------------------------------------------------

def test_two_ranks_equal_one_process_with_the_double_batch(tmp_path, stage1):
    # Without dropout: its random numbers belong to a rank, so that two ranks draw others than one.
    flags = [*TINY, *NO_DROPOUT, "--tokenizer", stage1[0], "--length", 3, "--lr", 1e-4, "--ema-decay", 0.9,
             "--val-every", 1]
    train(tmp_path / "one", *flags)
    run_ranks("train_ar", "--results-dir", tmp_path / "two", *flags, ranks=2)
    for name in ("tokens.bin", "tokens.json", "tokens-val.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert one.keys() == two.keys() == {1, 2, 3}
    for step in one:
        assert one[step].keys() == two[step].keys()
        for name, value in one[step].items():
            assert two[step][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    for part in ("model", "ema"):
        for name, tensor in one[part].items():
            torch.testing.assert_close(two[part][name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_accumulation_of_micro_batches_is_the_same_gradient(tmp_path, stage1):
    flags = [*TINY, *NO_DROPOUT, "--tokenizer", stage1[0], "--length", 3, "--lr", 1e-4]
    train(tmp_path / "one", *flags)
    train(tmp_path / "two", *flags, "--accumulation", 2)
    one, two = newest(tmp_path / "one")["model"], newest(tmp_path / "two")["model"]
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_bit_identical_to_uninterrupted(tmp_path, stage1, ranks):
    # log-every 3 does not divide the checkpoints' steps: the averages between two lines must survive as well.
    flags = [*TINY, *DROPOUT, "--tokenizer", stage1[0], "--length", 40, "--ema-decay", 0.9, "--ten-crop",
             "--accumulation", 2, "--log-every", 3, "--val-every", 4, "--grid-every", 20,
             "--checkpoint-every", 1]
    run_ranks("train_ar", "--results-dir", tmp_path / "whole", *flags, ranks=ranks)
    killed = tmp_path / "killed"
    processes = start_ranks("train_ar", "--results-dir", killed, *flags, ranks=ranks)
    kill_when(lambda: (killed / "step-00000004.pt").exists(), processes)
    assert not (killed / "step-00000040.pt").exists(), "killed too late to prove anything"
    run_ranks("train_ar", "--results-dir", killed, *flags, "--resume", ranks=ranks)
    one, two = newest(tmp_path / "whole"), newest(killed)
    for checkpoint in (one, two):
        checkpoint["args"] = None                                          # --results-dir and --resume differ
    assert_same(one, two)
    assert logged(tmp_path / "whole") == logged(killed)


def test_sigterm_saves_and_resume_continues(tmp_path, stage1, monkeypatch, capsys):
    log = runtime.Logger.log

    def log_and_signal(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(runtime.Logger, "log", log_and_signal)
    flags = [*TINY, "--tokenizer", stage1[0], "--checkpoint-every", 1000]
    train(tmp_path, *flags, "--length", 1000)
    step = newest(tmp_path)["step"]
    assert step == 3 and "stopped by signal 15 after step 3" in capsys.readouterr().out
    train(tmp_path, *flags, "--length", step + 1, "--resume")
    assert newest(tmp_path)["step"] == step + 1


# ---- learning ---------------------------------------------------------------------------------------------

def test_a_few_images_are_learned_by_heart_and_the_loss_starts_at_the_number_of_bits(tmp_path):
    images = save_images(tmp_path / "images", train=2, val=1)
    tokenizer = save_tokenizer(tmp_path / "a.pt", images)
    train(tmp_path / "run", *TINY, *NO_DROPOUT, "--tokenizer", tokenizer, "--length", 300, "--lr", 1e-2,
          "--warmup", 10, "--global-batch-size", 6, "--val-every", 50)
    log = logged(tmp_path / "run")
    assert log[1]["loss"] == pytest.approx(6 * math.log(2)) and log[1]["bits"] == pytest.approx(6)
    assert log[1]["loss/1"] + log[1]["loss/2"] == pytest.approx(log[1]["loss"])
    assert log[1]["perplexity"] == pytest.approx(64)
    assert log[1]["bits_per_pixel"] == pytest.approx(6 * 16 / 256)
    assert log[300]["bits"] < 0.5 < 6 < log[300]["val_bits"]              # noise held out cannot be known


def test_validation_is_the_loss_of_the_averaged_weights_on_all_held_out_tokens(tmp_path, stage1):
    train(tmp_path, *TINY, *DROPOUT, "--tokenizer", stage1[0], "--length", 5, "--ema-decay", 0.9,
          "--lr", 1e-2)
    model, info = ar_model.load_ar(runtime.latest_checkpoint(tmp_path))
    codes, header = tokens_in(tmp_path / "tokens-val.bin")
    subtokens = tok.ids_to_subtokens(torch.from_numpy(codes[:, 0].astype(np.int64)), (3, 3))
    with torch.no_grad():
        loss, terms = model(subtokens, torch.tensor(header["labels"]), return_loss=True)
    log = logged(tmp_path)[5]
    assert info["weights"] == "EMA" and log["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert log["val_loss/2"] == pytest.approx(float(terms[1]), rel=1e-5)
    raw = ar_model.load_ar(runtime.latest_checkpoint(tmp_path), ema=False)[0]
    with torch.no_grad():
        assert abs(raw(subtokens, torch.tensor(header["labels"]), return_loss=True)[0] - loss) > 1e-4


def test_without_a_val_folder_there_is_no_validation(tmp_path, stage1, capsys):
    flat = pathlib.Path(stage1[1]) / "train"
    train(tmp_path, *TINY, "--tokenizer", stage1[0], "--data-path", flat, "--length", 1)
    assert "no validation" in capsys.readouterr().out and "val_loss" not in logged(tmp_path)[1]
    train(tmp_path / "b", *TINY, "--tokenizer", stage1[0], "--data-path", flat, "--length", 1,
          "--val-data-path", pathlib.Path(stage1[1]) / "val", "--val-size", 4)
    assert "val_loss" in logged(tmp_path / "b")[1]
    assert tokens_in(tmp_path / "b" / "tokens-val.bin")[1]["labels"] == [0, 1, 1, 2]


# ---- flags and mistakes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    ["--mixed-precision", "bf16"],
    ["--mixed-precision", "fp16", "--ema-decay", 0.9],
    ["--activation-checkpointing", *DROPOUT],
    ["--separate-heads"],
    ["--split", 2, 2, 2, "--intra-blocks", 2],
    ["--split", 6],
    ["--unconditional"],
    ["--online", "--flip", "--num-workers", 1],
    ["--token-precision", "bf16", "--val-size", 3],
    ["--length", "0.1ep", "--warmup", "0.05ep"],
    ["--length", "1ep", "--warmup", "0ep", "--lr-per-epoch", "--global-batch-size", 40],
    ["--preset", "AR-B", "--length", 3, "--warmup", 1, "--intra-blocks", 1],
    ["--max-grad-norm", 0, "--weight-decay", 0, "--raw-weights", "--cfg-scale", "1.5,3"],
])
def test_every_training_flag_runs(tmp_path, stage1, flags):
    train(tmp_path, *TINY, "--tokenizer", stage1[0], "--length", 3, "--grid-every", 2, *flags)
    assert all(math.isfinite(v) for v in logged(tmp_path)[3].values() if isinstance(v, float))
    assert (tmp_path / "samples-00000003.png").stat().st_size > 100


def test_the_published_rate_changes_once_an_epoch(tmp_path, stage1):
    train(tmp_path, *TINY, "--tokenizer", stage1[0], "--lr", 1, "--lr-per-epoch", "--length", "4ep",
          "--warmup", "2ep", "--global-batch-size", 60, "--warmup-start", 0.5, "--constant-part", 0,
          "--final-lr", 0.25, "--max-grad-norm", 1e-6)
    assert [line["lr"] for line in logged(tmp_path).values()] == [0.5, 0.5, 0.75, 0.75, 1, 1, 0.25, 0.25]


def test_compiled_blocks_learn_the_same(tmp_path, stage1, monkeypatch):
    # The tracing is what can go wrong; the default backend would spend most of a minute on its kernels.
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compile(
        self, backend="eager", fullgraph=True, **kwargs))
    flags = [*TINY, *NO_DROPOUT, "--tokenizer", stage1[0], "--length", 3]
    train(tmp_path / "eager", *flags)
    train(tmp_path / "compiled", *flags, "--compile")
    losses = [logged(tmp_path / name)[3]["loss"] for name in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert newest(tmp_path / "compiled")["model"].keys() == newest(tmp_path / "eager")["model"].keys()


def test_a_loss_that_is_not_finite_skips_steps_and_then_stops_with_its_name(tmp_path, stage1, monkeypatch):
    true_loss, calls = ar_model.loss, []

    def loss(logits, subtokens):
        calls.append(1)
        factor = float("nan") if len(calls) in (3, 5) or len(calls) > 8 else 1.0
        return true_loss([logits[0], logits[1] * factor], subtokens)
    monkeypatch.setattr(ar_model, "loss", loss)
    with pytest.raises(runtime.UserError, match="loss/2 was not finite in 10 steps in a row"):
        train(tmp_path, *TINY, "--tokenizer", stage1[0], "--length", 30, "--checkpoint-every", 1,
              "--val-every", 30)
    saved, log = newest(tmp_path), logged(tmp_path)
    assert saved["step"] == 17 and saved["skipped"] == 11 and saved["in_a_row"] == 9
    assert log[8]["skipped_steps"] == 2 and "loss" not in log[5] and math.isfinite(log[6]["loss"])
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_with_no_flags_it_takes_the_newest_tokenizer_and_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(runtime.UserError, match="no tokenizer .*runs/tokenizer"):
        train_ar.main(train_ar.get_args([]))
    save_tokenizer("runs/tokenizer/step-00000001.pt", "nowhere")
    save_tokenizer("runs/tokenizer/step-00000002.pt", "generated-plain", bits=10, resolution=32)
    train_ar.main(train_ar.get_args(["--dry-run"]))
    plan = capsys.readouterr().out
    assert "8 x 8 of 5 + 5 bits, by runs/tokenizer/step-00000002.pt" in plan
    assert "generated-plain, 20,000" in plan
    assert not (tmp_path / "runs" / "ar").exists()


@pytest.mark.parametrize("flags, message", [
    (["--tokenizer", "/no/such.pt"], "/no/such.pt"),
    (["--data-path", "/no/such/folder"], "/no/such/folder"),
    (["--split", 3, 4], "--split: 3 + 4 are 7 bits, but a code of --tokenizer"),
    (["--width", 33], "width 33"),
    (["--image-size", 18], "--image-size 18"),
    (["--global-batch-size", 0], "--global-batch-size"),
    (["--global-batch-size", 1000], "--global-batch-size 1000"),
    (["--global-batch-size", 4, "--accumulation", 3], "--accumulation"),
    (["--length", "ten"], "--length"),
    (["--online", "--ten-crop"], "--ten-crop"),
    (["--online", "--tokens", "x.bin"], "--tokens"),
    (["--flip"], "--flip"),
    (["--cfg-scale", "two"], "--cfg-scale"),
    (["--resume", "/no/such.pt"], "/no/such.pt"),
    (["--token-dropout", 2], "--token-dropout"),
    (["--preset", "AR-S"], "--preset"),
    (["--nonsense"], "--nonsense"),
])
def test_mistakes_name_the_flag_and_exit_with_status_2(tmp_path, stage1, capsys, flags, message):
    argv = ["--results-dir", tmp_path / "run", *TINY, "--tokenizer", stage1[0], *flags]
    with pytest.raises(SystemExit) as caught:
        runtime.run_script(train_ar.main, lambda: train_ar.get_args([str(flag) for flag in argv]))
    text = capsys.readouterr().err
    assert caught.value.code == 2 and message in text and len(text.strip().splitlines()) == 1, text
    assert not list(tmp_path.glob("run/*.pt"))


def test_a_vq_codebook_must_have_a_power_of_two_entries(tmp_path, stage1):
    vq = save_tokenizer(tmp_path / "vq.pt", stage1[1], quantizer="vq", codebook_size=64)
    train(tmp_path / "run", *TINY, "--tokenizer", vq, "--length", 2)
    odd = save_tokenizer(tmp_path / "odd.pt", stage1[1], quantizer="vq", codebook_size=60)
    with pytest.raises(runtime.UserError, match="60 codes are no power of 2"):
        train(tmp_path / "other", *TINY, "--tokenizer", odd, "--length", 2)


def test_a_run_is_neither_overwritten_nor_continued_as_another(tmp_path, stage1):
    path, images = stage1
    flags = [*TINY, "--tokenizer", path]
    train(tmp_path / "run", *flags, "--length", 1)
    before = (tmp_path / "run" / "step-00000001.pt").read_bytes()
    other = save_tokenizer(tmp_path / "other.pt", images, seed=1)
    others = save_images(tmp_path / "others", seed=1)
    for more, message in (
        ([], "--resume"),
        (["--resume", "--inter-blocks", 2], "inter_blocks: 1 there, 2 here"),
        (["--resume", "--global-batch-size", 8], "global_batch_size: 4"),
        (["--resume", "--ema-decay", 0.9], "--ema-decay"),
        (["--resume", "--ten-crop", "--tokens", tmp_path / "ten.bin"], "ten_crop: False there"),
        (["--resume", "--tokenizer", other, "--tokens", tmp_path / "x.bin"], f"{path}.*{other}"),
        (["--resume", "--data-path", others, "--tokens", tmp_path / "y.bin"], "data set"),
        (["--resume", "--weight-decay", 0], "weight_decay: 0.05 there"),
        (["--resume", path], "not a training checkpoint"),
    ):
        with pytest.raises(runtime.UserError, match=message):
            train(tmp_path / "run", *flags, "--length", 2, *more)
    assert (tmp_path / "run" / "step-00000001.pt").read_bytes() == before
