"""The fast sampler draws the plain one's tokens; the set of samples is the same however it is drawn."""
import contextlib
import json
import math
import os
import pathlib
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import ar_model
import sample
from support import checkpoints, codec, drawn, runtime
from ar_model import ARModel, sampling_settings
from helpers import Run, call, error_line, published_ar_name, refused, run_script, save_pair
from sample import How, Sampler, noise_of
from test_ar_model import build, equal, random_tokens, shape, small_config          # noqa: F401, a fixture


def settings_of(config, **values):
    """Settings, without guidance where there is no class to guide towards."""
    if config.num_classes == 0:
        values["cfg_scale"] = 1.0
    return sampling_settings(len(config.bits), **values)


def plain(model, labels, settings):
    """What the plain sampler draws from the seeds 0, 1, .."""
    noise = noise_of(range(len(labels)), model.config.tokens, len(settings))
    return ar_model.sample(model, labels, noise, settings)


def fast(model, labels, settings, **options):
    """What the fast one draws."""
    return Sampler(model, len(labels), settings, **options)(labels, range(len(labels)))


# ---- the same tokens, faster ------------------------------------------------------------------------------

@pytest.mark.parametrize("values", [{"cfg_scale": 2, "top_p": 0.9}, {}])
def test_it_draws_the_tokens_of_the_plain_sampler(shape, values):
    model, (_, labels) = build(shape), random_tokens(shape, 3)
    settings = settings_of(shape, **values)
    expected = plain(model, labels, settings)
    for bucket in (1, 4):
        sampler = Sampler(model, 3, settings, bucket=bucket)
        assert max(sampler.lengths) == shape.tokens and all(n > t for t, n in enumerate(sampler.lengths))
        sampler.caches[0].keys.fill_(1e4)                               # rubbish behind the position
        assert equal(sampler(labels, range(3)), expected)
    assert equal(fast(sample.prepare_for_sampling(model), labels, settings), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_reads_no_value_back_to_the_host(device):
    """What a CUDA graph needs; fake tensors have no values, so that any .item() or branch on one raises."""
    with FakeTensorMode():
        with torch.device(device):
            model = ARModel(small_config()).eval()
        settings = sampling_settings(2, cfg_scale=2.0, temperature=(0.9, 1.0), top_k=(0, 3), top_p=0.9)
        sampler = Sampler(model, 2, settings, bucket=4)
        with torch.no_grad():
            sampler.step(8)
        with pytest.raises(DataDependentOutputException):
            sampler.position.item()


@pytest.mark.slow
def test_compiled_pieces_draw_the_same_one_graph_for_all_layers():
    model, labels = build(small_config(inter_blocks=3, bits=(2, 3, 4))), torch.tensor([0, 3])
    settings = sampling_settings(3, cfg_scale=2.0)
    torch._dynamo.reset()
    graphs = []
    sampler = Sampler(model, 2, settings, bucket=4)
    sampler.pieces = [torch.compile(piece, fullgraph=True, dynamic=False,
                                    backend=lambda graph, _: graphs.append(graph) or graph.forward)
                      for piece in sampler.pieces]
    assert equal(sampler(labels, range(2)), plain(model, labels, settings))
    assert len(graphs) == 2 + 3                                         # store, finish, a step a sub-token
    refused("--compile", Sampler, model, 2, settings, compile=True)     # graphs of the whole step need a GPU


def test_given_tokens_stay_and_the_rest_follows_from_them(shape):
    model, (_, labels) = build(shape), random_tokens(shape, 3)
    settings = settings_of(shape, cfg_scale=2)
    sampler = Sampler(model, 3, settings)
    own = sampler(labels, range(3))
    again = sampler(labels[:1].expand(3), [0, 7, 8], [subtokens[0, :2] for subtokens in own])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(own, again))       # its own beginning, the same end
    assert all(torch.equal(b[i, :2], a[0, :2]) for a, b in zip(own, again) for i in range(3))
    assert equal(sampler(labels, range(3)), own)                         # nothing is left of it


