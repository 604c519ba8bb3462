"""Files are read safely and strictly, the published ones and ours; anything else is one line."""
import dataclasses
import hashlib
import json

import pytest
import torch

import ar_model
import checkpoints
import metrics
import runtime
import tokenizer
import train_tokenizer
import video
from checkpoints import UserError
from helpers import ROOT, assert_same, published_ar_name

TINY = tokenizer.TokenizerConfig(resolution=16, channels=32, channel_multipliers=(1, 2), blocks=1,
                                 mid_blocks=1, bits=6)
TINY_CLIPS = video.VideoTokenizerConfig(resolution=16, channels=32, channel_multipliers=(1, 2), blocks=1,
                                        mid_blocks=1, bits=6, frames=5)
TINY_AR = ar_model.ARConfig(width=32, heads=2, inter_blocks=2, intra_blocks=1, bits=(3, 3), grid=(8, 8),
                            num_classes=3)
PUBLISHED = json.loads((ROOT / "tests" / "published.json").read_text())     # file: sha256 of names and shapes


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    """Published files are recognised by their shapes; here a tiny one of each kind is known, too."""
    monkeypatch.setitem(tokenizer.PRESETS, "tiny", TINY)
    monkeypatch.setitem(video.PRESETS, "tiny", TINY_CLIPS)
    monkeypatch.setitem(ar_model.PRESETS, "tiny", TINY_AR)


def wrapped(name):
    """Our name of a causal convolution's parameter in a published file: there is a `.conv_1` inside."""
    parts = name.split(".")
    is_conv = parts[-2] in ("conv_in", "conv_out", "conv1", "conv2", "nin_shortcut", "downsample")
    return ".".join([*parts[:-1], "conv_1", parts[-1]]) if is_conv else name


def lightning(config, seed=0, discriminator=train_tokenizer.PatchGAN):
    """(state_dict of a published tokenizer file, raw model, EMA model), on the current default device."""
    kind = video.VideoTokenizer if hasattr(config, "frames") else tokenizer.Tokenizer
    rename = wrapped if hasattr(config, "frames") else str
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
def test_names_and_shapes_are_those_of_the_published_file(name):
    with torch.device("meta"):
        if name.startswith("AR"):
            state = ar_model.ARModel(ar_model.PRESETS[name]).state_dict()
            state = {published_ar_name(ours): tensor for ours, tensor in state.items()}
        else:
            args = train_tokenizer.get_args(["--preset", name])
            config = train_tokenizer.TOKENIZER_PRESETS[name]
            state, _, _ = lightning(config, 0, train_tokenizer.DISCRIMINATORS[args.discriminator])
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == PUBLISHED[checkpoints.PUBLISHED[name][1]]


@pytest.mark.parametrize("name", checkpoints.PUBLISHED)
def test_published_shapes_lead_back_to_their_preset(name):
    mark, (kind, _, presets) = next(item for item in checkpoints.FORMATS.items() if name in item[1][2])
    with torch.device("meta"):
        state = kind(presets[name]).state_dict()
    found, config = checkpoints.closest_preset(mark, state)
    assert found == ("in1k-256" if name == "pt-256-2^18" else name) and config == presets[name]   # the first


@pytest.mark.parametrize("config", [TINY, TINY_CLIPS], ids=["images", "clips"])
def test_published_tokenizers_load_ema_or_raw_weights(tmp_path, config):
    state, raw, ema = lightning(config)
    torch.save({"state_dict": state, "global_step": 1234, "callbacks": {}}, tmp_path / "a.ckpt")
    model, info = checkpoints.load_tokenizer(tmp_path / "a.ckpt")
    assert same(model, ema) and not model.training and model.config == config
    assert (info["weights"], info["step"], info["source"]) == ("EMA", 1234, "published")
    assert info["preset"] == "tiny"
    model, info = checkpoints.load_tokenizer(tmp_path / "a.ckpt", ema=False)
    assert same(model, raw) and info["weights"] == "raw"


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
    with pytest.raises(UserError, match="missing: norm.weight"):
        checkpoints.load_ar(tmp_path / "ar.ckpt")


