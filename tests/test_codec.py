"""support/codec.py, the command line of tokenizer.py: what is encoded comes back, of any size and length."""
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageSequence

import tokenizer
import video
from support import codec, pictures, runtime
from helpers import ROOT, call, refused, stored
from test_tokenizer import CLIPS, TINY


@pytest.fixture
def files(tmp_path):
    """A folder with images of odd sides and of one name, a clip, a broken image; two tokenizers beside it."""
    for name, model in (("image.pt", tokenizer.Tokenizer(TINY)), ("clip.pt", video.VideoTokenizer(CLIPS))):
        torch.save(stored(model), tmp_path / name)
    folder = tmp_path / "files"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 19, 23, 3), np.uint8)
    Image.fromarray(pixels[0]).save(folder / "a.png")
    Image.fromarray(pixels[1]).save(folder / "more" / "a.png")
    pictures.write_video(folder / "b.gif", pixels, 10)
    (folder / "c.png").write_bytes(b"no image")
    (folder / "@eaDir").mkdir()
    for name in ("._a.png", "@eaDir/a.png"):               # which no data set reads
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    yield folder
    if dist.is_initialized():                              # the command line's, which run_script would end
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_encode_then_decode_is_reconstruct_bit_for_bit(files, kind, capsys):
    place = files.parent
    call(codec, "reconstruct", files, "--ckpt", place / f"{kind}.pt", "--output", place / "beside")
    call(codec, "encode", files, "--ckpt", place / f"{kind}.pt", "--output", place / "ids")
    call(codec, "decode", place / "ids", "--ckpt", place / f"{kind}.pt", "--output", place / "alone")
    out = capsys.readouterr().out
    assert out.count("broken file left out") == (2 if kind == "clip" else 4) and "19 x 23" in out
    assert out.count("b.gif (it moves, in 7 frames") == (0 if kind == "clip" else 2)
    assert "dB" in out and "bits a" in out
    written = sorted(path.name for path in (place / "alone").iterdir())
    assert written == ["0-a.png", *(["1-b.webp"] if kind == "clip" else []), "3-a.png"]
    with np.load(place / "ids") as ids:
        assert [ids["paths"][0], ids["paths"][-1], ids["classes"][-1]] == ["a.png", "more/a.png", "more"]
    for name in written:
        with Image.open(place / "beside" / name) as beside, Image.open(place / "alone" / name) as alone:
            frames = 7 if name == "1-b.webp" else 1
            assert getattr(beside, "n_frames", 1) == getattr(alone, "n_frames", 1) == frames
            for frame in range(frames):
                beside.seek(frame)
                alone.seek(frame)
                pair = np.asarray(beside.convert("RGB"))
                assert pair.shape == (19, 3 * 23 + 2 * 4, 3)
                again = np.asarray(alone.convert("RGB"))
                assert np.array_equal(pair[:, 27:50], again)
                error = 4 * abs(pair[:, :23].astype(int) - again)
                assert np.array_equal(pair[:, 54:], error.clip(max=255))
    originals = [np.asarray(Image.open(files / name)) for name in ("a.png", "more/a.png")]
    for name, original in zip((written[0], written[-1]), originals):
        assert np.array_equal(np.asarray(Image.open(place / "beside" / name))[:, :23], original)


def test_folders_of_numbered_pictures_are_the_clips_that_data_sets_read(files, capsys):
    for clip in ("x", "y"):
        (files / "clips" / clip).mkdir(parents=True)
        for number in (10, 9, 8):
            Image.new("RGB", (20, 16), (number * 20, 0, 0)).save(files / "clips" / clip / f"{number}.png")
    place = files.parent
    call(codec, "reconstruct", files / "clips", "--ckpt", place / "clip.pt", "--output", place / "out")
    assert "2 folders of numbered pictures are read as clips" in capsys.readouterr().out
    assert sorted(path.name for path in (place / "out").iterdir()) == ["0-x.webp", "1-y.webp"]
    with Image.open(place / "out" / "0-x.webp") as clip:
        reds = [frame.convert("RGB").getpixel((0, 0))[0] for frame in ImageSequence.Iterator(clip)]
    assert reds == [160, 180, 200]


@pytest.mark.parametrize("frames", [0, 1, 2, 5, 6, 12])
def test_any_size_and_length_comes_back_window_by_window(frames):
    torch.manual_seed(0)
    model = video.VideoTokenizer(CLIPS) if frames else tokenizer.Tokenizer(TINY)
    for sides in ((1, 2), (2, 2), (16, 16), (7, 18)):
        x = torch.randint(0, 256, (3, *[frames] * (frames > 0), *sides), dtype=torch.uint8)
        ids = codec.to_tokens(model, x)
        y = codec.from_tokens(model, ids, x.shape)
        assert y.shape == x.shape and len(ids) == max(1, math.ceil(frames / 5))
    if frames in (5, 6):                                   # whole windows stand for themselves
        first = x[:, :5].flatten(0, 1)[None]               # sides 7 x 18 are filled up to 8 x 18
        first = F.pad(first, (0, 0, 0, 1), mode="replicate").view(1, 3, 5, 8, 18)
        first = pictures.to_uint8(model.decode(model.encode(pictures.to_float(first))))
        assert torch.equal(y[:, :5], first[0, :, :, :7])