@pytest.mark.parametrize("M", [1, 2, 3, 5])
def test_the_closed_form_is_attention_with_a_vanishing_context(M):
    q, k, v = torch.randn(3, 6, M, 2, 8).unbind(0)                       # (R, M, H, d)
    k[:, 0] = 0
    expected = ar_model.attention(q, k, v)
    for m in range(M):
        attended = sample.last_within_token(q[:, m], k[:, 1:m + 1].unbind(1), v[:, :m + 1].unbind(1))
        torch.testing.assert_close(attended, expected[:, m], atol=1e-6, rtol=0)


def test_buffers_are_allocated_once_and_as_large_as_needed():
    model, labels = build(small_config()), torch.tensor([0, 1])
    guided, free = (Sampler(model, 2, sampling_settings(2, cfg_scale=scale)) for scale in (2.0, 1.0))
    pointers = [tensor.data_ptr() for cache in guided.caches for tensor in vars(cache).values()]
    guided(labels, [0, 1])
    assert pointers == [tensor.data_ptr() for cache in guided.caches for tensor in vars(cache).values()]
    assert len(pointers) == 2 * 2
    for keys, values in (vars(cache).values() for cache in guided.caches):        # class, all tokens but one
        assert keys.shape == values.shape == (4, 2, 15, 24)
        assert not keys[:, :, 0].any() and keys[:, :, 1:].any(dim=-1).all() and values.any(dim=-1).all()
    expected = free(labels, [0, 1])
    with torch.no_grad():
        model.class_embedding.weight[4] = math.nan                      # "no class": without guidance unread
    assert free.x.shape[0] == 2 and equal(free(labels, [0, 1]), expected)


def test_sampling_ignores_dropout_and_autocast_and_keeps_the_mode():
    config = small_config(token_dropout=0.5, attention_dropout=0.5, ffn_dropout=0.5, label_dropout=1.0)
    model, labels, settings = build(config), torch.tensor([0, 3]), sampling_settings(2, cfg_scale=2.0)
    expected = fast(model, labels, settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(fast(model.train(), labels, settings), expected)
    assert model.training and model.inter_blocks[0].training


def test_preparing_for_bfloat16_keeps_logits_in_float32():
    config = small_config(width=64, bits=(6, 8))
    model, (subtokens, labels) = build(config), random_tokens(config, 2)
    with torch.no_grad():
        expected = model(subtokens, labels)
        logits = sample.prepare_for_sampling(model, torch.bfloat16)(subtokens, labels)
    assert model.rope.dtype == torch.float32
    assert model.inter_blocks[0].attention.wo.weight.dtype == torch.bfloat16
    for ours, theirs in zip(logits, expected):
        assert ours.dtype == torch.float32 and (ours - theirs).abs().mean() < 0.05 * theirs.abs().mean()
        assert ours.unique().numel() > 0.9 * theirs.unique().numel()    # bfloat16 logits would tie often


def test_preparing_keeps_names_and_works_without_packing(monkeypatch):
    model, labels, settings = build(small_config()), torch.tensor([0, 3]), sampling_settings(2)
    expected = plain(model, labels, settings)
    names = {name: tensor.numel() for name, tensor in model.named_parameters()}
    sample.prepare_for_sampling(model)
    assert {name: tensor.numel() for name, tensor in model.named_parameters()} == names

    def fail(weight):
        raise RuntimeError("no such kernel")
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fail)
    assert equal(fast(sample.prepare_for_sampling(build(small_config())), labels, settings), expected)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_image_follows_its_own_seed_wherever_it_stands(shape, scale):
    model, (_, labels) = build(shape), random_tokens(shape, 4)
    seeds, order = [5, 5 + 2 ** 32, (7, 5), (8, 5)], [2, 0, 3, 1]
    assert noise_of(seeds, 4, 2).unique().numel() == 4 * 2 * 4       # all bits of a seed count
    sampler = Sampler(model, 4, settings_of(shape, cfg_scale=scale))
    tokens = sampler(labels, seeds)
    assert equal(sampler(labels[order], [seeds[i] for i in order]), [ids[order] for ids in tokens])
    assert equal(sampler(labels, seeds), tokens)                        # nothing is left over from a batch
    assert not equal(sampler(labels, range(4)), tokens)
    for ids, bits in zip(tokens, shape.bits):
        assert ids.shape == (4, shape.tokens) and 0 <= ids.min() and ids.max() < 2 ** bits


