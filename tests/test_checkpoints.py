"""Files are read safely and strictly, the published ones and ours; anything else is one line."""
import dataclasses
import hashlib
import json

import pytest
import torch

import ar_model
import tokenizer
import train_tokenizer
import video
from support import checkpoints, runtime
from helpers import ROOT, published_ar_name, published_video_name, refused, stored

SHAPE = dict(resolution=16, channels=32, channel_multipliers=(1, 2), blocks=1, mid_blocks=1, bits=6)
TINY = tokenizer.TokenizerConfig(**SHAPE)
TINY_CLIPS = video.VideoTokenizerConfig(**SHAPE, frames=5)
TINY_AR = ar_model.ARConfig(width=32, heads=2, inter_blocks=2, intra_blocks=1, bits=(3, 3), grid=(8, 8),
                            num_classes=3)
PUBLISHED = json.loads((ROOT / "tests" / "published.json").read_text())     # file: sha256 of names and shapes


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    """Published files are recognised by their shapes; here a tiny one of each kind is known, too."""
    monkeypatch.setitem(tokenizer.PRESETS, "tiny", TINY)
    monkeypatch.setitem(video.PRESETS, "tiny", TINY_CLIPS)
    monkeypatch.setitem(ar_model.PRESETS, "tiny", TINY_AR)