@pytest.mark.slow
def test_tiles_fade_into_each_other_and_cover_every_pixel():
    model = tokenizer.Tokenizer(TINY).eval()
    for sides in ((1, 1), (64, 64), (65, 200), (333, 517)):
        cover = torch.zeros(3, 1, *sides)
        for index, weight in codec.parts_of((3, *sides), None, 64):
            cover[index] += weight
            assert max(weight.shape) <= 64
        torch.testing.assert_close(cover, torch.ones_like(cover))
        x = torch.randint(0, 256, (3, *sides), dtype=torch.uint8)
        for tile in (None, 64):
            y = codec.from_tokens(model, codec.to_tokens(model, x, tile), x.shape, tile)
            assert y.shape == x.shape and y.dtype == torch.uint8


def test_tiled_files_come_back_and_say_how_far_from_the_whole(files, capsys):
    place = files.parent
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    Image.fromarray(pixels).save(files / "a.png")
    flags = ["--ckpt", place / "image.pt", "--tile", 64, "--output"]
    call(codec, "reconstruct", files / "a.png", *flags, place / "beside")
    call(codec, "encode", files / "a.png", *flags, place / "ids.npz")
    call(codec, "decode", place / "ids.npz", *flags, place / "alone")
    assert "levels from the image in one piece" in capsys.readouterr().out
    beside, alone = [np.asarray(Image.open(place / name / "0-a.png")) for name in ("beside", "alone")]
    assert np.array_equal(beside[:, 154:304], alone)


def test_where_nothing_is_trained_a_small_tokenizer_of_photographs_serves(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    call(codec, "reconstruct", ROOT / "assets" / "photo.png", "--output", "out")
    out = capsys.readouterr().out
    assert "runs/tokenizer is empty, so this is assets/photo.pt" in out and "4.5000 bits a pixel" in out
    assert float(re.search(r"PSNR ([\d.]+) dB", out)[1]) > 24
    (files / "runs" / "tokenizer").mkdir(parents=True)
    shutil.copy(files.parent / "image.pt", files / "runs" / "tokenizer" / "step-00000003.pt")
    call(codec, "reconstruct", "a.png", "--output", "out")
    assert "photo.pt" not in capsys.readouterr().out and codec.PHOTO.stat().st_size < 4e6


def test_ids_of_equal_names_are_decoded_side_by_side(files, capsys):
    ckpt = ("--ckpt", files.parent / "image.pt")
    for name in ("1", "2"):
        call(codec, "encode", files / "a.png", *ckpt, "--output", files / f"{name}.npz")
    call(codec, "decode", files / "1.npz", files / "2.npz", *ckpt, "--output", files / "out")
    assert sorted(path.name for path in (files / "out").iterdir()) == ["0-0-a.png", "1-0-a.png"]


def test_files_may_stand_before_and_after_flags():
    for line in ("encode a.png b.png --ckpt x", "encode --ckpt x a.png b.png", "encode a.png --ckpt x b.png"):
        args = codec.get_args(line.split())
        assert (args.command, args.files, args.ckpt) == ("encode", ["a.png", "b.png"], "x")
    args = codec.get_args([])
    assert (args.command, args.files) == ("reconstruct", [])


def test_mistakes_of_the_command_line_are_one_line(files):
    ckpt = ("--ckpt", files.parent / "image.pt")
    call(codec, "encode", files / "a.png", *ckpt, "--output", files / "ids.npz")
    whole = (files / "ids.npz").read_bytes()
    (files / "cut.npz").write_bytes(whole[:-30])
    (files / "flip.npz").write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    np.savez(files / "foreign.npz", arr_0=np.zeros(3))
    for flags, problem in ((["reconstruct", "nowhere.jpg"], "nowhere.jpg does not exist"),
                           (["reconstruct", files / "ids.npz"], "ids.npz: this tokenizer takes"),
                           (["encode", files / "c.png"], "none of the files could be read"),
                           (["encode", files / "a.png", "--output", files], "is a folder; name a file"),
                           (["encode", "--output", files / "a.png" / "x"], "no folder; name another"),
                           (["decode", files / "a.png"], "a.png is damaged"), (["decode"], "needs files"),
                           (["decode", files / "foreign.npz"], "foreign.npz holds no ids"),
                           (["decode", "nowhere.npz"], "nowhere.npz does not exist"),
                           (["decode", files / "cut.npz"], "cut.npz is damaged"),
                           (["decode", files / "flip.npz"], "flip.npz is damaged")):
        refused(problem, call, codec, *flags, *ckpt)
    with pytest.raises(runtime.UserError, match="another tokenizer"):
        call(codec, "decode", files / "ids.npz", "--ckpt", files.parent / "clip.pt")


# ---- bugs keep their traceback ----------------------------------------------------------------------------

@pytest.mark.parametrize("command, name", [("decode", "from_tokens"), ("decode", "write_file"),
                                           ("reconstruct", "pil_to_tensor"), ("encode", "to_tokens")])
def test_a_bug_is_not_blamed_on_the_file(files, command, name, monkeypatch):
    def planted(*_, **__):
        first, second = 1, 2, 3
        return first + second
    ckpt = ("--ckpt", files.parent / "image.pt")
    call(codec, "encode", files / "a.png", *ckpt, "--output", files / "ids.npz")
    monkeypatch.setattr(codec, name, planted)
    with pytest.raises(ValueError, match="too many values") as caught:
        call(codec, command, files / ("ids.npz" if command == "decode" else "a.png"), *ckpt)
    assert caught.type is ValueError and caught.traceback[-1].name == "planted"