def test_impossible_labels_guidance_and_weights_are_user_errors():
    model, settings = build(small_config()), sampling_settings(2)
    for label in (-1, 5):
        refused("--classes", fast, model, torch.tensor([label]), settings)
    fast(model, torch.tensor([4]), settings)                            # 4: no class
    free = build(small_config(num_classes=0))
    refused("--cfg-scale", Sampler, free, 2, sampling_settings(2, cfg_scale=2.0))
    with torch.no_grad():
        model.heads[1].weight[3] = math.nan
    refused("logits are not finite", fast, model, torch.tensor([0, 1]), settings)


# ---- grids and sets; any number of ranks and kill -9: test_exactness.py ------------------------------------

@pytest.fixture(scope="module", params=[False, True], ids=["images", "clips"])
def saved(request, tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("saved"), request.param)


def samples_of(path):
    """arr_0 of an npz, as an evaluator reads it."""
    with np.load(path) as file:
        assert file.files == ["arr_0", "arr_1"] and len(file["arr_0"]) == len(file["arr_1"])
        return file["arr_0"]


def test_an_interrupted_set_is_completed_part_by_part(tmp_path, saved, monkeypatch, capsys):
    flags = ["--ckpt", saved[0], "--num-fid-samples", 14, "--batch-size", 4, "--cfg-scale", 1.5, 3, "--top-p",
             0.8, "--top-k", 0, 5, "--global-seed", 7, "--output", tmp_path / "a.npz"]
    save_part, drawn = np.save, []

    def interrupted(path, array):
        drawn.append(len(array))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        save_part(path, array)
    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(sample, *flags)
    refused("a.npz.parts exists; .*temperature': 1.0.* there, .*0.9", call, sample, *flags, "--temperature",
            0.9)
    call(sample, *flags)
    assert drawn == [4, 4, 4, 4, 2]                                      # the third one twice, none is larger
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npz"]
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["n"] == 14 and record["global_seed"] == 7 and record["batch_size"] == 4
    assert [setting["cfg_scale"] for setting in record["settings"]] == [1.5, 3]

    model, decoder, info = checkpoints.load_pair(saved[0])
    assert record["checkpoint"]["sha256"] == checkpoints.weights_hash(model)
    how = How(4, sampling_settings(2, cfg_scale=(1.5, 3), top_p=0.8, top_k=(0, 5)))
    sample.prepare_for_sampling(model)
    whole, five = [list(sample.generate(model, decoder, [n % 3 for n in range(count)],
                                        [(7, n) for n in range(count)], how)) for count in (14, 5)]
    expected = torch.cat(whole).movedim(1, -1).numpy()
    assert np.array_equal(samples_of(tmp_path / "a.npz"), expected) and expected.dtype == np.uint8
    assert [len(batch) for batch in whole] == drawn[1:] and len({x.tobytes() for x in expected}) == 14
    assert torch.equal(torch.cat(five), torch.cat(whole)[:5])            # however many follow

    call(sample, *flags)
    assert "exists already" in capsys.readouterr().out
    refused("a.npz .*exists; .*global_seed: 7 there, 1 here", call, sample, *flags, "--global-seed", 1)


SIGNALS = {"kill": [signal.SIGTERM], "Slurm": [signal.SIGTERM, 0.01, signal.SIGTERM],
           "Ctrl-C twice": [signal.SIGINT, 0.2, signal.SIGINT],
           "two ranks": [signal.SIGTERM, 0.1, signal.SIGTERM]}
SLOWLY = "import numpy, time; save = numpy.save; numpy.save = lambda *a: (save(*a), time.sleep(0.2))"


