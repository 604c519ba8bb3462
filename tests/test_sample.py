"""The set of samples is the same whoever draws it, however often interrupted; files are what they say."""
import json
import os
import pathlib
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import ar_model
import runtime
import sample
import tokenizer as tok
import train_ar
from helpers import fill, run_script
from test_train_ar import TINY, kill_when, run_ranks, save_images, save_tokenizer, start_ranks
from test_train_ar import one_thread                                     # noqa: F401, for all tests here, too

SET = ["--num-fid-samples", 30, "--batch-size", 4]                       # 8 parts, the last one of 2 pictures


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(checkpoint of an AR model with three classes, that of its tokenizer), both hardly trained."""
    folder = tmp_path_factory.mktemp("trained")
    path = save_tokenizer(folder / "tokenizer.pt", save_images(folder / "images"))
    train_ar.main(train_ar.get_args([str(flag) for flag in (
        *TINY, "--tokenizer", path, "--length", 20, "--lr", 1e-2, "--results-dir", folder / "ar")]))
    return str(runtime.latest_checkpoint(folder / "ar")), path


def draw(*flags):
    """Run sample.py in this process."""
    sample.main(sample.get_args([str(flag) for flag in flags]))


def pictures_of(path):
    """arr_0 of an npz, as an evaluator reads it."""
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


# ---- the set ----------------------------------------------------------------------------------------------

def test_one_two_and_three_ranks_give_the_same_30_samples(tmp_path, trained):
    draw("--ckpt", trained[0], *SET, "--output", tmp_path / "1.npz")
    run_script("sample.py", "--ckpt", trained[0], *SET, "--output", tmp_path / "2.npz", ranks=2)
    run_ranks("sample", "--ckpt", trained[0], *SET, "--output", tmp_path / "3.npz", ranks=3)
    one = pictures_of(tmp_path / "1.npz")
    assert one.shape == (30, 16, 16, 3) and one.dtype == np.uint8
    assert len({picture.tobytes() for picture in one}) == 30             # none lost, none doubled
    for ranks in "23":
        assert (tmp_path / f"{ranks}.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_killed_after_half_and_restarted_on_other_ranks_gives_the_same_samples(tmp_path, trained):
    draw("--ckpt", trained[0], *SET, "--output", tmp_path / "whole.npz")
    killed, parts = tmp_path / "killed.npz", tmp_path / "killed.npz.parts"
    processes = start_ranks("sample", "--ckpt", trained[0], *SET, "--output", killed, ranks=1)
    kill_when(lambda: (parts / "000003.npy").exists(), processes)
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    assert 4 <= len(finished) < 8 and not killed.exists()
    with pytest.raises(runtime.UserError, match=r"killed.npz.parts .*cfg_scale: \[2.0, 2.0\] there, \[3.0"):
        draw("--ckpt", trained[0], *SET, "--output", killed, "--cfg-scale", 3)
    assert {path: path.stat().st_mtime_ns for path in parts.glob("*.npy")} == finished
    run_ranks("sample", "--ckpt", trained[0], *SET, "--output", killed, ranks=2)
    assert killed.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_finished_parts_are_not_drawn_again(tmp_path, trained, monkeypatch):
    save_part, drawn = runtime.save_part, []

    def interrupted(folder, part, array):
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(part)
        save_part(folder, part, array)
    monkeypatch.setattr(runtime, "save_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw("--ckpt", trained[0], *SET, "--output", tmp_path / "a.npz")
    monkeypatch.setattr(runtime, "save_part", lambda *args: (drawn.append(args[1]), save_part(*args)))
    draw("--ckpt", trained[0], *SET, "--output", tmp_path / "a.npz")
    assert drawn == list(range(8))


def test_the_set_has_equally_many_of_every_class_in_turn_and_comes_from_generate(tmp_path, trained):
    draw("--ckpt", trained[0], *SET, "--output", tmp_path / "a.npz", "--cfg-scale", "1.5,3",
         "--temperature", 0.9, "--top-k", "0,5", "--top-p", 0.8, "--global-seed", 7)
    model, tokenizer, _ = sample.load(trained[0])
    ar_model.prepare_for_sampling(model)
    images = sample.generate(model, tokenizer, [n % 3 for n in range(30)], [(7, n) for n in range(30)], 4,
                             cfg_scale=(1.5, 3), temperature=0.9, top_k=(0, 5), top_p=0.8)
    assert (torch.cat(list(images)).permute(0, 2, 3, 1).numpy() == pictures_of(tmp_path / "a.npz")).all()


def test_the_settings_stand_beside_the_set_and_decide_whether_it_is_made_again(tmp_path, trained, capsys):
    flags = ["--ckpt", trained[0], "--num-fid-samples", 5, "--output", tmp_path / "a.npz", "--top-p", 0.5]
    draw(*flags)
    record = json.loads((tmp_path / "a.json").read_text())
    expected = {"n": 5, "cfg_scale": [2, 2], "temperature": [1, 1], "top_k": [0, 0], "top_p": [0.5, 0.5],
                "rounding": "round", "batch_size": 5, "mixed_precision": "fp32", "global_seed": 0,
                "device": "cpu"}
    assert {name: record[name] for name in expected} == expected
    assert record["checkpoint"]["sha256"] == runtime.sha256_of(trained[0])
    assert record["tokenizer"]["sha256"] == runtime.sha256_of(trained[1])
    before = (tmp_path / "a.npz").stat().st_mtime_ns
    draw(*flags)
    assert "exists already" in capsys.readouterr().out
    with pytest.raises(runtime.UserError, match="a.npz exists; .*global_seed: 0 there, 1 here"):
        draw(*flags, "--global-seed", 1)
    assert (tmp_path / "a.npz").stat().st_mtime_ns == before


def test_an_npz_is_stored_part_by_part_as_numpy_would_store_it(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    sample.write_npz(tmp_path / "a.npz", array.shape, (array[i:i + 2] for i in range(0, 7, 2)))
    np.savez(tmp_path / "b.npz", array)
    assert (pictures_of(tmp_path / "a.npz") == array).all()
    with zipfile.ZipFile(tmp_path / "a.npz") as a, zipfile.ZipFile(tmp_path / "b.npz") as b:
        assert a.read("arr_0.npy") == b.read("arr_0.npy") and a.testzip() is None
        assert a.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED


def test_it_never_holds_more_than_a_batch(trained, monkeypatch, tmp_path):
    sizes, to_pixels = [], sample.to_pixels
    monkeypatch.setattr(sample, "to_pixels", lambda x, how: (sizes.append(len(x)), to_pixels(x, how))[1])
    reads, load = [], np.load
    monkeypatch.setattr(np, "load", lambda path, **kwargs: (reads.append(path), load(path, **kwargs))[1])
    draw("--ckpt", trained[0], *SET, "--output", tmp_path / "a.npz")
    assert sizes == [4] * 8 and len(reads) == 9           # every part once, and the first one for its shape


# ---- pictures ---------------------------------------------------------------------------------------------

def test_guidance_1_is_no_guidance_bit_for_bit_and_needs_no_unconditional_pass(trained):
    model, tokenizer, _ = sample.load(trained[0])
    labels, seeds = [0, 1, 2, 0], [(0, n) for n in range(4)]
    plain = torch.cat(list(sample.generate(model, tokenizer, labels, seeds, 4)))
    guided = torch.cat(list(sample.generate(model, tokenizer, labels, seeds, 4, cfg_scale=(2.0, 2.0))))
    with torch.no_grad():
        model.class_embedding.weight[3] = float("nan")                    # "no class"
    one = torch.cat(list(sample.generate(model, tokenizer, labels, seeds, 4, cfg_scale=(1.0, 1))))
    assert torch.equal(plain, one) and not torch.equal(plain, guided)


def test_a_picture_depends_on_label_seed_and_place_not_on_how_many_follow(trained):
    model, tokenizer, _ = sample.load(trained[0])
    labels, seeds = [0, 1, 2, 0, 1, 2], [5, 6, 7, 8, 9, 10]
    six = list(sample.generate(model, tokenizer, labels, seeds, 4))
    assert [len(batch) for batch in six] == [4, 2] and six[0].dtype == torch.uint8
    five = torch.cat(list(sample.generate(model, tokenizer, torch.tensor(labels[:5]), seeds[:5], 4)))
    assert torch.equal(five, torch.cat(six)[:5])
    assert list(sample.generate(model, tokenizer, [], [], 4)) == []


def test_rounding_and_truncation_differ_by_at_most_a_level(trained):
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    assert sample.to_pixels(x, "truncate").tolist() == [0, 0, 127, 254, 255, 255]
    assert sample.to_pixels(x, "round").tolist() == [0, 0, 128, 255, 255, 255]
    model, tokenizer, _ = sample.load(trained[0])
    a, b = (next(sample.generate(model, tokenizer, [0, 1], [0, 1], 2, how)) for how in ("round", "truncate"))
    assert (a.int() - b.int()).unique().tolist() == [0, 1]


def test_a_grid_has_a_row_for_each_class_and_shows_members_of_the_set(tmp_path, trained):
    draw("--ckpt", trained[0], "--classes", "cat,0", "--num-images", 4, "--save-images", "--batch-size", 4,
         "--output", tmp_path / "a.png", "--cfg-scale", 2, "--top-p", 1)
    assert Image.open(tmp_path / "a.png").size == (4 * (96 + 2) + 2, 2 * (96 + 2 + 14) + 2)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["classes"] == ["cat", "ant"] and record["numbers"] == [2, 5, 8, 11, 0, 3, 6, 9]
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [f"class-000{label}-00{i}.png" for label in (0, 2) for i in range(4)]
    draw("--ckpt", trained[0], "--num-fid-samples", 12, "--batch-size", 4, "--output", tmp_path / "a.npz")
    for label, i in ((0, 1), (2, 3)):
        alone = np.asarray(Image.open(tmp_path / "a" / f"class-000{label}-00{i}.png"))
        assert (alone == pictures_of(tmp_path / "a.npz")[i * 3 + label]).mean() > 0.99


def test_with_no_flags_it_draws_every_class_of_the_newest_model(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(runtime.UserError, match="no AR model .*runs/ar"):
        draw()
    folder = pathlib.Path("runs/ar")
    folder.mkdir(parents=True)
    os.link(trained[0], folder / "step-00000020.pt")
    draw()
    grid, = pathlib.Path("runs/samples").glob("*.png")
    assert grid.name == "ar-step-00000020-grid-cfg2-t1-k0-p1-seed0.png"
    assert json.loads(grid.with_suffix(".json").read_text())["classes"] == ["ant", "bee", "cat"]


def test_an_unconditional_model_needs_no_classes(tmp_path, trained):
    train_ar.main(train_ar.get_args([str(flag) for flag in (
        *TINY, "--tokenizer", trained[1], "--unconditional", "--length", 1,
        "--results-dir", tmp_path / "ar")]))
    ckpt = tmp_path / "ar" / "step-00000001.pt"
    draw("--ckpt", ckpt, "--num-images", 3, "--output", tmp_path / "a.png")
    draw("--ckpt", ckpt, "--num-fid-samples", 5, "--output", tmp_path / "a.npz")
    assert pictures_of(tmp_path / "a.npz").shape[0] == 5
    for flags, message in ((["--classes", 0], "unconditional"), (["--cfg-scale", 2], "--cfg-scale")):
        with pytest.raises(runtime.UserError, match=message):
            draw("--ckpt", ckpt, *flags, "--output", tmp_path / "b.png")


# ---- checkpoints ------------------------------------------------------------------------------------------

def save_published(path, with_tokenizer=True, bits=6):
    """A small file in the form of the published AR files, and the tokenizer inside."""
    model = ar_model.ARModel(ar_model.ARConfig(width=64, heads=1, inter_blocks=1, intra_blocks=1, bits=(2, 4),
                                               num_classes=1000, grid=(16, 16)))
    names = ar_model.PublishedView(model).state_dict()
    state = {name: torch.from_numpy(fill(name, tuple(tensor.shape))) for name, tensor in names.items()}
    torch.manual_seed(0)
    tokenizer = tok.Tokenizer(tok.TokenizerConfig(resolution=64, channels=32, channel_multipliers=(1, 1, 1),
                                                  blocks=1, mid_blocks=1, bits=bits))
    if with_tokenizer:
        state.update({f"first_stage_model.{name}": t for name, t in tokenizer.state_dict().items()})
    torch.save({"state_dict": state, "global_step": 3}, path)
    return tokenizer


def test_a_published_file_alone_makes_pictures_with_imagenets_names(tmp_path):
    tokenizer = save_published(tmp_path / "AR.ckpt")
    draw("--ckpt", tmp_path / "AR.ckpt", "--classes", "otter,207", "--num-images", 1,
         "--output", tmp_path / "a.png")
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["classes"] == ["otter", "golden retriever"] and record["rounding"] == "truncate"
    assert record["checkpoint"]["source"] == "published" and record["checkpoint"]["name"] == "AR.ckpt"
    loaded = sample.load(tmp_path / "AR.ckpt")[1].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tokenizer.state_dict().items())

    save_published(tmp_path / "bare.ckpt", with_tokenizer=False)
    with pytest.raises(runtime.UserError, match="bare.ckpt contains no whole tokenizer .*--tokenizer"):
        sample.load(tmp_path / "bare.ckpt")
    sample.load(tmp_path / "bare.ckpt", tmp_path / "AR.ckpt")             # its tokenizer from elsewhere


def test_a_tokenizer_that_does_not_fit_is_refused_with_both_names(tmp_path, trained):
    other = save_tokenizer(tmp_path / "other.pt", seed=1)
    with pytest.raises(runtime.UserError, match=f"{other} .* is not the one that .*{trained[1]}"):
        draw("--ckpt", trained[0], "--tokenizer", other)
    sample.load(*trained)                                                 # the right one may be named
    save_published(tmp_path / "AR.ckpt", bits=7)
    with pytest.raises(runtime.UserError, match=r"AR.ckpt draws tokens of 2 \+ 4 bits, .* 128 codes, not 64"):
        sample.load(tmp_path / "AR.ckpt")


@pytest.mark.parametrize("preset, scale, temperature", [
    ("AR-B", [1.9, 2.0], [1.0, 1.0]), ("AR-L", [1.9, 1.9], [1.1, 1.0]), ("AR-XL", [1.75, 1.85], [1.1, 1.0])])
def test_the_published_settings_are_the_defaults_of_the_published_presets(preset, scale, temperature):
    with torch.device("meta"):
        model = ar_model.ARModel(ar_model.PRESETS[preset])
    args = sample.get_args(["--num-fid-samples", "50000"])
    settings = sample.settings_from_args(args, model, {"preset": preset})
    assert settings == {"cfg_scale": scale, "temperature": temperature, "top_k": [0, 0], "top_p": [1.0, 1.0]}
    settings = sample.settings_from_args(sample.get_args([]), model, {"preset": preset})
    assert settings["cfg_scale"] == [4.0, 4.0] and settings["top_p"] == [0.96, 0.96]
    settings = sample.settings_from_args(sample.get_args(["--cfg-scale", "1,3"]), model, {"preset": preset})
    assert settings["cfg_scale"] == [1.0, 3.0]
    assert sample.settings_from_args(args, model, {"preset": "toy"})["cfg_scale"] == [2.0, 2.0]


def test_classes_go_by_number_or_by_name():
    imagenet = sample.class_names(None, 1000)
    assert sample.find_classes(" 207, Otter", imagenet) == [207, 360]
    assert sample.class_names([f"n{i:08d}" for i in range(1000)], 1000) == imagenet
    assert sample.class_names(None, 3) == ["0", "1", "2"] and sample.find_classes(None, ["a", "b"]) == [0, 1]
    assert sample.find_classes(None, imagenet) == list(sample.WELL_KNOWN)
    spread = sample.find_classes(None, [str(i) for i in range(101)])      # as many as UCF-101 has
    assert spread == [0, 12, 25, 37, 50, 63, 75, 88]
    assert sample.find_classes("10", ["10", "9", "2"]) == [0]             # a folder called 10
    with pytest.raises(runtime.UserError, match=r"'crane' names the classes \[1, 3\]; give a number"):
        sample.find_classes("crane", ["bird", "crane", "lift", "Crane"])
    with pytest.raises(runtime.UserError, match="'1000' is none of the 1000 classes"):
        sample.find_classes("1000", imagenet)
    with pytest.raises(runtime.UserError, match="'retriever' .* golden retriever"):
        sample.find_classes("retriever", imagenet)


# ---- flags and mistakes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    ["--mixed-precision", "bf16"],
    ["--mixed-precision", "fp16"],
    ["--temperature", 0],
    ["--raw-weights", "--rounding", "truncate", "--num-images", 1],
])
def test_every_sampling_flag_runs(tmp_path, trained, flags):
    draw("--ckpt", trained[0], "--classes", 1, "--num-images", 2, "--output", tmp_path / "a.png", *flags)
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("flags, message", [
    (["--ckpt", "/no/such.pt"], "/no/such.pt"),
    (["--classes", "dog"], "'dog' is none of the 3 classes"),
    (["--classes", "3"], "'3' is none of the 3 classes"),
    (["--classes", "ant", "--num-fid-samples", 5], "--num-fid-samples"),
    (["--num-images", 0], "--num-images"),
    (["--num-fid-samples", 0], "--num-fid-samples"),
    (["--cfg-scale", "1,2,3"], "--cfg-scale has 3 values"),
    (["--cfg-scale", "strong"], "--cfg-scale"),
    (["--top-p", 0], "--top-p 0"),
    (["--top-k", 1.5], "--top-k"),
    (["--temperature", -1], "--temperature"),
    (["--output", "x.jpg"], "--output x.jpg"),
    (["--compile", "--device", "cpu"], "--compile"),
    (["--nonsense"], "--nonsense"),
])
def test_mistakes_name_the_flag_and_exit_with_2(tmp_path, trained, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        runtime.run_script(sample.main, lambda: sample.get_args(["--ckpt", trained[0], *map(str, flags)]))
    text = capsys.readouterr().err
    assert caught.value.code == 2 and message in text and len(text.strip().splitlines()) == 1, text
    assert not list(tmp_path.glob("runs/samples/*"))