@pytest.mark.parametrize("name", [
    "encoder.norm_out.weight", "decoder.adaptive.1.beta.bias", "encoder.conv_out.weight",
    "loss.discriminator.main.5.weight", "model_ema.decodernorm_outbias"])
def test_a_missing_name_is_listed(tmp_path, name):
    state, _, _ = lightning(TINY)
    del state[name]
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    bare = name.removeprefix("model_ema.").removeprefix("loss.discriminator.")
    with pytest.raises(UserError) as caught:
        checkpoints.load_tokenizer(tmp_path / "a.ckpt")
    assert bare.replace(".", "") in str(caught.value).replace(".", "")


@pytest.mark.parametrize("name", ["encoder.norm_out.extra", "something.else", "model_ema.more",
                                  "loss.discriminator.main.12.weight"])
def test_an_unexpected_name_is_listed(tmp_path, name):
    state, _, _ = lightning(TINY)
    torch.save({"state_dict": {**state, name: torch.zeros(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=name.split(".", 1)[-1].removeprefix("discriminator.")):
        checkpoints.load_tokenizer(tmp_path / "a.ckpt")


def test_a_wrong_shape_is_named(tmp_path):
    state, _, _ = lightning(TINY)
    state["model_ema.encodernorm_outbias"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"encoder.norm_out.bias is \[3\]"):
        checkpoints.load_tokenizer(tmp_path / "a.ckpt")


def test_published_names_are_downloaded_from_the_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("OPEN_MAGVIT2_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", (tmp_path / "mirror").as_uri())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot download .*imagenet_128_L.ckpt"):
        checkpoints.load_tokenizer("in1k-128")
    repository, file = checkpoints.PUBLISHED["in1k-128"]
    path = tmp_path / "mirror" / "TencentARC" / repository / "resolve" / "main" / file
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": lightning(TINY)[0]}, path)
    assert checkpoints.load_tokenizer("in1k-128")[1]["preset"] == "tiny"
    assert (tmp_path / "cache" / file).exists()


# ---- our files --------------------------------------------------------------------------------------------

def ours(kind, changes=None):
    """A checkpoint of a tokenizer as its trainer leaves it, as far as loading goes, and its two models."""
    _, raw, ema = lightning(kind)
    return {"format": checkpoints.format_of(raw), "config": dataclasses.asdict(kind), "step": 5,
            "model": raw.state_dict(), "ema": ema.state_dict(), "args": {"data_path": "x"},
            **(changes or {})}, raw, ema


@pytest.mark.parametrize("config", [TINY, TINY_CLIPS], ids=["images", "clips"])
def test_our_checkpoints_round_trip(tmp_path, config):
    stored, raw, ema = ours(config)
    torch.save(stored, tmp_path / "a.pt")
    model, info = checkpoints.load_tokenizer(tmp_path / "a.pt")
    assert type(model) is type(raw) and same(model, ema) and model.config == config
    assert (info["weights"], info["step"], info["source"]) == ("EMA", 5, "ours")
    assert info["trained_on"]["data_path"] == "x"
    assert same(checkpoints.load_tokenizer(tmp_path / "a.pt", ema=False)[0], raw)
    assert checkpoints.weights_hash(model) == checkpoints.weights_hash(ema) != checkpoints.weights_hash(raw)


@pytest.mark.parametrize("ema", [True, False], ids=["EMA", "raw"])
def test_our_transformer_brings_its_tokenizer(tmp_path, ema):
    torch.manual_seed(0)
    inner, raw, averaged = tokenizer.Tokenizer(TINY), ar_model.ARModel(TINY_AR), ar_model.ARModel(TINY_AR)
    stored = {"format": checkpoints.format_of(raw), "preset": "AR-B", "config": dataclasses.asdict(TINY_AR),
              "step": 3, "model": raw.state_dict(), "ema": averaged.state_dict(), "args": {},
              "classes": ["a", "b", "c"], "tokenizer": {"path": "x"},
              "first_stage": {"format": checkpoints.format_of(inner), "config": dataclasses.asdict(TINY),
                              "model": inner.state_dict()}}
    torch.save(stored, tmp_path / "ar.pt")
    model, decoder, info = checkpoints.load_ar(tmp_path / "ar.pt", ema)
    assert same(model, averaged if ema else raw) and same(decoder, inner)
    assert torch.equal(model.rope, raw.rope)
    assert (info["weights"], info["step"], info["preset"]) == ("EMA" if ema else "raw", 3, "AR-B")
    assert (info["classes"], info["tokenizer"]) == (["a", "b", "c"], {"path": "x"})
    for changes in ({"first_stage": {}}, {"first_stage": stored}, {"classes": 3, "model": {}, "ema": {}}):
        torch.save({**stored, **changes}, tmp_path / "bad.pt")
        with pytest.raises(UserError):
            checkpoints.load_ar(tmp_path / "bad.pt", ema)


def test_models_of_the_wrong_kind_are_refused_by_name(tmp_path):
    torch.save(ours(TINY)[0], tmp_path / "tokenizer.pt")
    with pytest.raises(UserError, match="marked open-magvit2-tokenizer"):
        checkpoints.load_ar(tmp_path / "tokenizer.pt")
    torch.save({"format": "open-magvit2-ar"}, tmp_path / "ar.pt")
    with pytest.raises(UserError, match="marked open-magvit2-ar"):
        checkpoints.load_tokenizer(tmp_path / "ar.pt")
    torch.save({"state_dict": {"transformer.norm.weight": torch.zeros(1)}}, tmp_path / "bare.ckpt")
    with pytest.raises(UserError, match="holds no tokenizer"):
        checkpoints.load_tokenizer(tmp_path / "bare.ckpt")


def test_loading_hashes_no_file(tmp_path, monkeypatch):
    torch.save(ours(TINY)[0], tmp_path / "a.pt")
    monkeypatch.setattr(hashlib, "sha256", None)
    checkpoints.load_tokenizer(tmp_path / "a.pt")


@pytest.mark.parametrize("changes", [
    {"config": None}, {"config": {"bits": 3}}, {"model": 3}, {"model": {"a": 1}}, {"ema": "x"},
    {"config": {**dataclasses.asdict(TINY), "channels": "wide"}},
    {"config": {**dataclasses.asdict(TINY), "channels": 48}},
    {"config": {**dataclasses.asdict(TINY), "channels": 2 ** 20}}, {"format": "something"}, {"args": 3}])
def test_files_that_are_not_what_they_claim_are_one_line(tmp_path, changes):
    torch.save(ours(TINY, changes)[0], tmp_path / "a.pt")
    with pytest.raises(UserError) as caught:
        checkpoints.load_tokenizer(tmp_path / "a.pt", ema="model" not in changes)
    assert len(str(caught.value).splitlines()) == 1
    torch.save({"state_dict": 3}, tmp_path / "a.pt")
    for load in (checkpoints.load_tokenizer, checkpoints.load_ar):
        with pytest.raises(UserError):
            load(tmp_path / "a.pt")


class Trap:
    """A class that would run code when unpickled."""

    def __reduce__(self):
        return (open, (Trap.path, "w"))


def test_unknown_pickled_classes_are_refused_and_not_executed(tmp_path):
    Trap.path = str(tmp_path / "executed")
    torch.save({"state_dict": lightning(TINY)[0], "callbacks": Trap()}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="--trust-checkpoint"):
        checkpoints.load_tokenizer(tmp_path / "a.ckpt")
    assert not (tmp_path / "executed").exists()


def test_truncated_and_missing_files_are_clear_errors(tmp_path):
    torch.save({"state_dict": lightning(TINY)[0]}, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.ckpt").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.load_tokenizer(tmp_path / "cut.ckpt")
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.load_tokenizer(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="folder"):
        checkpoints.load_tokenizer(tmp_path)