@pytest.mark.slow
@pytest.mark.parametrize("case", SIGNALS)
def test_a_signal_keeps_whole_parts_and_the_same_command_continues(tmp_path, case):
    ckpt, _ = save_pair(tmp_path / "models")
    flags = ["--ckpt", ckpt, "--num-fid-samples", 22, "--batch-size", 4, "--output"]
    output = tmp_path / "out" / "a.npz"
    ranks = 2 if case == "two ranks" else 1
    run = Run("sample.py", *flags, output, ranks=ranks, before=SLOWLY)
    deadline = time.time() + 60
    while len(list(tmp_path.rglob("0*.npy"))) < 2:
        assert time.time() < deadline, run.wait()
        time.sleep(0.003)
    for wait_or_signal in SIGNALS[case]:
        if isinstance(wait_or_signal, float):
            time.sleep(wait_or_signal)
        else:
            with contextlib.suppress(ProcessLookupError):                # it has ended by now
                run.kill(wait_or_signal)
    done = run.wait()
    number = SIGNALS[case][0]
    kept = len(list(tmp_path.rglob("0*.npy")))
    assert done.returncode == 128 + number and "Traceback" not in done.stderr, done
    assert f"signal {number}: stopped, {kept} of 6 parts are kept in {output}.parts; the same" in done.stderr
    assert 2 <= kept < 6 and not output.exists() and not list(tmp_path.rglob(".*.np?")), "half a file"
    (tmp_path / "out/a.npz.parts/.joined.123.npz").write_text("what kill -9 leaves")
    run_script("sample.py", *flags, output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["a.json", "a.npz"]
    call(sample, *flags, tmp_path / "whole.npz")
    assert output.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_sets_of_versions_with_guidance_schedules_are_continued(tmp_path, saved, capsys):
    flags = ["--ckpt", saved[0], "--num-fid-samples", 3, "--output", tmp_path / "a.npz"]
    call(sample, *flags)
    record = json.loads((tmp_path / "a.json").read_text())
    runtime.write_json(tmp_path / "a.json", {**record, "cfg_schedule": "constant", "cfg_power": 2.75})
    call(sample, *flags)
    assert "exists already" in capsys.readouterr().out
    runtime.write_json(tmp_path / "a.json", {**record, "cfg_schedule": "power", "cfg_power": 2.75})
    refused("cfg_schedule: 'power' there, None here", call, sample, *flags)
    (tmp_path / "a.json").unlink()
    refused("a.npz exists, without .*a.json", call, sample, *flags)


@pytest.mark.parametrize("name, message", [
    ("x.jpg", "writes a"), ("folder", "writes a"), ("folder{}", "is a folder; name a file in it"),
    ("file/x{}", "file"), ("locked/x{}", "locked may not be written to"), ("locked/new/x{}", "locked")])
def test_what_cannot_be_written_is_refused_before_it_is_drawn(tmp_path, saved, monkeypatch, name, message):
    def never(*args):
        raise AssertionError("drawn in vain")
    monkeypatch.setattr(sample, "generate", never)
    if os.getuid() == 0:                                                 # who may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    suffix = ".webp" if checkpoints.load_ar(saved[0])[1].config.frames else ".png"
    for made in ("folder", f"folder{suffix}", "folder.npz", "locked"):
        (tmp_path / made).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").chmod(0o500)
    for suffix, flags in ((suffix, []), (".npz", ["--num-fid-samples", 3])):
        said = error_line(sample, "--ckpt", saved[0], "--output", tmp_path / name.format(suffix), *flags)
        assert message in said


def test_a_grid_shows_members_of_the_set_by_class(tmp_path, saved):
    axes = len(checkpoints.load_ar(saved[0])[0].config.grid)
    suffix = ".png" if axes == 2 else ".webp"
    call(sample, "--ckpt", saved[0], "--classes", "cat,0", "--num-images", 4, "--save-images", "--batch-size",
         4, "--output", tmp_path / f"a{suffix}")
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["captions"] == ["cat"] * 4 + ["ant"] * 4 and record["numbers"] == [2, 5, 8, 11, 0, 3, 6, 9]
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [f"class-000{label}-00{i}{suffix}" for label in (0, 2) for i in range(4)]
    call(sample, "--ckpt", saved[0], "--num-fid-samples", 12, "--batch-size", 4, "--output",
         tmp_path / "a.npz")
    for label, i in ((0, 1), (2, 3)):
        with Image.open(tmp_path / "a" / f"class-000{label}-00{i}{suffix}") as file:
            alone = np.asarray(file.convert("RGB"))                      # of a clip the first frame
        drawn = samples_of(tmp_path / "a.npz")[i * 3 + label]
        assert (alone == (drawn if drawn.ndim == 3 else drawn[0])).mean() > 0.99
    assert Image.open(tmp_path / "a.png").size[1] == 2 * (96 + 2 + 14) + 2
    call(sample, "--ckpt", saved[0], "--num-fid-samples", 5, "--classes", "cat,0", "--output",
         tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as whole, np.load(tmp_path / "b.npz") as some:
        assert whole["arr_1"].tolist() == [0, 1, 2] * 4 and some["arr_1"].tolist() == [2, 0, 2, 0, 2]


def test_an_image_is_completed_below_its_kept_rows(tmp_path, saved, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6                                                     # held upright, stored on its side
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    flags = ["--ckpt", saved[0], "--keep", tmp_path / "photo.png", "--output", tmp_path / "a.png"]
    model, decoder, _ = checkpoints.load_pair(saved[0])
    if len(model.config.grid) == 3:
        refused("--keep completes images", call, sample, *flags[:4])
        return
    call(sample, *flags, "--classes", "ant,cat")
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape == (2 * (96 + 2 + 14) + 2, 6 * 98 + 2, 3)             # original, kept, four completions
    kept = grid[2:98, 100:196]
    assert (kept[:48] == grid[2:50, 2:98]).all() and (kept[48:] == 128).all()
    refused("--rows 99", call, sample, *flags, "--rows", 99)
    refused("cannot be read as an image", call, sample, *flags, "--keep", saved[0])
    (original, _), _ = sample.keep_rows(sample.get_args(list(map(str, flags))), model, decoder)
    assert torch.equal(original[0], codec.read_file(tmp_path / "photo.png")[0])    # as tokenizer.py reads it
    assert np.array_equal(original[0].movedim(0, -1), np.rot90(pixels, -1))
    monkeypatch.setattr(sample.data.View, "pixels", lambda *more: int("a bug"))
    with pytest.raises(ValueError) as caught:
        call(sample, *flags)
    assert caught.type is ValueError                                     # a bug is no user's mistake


@pytest.mark.slow
def test_defaults_classes_and_files(tmp_path, saved, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("no AR model .*runs/ar", call, sample)
    (tmp_path / "runs" / "ar").mkdir(parents=True)
    (tmp_path / "runs" / "ar" / "step-00000020.pt").symlink_to(saved[0])
    for flags in ([], ["--temperature", 0, "--mixed-precision", "bf16"], ["--raw-weights"]):
        call(sample, "--num-images", 1, *flags)
        grid, = pathlib.Path("runs/samples").glob("*.png")
    assert json.loads(grid.with_suffix(".json").read_text())["captions"] == ["ant", "bee", "cat"]
    ckpt = save_pair(tmp_path / "free", classes=())[0]
    call(sample, "--ckpt", ckpt, "--num-images", 3, "--output", "a.png")
    call(sample, "--ckpt", ckpt, "--num-fid-samples", 5, "--output", "a.npz")
    assert samples_of("a.npz").shape == (5, 16, 16, 3)
    for flags, message in ((["--classes", 0], "unconditional"), (["--cfg-scale", 2], "--cfg-scale")):
        refused(message, call, sample, "--ckpt", ckpt, *flags, "--output", "b.png")


@pytest.mark.slow
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, saved):
    ckpt, own = saved
    published = tmp_path / "AR.ckpt"
    toy = ARModel(ar_model.PRESETS["toy"]).state_dict()
    torch.save({"state_dict": {published_ar_name(name): tensor for name, tensor in toy.items()},
                "global_step": 3}, published)
    other = save_pair(tmp_path / "other", seed=1, bits=(3, 4))
    for flags, message in (
            (["--ckpt", ckpt, "--tokenizer", other[1]], f"{other[1]} is not the one .*runs/x.pt"),
            (["--ckpt", other[0]], r"draws .*128 ids on a grid \(.*\), but .* has 64 ids"),
            (["--ckpt", published], "AR.ckpt contains no whole tokenizer; .*--tokenizer"),
            (["--ckpt", published, "--tokenizer", own], "draws .*1024 ids")):
        refused(message, call, sample, *flags)
    checkpoints.load_pair(ckpt, own)       # the right one


@pytest.mark.parametrize("preset, scales, temperature", [
    ("AR-B", [1.9, 2.0], 1.0), ("AR-L", [1.9, 1.9], 1.1), ("AR-XL", [1.75, 1.85], 1.1), ("toy", [2, 2], 1.0)])
def test_published_settings_are_the_defaults_of_published_presets(preset, scales, temperature):
    with torch.device("meta"):
        model = ARModel(ar_model.PRESETS[preset])
    info = {"preset": preset, "source": "published"}
    how = sample.how_from_args(sample.get_args([]), model, info, 50)
    assert [setting.cfg_scale for setting in how.settings] == scales and how.batch_size == 50 and how.truncate
    assert how.settings[0].temperature == temperature and how.settings[1] == ar_model.Settings(scales[1])
    shown = sample.how_from_args(sample.get_args(["--top-k", "7"]), model, info, 100, looking=True)
    assert shown.settings[0].top_k == 7 and shown.settings[0].top_p == (1 if preset == "toy" else 0.96)


def test_settings_are_said_in_words():
    for values, words in (
            ({"cfg_scale": 2.0}, "guidance 2, temperature 1, all entries"),
            ({"cfg_scale": (1.9, 2), "temperature": (1.1, 0.5)}, "guidance 1.9 / 2, temperature 1.1 / 0.5"),
            ({"top_k": (0, 7), "top_p": 0.96},
             "guidance 1, temperature 1, all entries up to a probability of 0.96 / the 7 likeliest entries")):
        assert sample.in_words(sampling_settings(2, **values)).startswith(words)


def test_classes_go_by_number_or_by_name():
    imagenet = drawn.class_names(None, 1000)
    assert drawn.find_classes(" 207, Otter", imagenet) == [207, 360]
    wnids = [f"n{i:08d}" for i in range(1000)]                             # of some other thousand
    assert drawn.class_names(wnids, 1000) == wnids
    assert drawn.class_names(None, 3) == ["0", "1", "2"] and drawn.find_classes(None, ["a", "b"]) == [0, 1]
    assert imagenet[drawn.find_classes(None, imagenet)[2]] == "giant panda"
    assert drawn.find_classes(None, [str(i) for i in range(101)]) == [0, 12, 25, 37, 50, 63, 75, 88]
    assert drawn.find_classes("10", ["10", "9", "2"]) == [0]            # a folder called 10
    assert drawn.find_classes("Hen, old", ["cock", "hen", "hen, old"]) == [2]
    for word, names, message in (("crane", ["bird", "crane", "lift", "Crane"], r"the classes \[1, 3\]"),
                                 ("1000", imagenet, "'1000' is none of the 1000 classes"),
                                 ("retriever", imagenet, "'retriever' .* golden retriever")):
        refused(message, drawn.find_classes, word, names)


@pytest.mark.parametrize("flags, message", [
    ("--ckpt /no/such.pt", "/no/such.pt"), ("--classes dog", "'dog' is none of the 3 classes"),
    ("--save-images --num-fid-samples 5", "--num-fid-samples"),
    ("--num-images 2 --num-fid-samples 5", "--num-images"), ("--num-images 0", "--num-images"),
    ("--num-fid-samples 0", "--num-fid-samples"), ("--cfg-scale 1 2 3", "--cfg-scale has 3 values"),
    ("--cfg-scale strong", "--cfg-scale"), ("--top-p 0", "--top-p 0"), ("--top-k 1.5", "--top-k"),
    ("--temperature -1", "--temperature"), ("--output x.jpg", "--output x.jpg"),
    ("--compile --device cpu", "--compile"), ("--nonsense", "--nonsense")])
def test_mistakes_are_one_line_and_exit_status_2(tmp_path, saved, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_line(sample, "--ckpt", saved[0], *flags.split())
    assert not list(tmp_path.glob("runs/samples/*"))