def lightning(config, seed=0, discriminator=train_tokenizer.PatchGAN):
    """(state_dict of a published tokenizer file, raw model, EMA model), on the current default device."""
    kind = video.VideoTokenizer if hasattr(config, "frames") else tokenizer.Tokenizer
    rename = published_video_name if hasattr(config, "frames") else str
    torch.manual_seed(seed)
    raw, ema, critic = kind(config), kind(config), discriminator()
    state = {rename(name): tensor for name, tensor in raw.state_dict().items()}
    state.update({f"loss.discriminator.{name}": tensor for name, tensor in critic.state_dict().items()})
    parameters = [*[(rename(name), p) for name, p in ema.named_parameters()],
                  *[(f"loss.discriminator.{name}", p) for name, p in critic.named_parameters()]]
    state.update({f"model_ema.{name.replace('.', '')}": p.detach() for name, p in parameters})
    state.update({"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)})
    return state, raw.eval(), ema.eval()


def same(a, b):
    """Whether two models have the same names and weights."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# ---- the published files ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", checkpoints.PUBLISHED)
def test_names_and_shapes_are_published_and_tell_the_preset(name):
    with torch.device("meta"):
        if name.startswith("AR"):
            config = ar_model.PRESETS[name]
            model = ar_model.ARModel(config)
            state = {published_ar_name(ours): tensor for ours, tensor in model.state_dict().items()}
        else:
            args = train_tokenizer.get_args(["--preset", name])
            config = train_tokenizer.TOKENIZER_PRESETS[name]
            state, model, _ = lightning(config, 0, train_tokenizer.DISCRIMINATORS[args.discriminator])
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == PUBLISHED[checkpoints.PUBLISHED[name][1]]
    found = checkpoints.in_our_form(checkpoints.format_of(model), model.state_dict(), {})
    assert found["preset"] == ("in1k-256" if name == "pt-256-2^18" else name)            # the first of two
    assert found["config"] == dataclasses.asdict(config)


def ours(config, changes=None):
    """A checkpoint of a tokenizer as its trainer leaves it, as far as loading goes, and its two models."""
    _, raw, ema = lightning(config)
    more = {"step": 5, "ema": ema.state_dict(), "args": {"data_path": "x"}, **(changes or {})}
    return stored(raw, **more), raw, ema


def published(config):
    """A tokenizer file as the authors published theirs, and its two models."""
    state, raw, ema = lightning(config)
    return {"state_dict": state, "global_step": 5, "callbacks": {}}, raw, ema


@pytest.mark.parametrize("config", [TINY, TINY_CLIPS], ids=["images", "clips"])
@pytest.mark.parametrize("source, make", [("ours", ours), ("published", published)])
def test_tokenizers_load_ema_or_raw_weights(tmp_path, config, source, make):
    saved, raw, ema = make(config)
    torch.save(saved, tmp_path / "a.pt")
    model, info = checkpoints.load_tokenizer(tmp_path / "a.pt")
    assert type(model) is type(raw) and same(model, ema) and not model.training and model.config == config
    assert (info["weights"], info["step"], info["source"]) == ("EMA", 5, source)
    assert info["preset"] == "tiny" if source == "published" else info["trained_on"]["data_path"] == "x"
    assert checkpoints.weights_hash(model) == checkpoints.weights_hash(ema) != checkpoints.weights_hash(raw)
    model, info = checkpoints.load_tokenizer(tmp_path / "a.pt", ema=False)
    assert same(model, raw) and info["weights"] == "raw"


@pytest.mark.slow
def test_a_published_transformer_brings_its_tokenizer(tmp_path):
    torch.manual_seed(0)
    inner, model = tokenizer.Tokenizer(TINY), ar_model.ARModel(TINY_AR)
    state = {published_ar_name(name): tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "bare.ckpt")
    assert checkpoints.load_ar(tmp_path / "bare.ckpt")[1] is None
    state.update({f"first_stage_model.{name}": tensor for name, tensor in inner.state_dict().items()})
    torch.save({"state_dict": state}, tmp_path / "ar.ckpt")
    loaded, decoder, info = checkpoints.load_ar(tmp_path / "ar.ckpt")
    assert same(loaded, model) and same(decoder, inner) and info["preset"] == "tiny"
    assert torch.equal(loaded.rope, model.rope)
    assert same(checkpoints.load_tokenizer(tmp_path / "ar.ckpt")[0], inner)
    del state["transformer.norm.weight"]
    torch.save({"state_dict": state}, tmp_path / "ar.ckpt")
    refused("missing: norm.weight", checkpoints.load_ar, tmp_path / "ar.ckpt")


@pytest.mark.parametrize("name, changes, problem", [
    *[(name, None, name) for name in (
        "encoder.norm_out.weight", "decoder.adaptive.1.beta.bias", "encoder.conv_out.weight",
        "loss.discriminator.main.5.weight", "model_ema.decodernorm_outbias")],
    *[(name, torch.zeros(1), name) for name in (
        "encoder.norm_out.extra", "something.else", "model_ema.more", "loss.discriminator.main.12.weight")],
    ("model_ema.encodernorm_outbias", torch.zeros(3), "encoder.norm_out.bias is [3]")])
def test_missing_unexpected_and_misshapen_names_are_listed(tmp_path, name, changes, problem):
    state, _, _ = lightning(TINY)
    state[name] = changes
    if changes is None:
        del state[name]
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(runtime.UserError) as caught:
        checkpoints.load_tokenizer(tmp_path / "a.ckpt")
    problem = problem.removeprefix("model_ema.").removeprefix("loss.discriminator.")
    assert problem.replace(".", "") in str(caught.value).replace(".", "")


def test_published_names_are_downloaded_from_the_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("OPEN_MAGVIT2_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", (tmp_path / "mirror").as_uri())
    monkeypatch.chdir(tmp_path)
    refused("cannot download .*imagenet_128_L.ckpt", checkpoints.load_tokenizer, "in1k-128")
    repository, file = checkpoints.PUBLISHED["in1k-128"]
    path = tmp_path / "mirror" / "TencentARC" / repository / "resolve" / "main" / file
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": lightning(TINY)[0]}, path)
    assert checkpoints.load_tokenizer("in1k-128")[1]["preset"] == "tiny"
    assert (tmp_path / "cache" / file).exists()


# ---- our files --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ema", [True, False], ids=["EMA", "raw"])
def test_our_transformer_brings_its_tokenizer(tmp_path, ema):
    torch.manual_seed(0)
    inner, raw, averaged = tokenizer.Tokenizer(TINY), ar_model.ARModel(TINY_AR), ar_model.ARModel(TINY_AR)
    saved = stored(raw, preset="AR-B", ema=averaged.state_dict(), classes=["a", "b", "c"],
                   tokenizer={"path": "x"}, first_stage=stored(inner), args={"data_path": "x"})
    torch.save(saved, tmp_path / "ar.pt")
    model, decoder, info = checkpoints.load_ar(tmp_path / "ar.pt", ema)
    assert same(model, averaged if ema else raw) and same(decoder, inner)
    again, about = checkpoints.load_tokenizer(tmp_path / "ar.pt")
    assert same(again, inner) and about["trained_on"]["data_path"] == "x"     # so evaluate.py finds its data
    assert torch.equal(model.rope, raw.rope)
    assert (info["weights"], info["step"], info["preset"]) == ("EMA" if ema else "raw", 3, "AR-B")
    assert (info["classes"], info["tokenizer"]) == (["a", "b", "c"], {"path": "x"})
    for changes in ({"first_stage": {}}, {"first_stage": saved}, {"classes": 3, "model": {}, "ema": {}}):
        torch.save({**saved, **changes}, tmp_path / "bad.pt")
        refused("bad.pt", checkpoints.load_ar, tmp_path / "bad.pt", ema)


def test_models_of_the_wrong_kind_are_refused_by_name(tmp_path):
    torch.save(ours(TINY)[0], tmp_path / "tokenizer.pt")
    refused("marked open-magvit2-tokenizer", checkpoints.load_ar, tmp_path / "tokenizer.pt")
    torch.save({"format": "open-magvit2-ar"}, tmp_path / "ar.pt")
    refused("without its tokenizer", checkpoints.load_tokenizer, tmp_path / "ar.pt")
    torch.save({"state_dict": {"transformer.norm.weight": torch.zeros(1)}}, tmp_path / "bare.ckpt")
    refused("holds no tokenizer", checkpoints.load_tokenizer, tmp_path / "bare.ckpt")


@pytest.mark.parametrize("changes", [
    {"config": None}, {"config": {"bits": 3}}, {"model": 3}, {"model": {"a": 1}}, {"ema": "x"},
    {"config": {**dataclasses.asdict(TINY), "channels": "wide"}},
    {"config": {**dataclasses.asdict(TINY), "channels": 48}},
    {"config": {**dataclasses.asdict(TINY), "channels": 2 ** 20}}, {"format": "something"}, {"args": 3}])
def test_files_that_are_not_what_they_claim_are_one_line(tmp_path, changes):
    torch.save(ours(TINY, changes)[0], tmp_path / "a.pt")
    refused("a.pt", checkpoints.load_tokenizer, tmp_path / "a.pt", "model" not in changes)
    torch.save({"state_dict": 3}, tmp_path / "a.pt")
    for load in (checkpoints.load_tokenizer, checkpoints.load_ar):
        refused("a.pt", load, tmp_path / "a.pt")


class Trap:
    """A class that would run code when unpickled."""

    def __reduce__(self):
        return (open, (Trap.path, "w"))


def test_unknown_pickled_classes_are_refused_and_not_executed(tmp_path):
    Trap.path = str(tmp_path / "executed")
    torch.save({"state_dict": lightning(TINY)[0], "callbacks": Trap()}, tmp_path / "a.ckpt")
    refused("--trust-checkpoint", checkpoints.load_tokenizer, tmp_path / "a.ckpt")
    assert not (tmp_path / "executed").exists()


def test_truncated_and_missing_files_are_clear_errors(tmp_path):
    torch.save({"state_dict": lightning(TINY)[0]}, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.ckpt").write_bytes(whole[:size])
        refused("cannot be read", checkpoints.load_tokenizer, tmp_path / "cut.ckpt")
    refused("does not exist", checkpoints.load_tokenizer, tmp_path / "none.ckpt")
    refused("folder", checkpoints.load_tokenizer, tmp_path)
