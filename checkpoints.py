"""What is in a file: our own checkpoints and those that the authors published, read safely and strictly.

    model, info = checkpoints.load_tokenizer("in1k-256")     # of images or clips: a file, or a published name
    model, tokenizer, info = checkpoints.load_ar("AR-B")

Safe: nothing that is stored in a file is ever run. Strict: a name too many or too few, or another shape, is
an error that lists them. A published name is downloaded once, to `runtime.default_weights_dir()`. Our files
are literal dicts (see the ends of both training loops), published ones Lightning's, with a `state_dict` of

    encoder.* decoder.*      the raw weights of a tokenizer; in an AR file under first_stage_model.*
    loss.discriminator.*     not needed here; loss.perceptual_loss.*: a whole LPIPS
    model_ema.*              the EMA of all parameters above, their names without dots; decay; num_updates
    transformer.*            the transformer, under other names than ours, which are the paper's
"""
import argparse
import collections
import contextlib
import dataclasses
import hashlib
import pathlib
import re
import zipfile

import torch

import ar_model
import metrics
import runtime
import tokenizer
import video
from runtime import UserError, require

PUBLISHED = {                       # name: (repository of https://huggingface.co/TencentARC, file)
    "in1k-256": ("Open-MAGVIT2-Tokenizer-256-resolution", "imagenet_256_L.ckpt"),
    "in1k-128": ("Open-MAGVIT2-Tokenizer-128-resolution", "imagenet_128_L.ckpt"),
    "pt-256-2^18": ("Open-MAGVIT2-Tokenizer-262144-Pretrain", "pretrain256_262144.ckpt"),
    "pt-256-2^14": ("Open-MAGVIT2-Tokenizer-16384-Pretrain", "pretrain256_16384.ckpt"),
    "ucf-128": ("Open-MAGVIT2-Tokenizer-262144-Video", "video_128_262144.ckpt"),
    "AR-B": ("Open-MAGVIT2-AR-B-256-resolution", "AR_256_B.ckpt"),
    "AR-L": ("Open-MAGVIT2-AR-L-256-resolution", "AR_256_L.ckpt"),
    "AR-XL": ("Open-MAGVIT2-AR-XL-256-resolution", "AR_256_XL.ckpt")}
FORMATS = {                         # the mark of our own files: (model, config, presets)
    "open-magvit2-tokenizer": (tokenizer.Tokenizer, tokenizer.TokenizerConfig, tokenizer.PRESETS),
    "open-magvit2-video-tokenizer": (video.VideoTokenizer, video.VideoTokenizerConfig, video.PRESETS),
    "open-magvit2-ar": (ar_model.ARModel, ar_model.ARConfig, ar_model.PRESETS)}
*TOKENIZERS, AR = FORMATS
# Our names and the published ones. Inside a block, and for the final norm, they are the same.
AR_NAMES = {"token_embeddings.0.": "pre_emb.", "token_embeddings.1.": "post_emb.", "heads.": "head.",
            "class_embedding.": "class_emb.embedding_table.", "inter_blocks.": "spatial_blocks.",
            "intra_blocks.": "factorized_blocks."}
WRAPPER = ".conv_1."                # published causal convolutions are modules around one; ours are not
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "kernel")       # have no EMA
TRAINED_ON = ("data_path", "val_data_path", "resize", "split_list", "val_split_list")
# Plain containers that Lightning files hold beside the weights. None of them runs code when it is unpickled.
HARMLESS = [argparse.Namespace, collections.defaultdict, collections.Counter, dict, list, set,
            pathlib.PosixPath, pathlib.PurePosixPath]

# ---- 1. The border: files that may be anything -------------------------------------------------------------


@contextlib.contextmanager
def guard(path):
    """Within it, whatever a file makes go wrong that is not what it claims to be becomes one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, EOFError,
            zipfile.BadZipFile) as error:                 # the last two: npz files that were cut off
        raise UserError(f"{path} is damaged, of another version, or not what it claims to be "
                        f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None


def read(path, trust=False):
    """The dict in a checkpoint file, its tensors on the CPU, read from disk when they are first used.

    Raises `UserError` for a missing or truncated file, and for one that needs classes outside of PyTorch;
    those are unpickled only with trust=True, because unpickling can run any code its author wished.
    """
    path = pathlib.Path(path)
    require(path.exists(), f"checkpoint {path} does not exist; check the path, or name a published one of "
                           f"{', '.join(PUBLISHED)}")
    require(path.is_file(), f"checkpoint {path} is a folder; name the .pt or .ckpt file inside it")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            stored = torch.load(path, "cpu", weights_only=not trust, mmap=zipfile.is_zipfile(path))
    except Exception as error:                            # unpickling damaged bytes raises almost anything
        foreign = re.search(r"(?:GLOBAL|global|class|type)\W+([A-Za-z_]\w*(?:\.\w+)+)", str(error))
        if foreign and "nsupported" in str(error):
            problem = (f"holds a pickled {foreign[1]}, which could run code when loaded; nothing was "
                       f"executed (if you trust its author, add --trust-checkpoint)")
        else:
            problem = (f"cannot be read: the file is truncated or is no PyTorch checkpoint "
                       f"({type(error).__name__}); copy or download it again, or use an earlier one")
        raise UserError(f"checkpoint {path} {problem}") from None
    require(isinstance(stored, dict), f"checkpoint {path} holds a {type(stored).__name__}, not a dictionary")
    return stored


def find(path):
    """The file that `path` names: itself or, for a published name, that in the cache, downloaded first."""
    if pathlib.Path(path).exists() or str(path) not in PUBLISHED:
        return path
    repository, file = PUBLISHED[str(path)]
    url = f"https://huggingface.co/TencentARC/{repository}/resolve/main/{file}"
    return runtime.fetch(url, runtime.default_weights_dir())


def differences(own, state):
    """What keeps `state` from fitting the tensors `own`, both {name: tensor}, in words; "" for nothing."""
    shapes = [f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
              for name, tensor in own.items() if name in state and state[name].shape != tensor.shape]
    texts = {"missing": own.keys() - state.keys(), "not expected": state.keys() - own.keys(),
             "wrong shapes": shapes}
    return "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in texts.items() if names)


def load_state(part, state, source):
    """Load a network, optimizer or scaler strictly, or raise one line that names `source`."""
    with guard(source):
        if isinstance(part, torch.nn.Module):
            problem = differences(part.state_dict(), state)
            require(not problem, f"{source} does not fit this model; {problem}")
        part.load_state_dict(state)
        if isinstance(part, torch.optim.Optimizer):       # which takes states of any shape, and fails later
            for parameter, values in part.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    require(values[name].shape == parameter.shape, f"{source} is of another network: {name} "
                            f"is {list(values[name].shape)}, expected {list(parameter.shape)}")


def restore(parts, saved, path):
    """Continue a run: load all `parts`, {name: network, optimizer or scaler}, and the random generators."""
    with guard(path):
        for name, part in parts.items():
            load_state(part, saved[name], f"{name} of {path}")
        runtime.restore_rng_state(saved["rng"])


# ---- 2. Tokenizers and transformers ------------------------------------------------------------------------

def format_of(model):
    """The mark under "format" in our checkpoints of this kind of model."""
    return next(mark for mark, (kind, _, _) in FORMATS.items() if type(model) is kind)


def build(mark, config, state, source):
    """A model of the format `mark` with this config and state, in eval mode on the CPU."""
    with torch.device("meta"):                            # shapes first, without memory or random weights
        model = FORMATS[mark][0](config)
    problem = differences(model.state_dict(), state)
    require(not problem, f"{source} does not fit this model; {problem}")
    model.to_empty(device="cpu")
    if mark == AR:                                        # a constant, and so in no checkpoint
        model.rope = ar_model.rope_table(config.grid, config.width // config.heads)
    model.load_state_dict(state)
    return model.eval()


def own_config(mark, values):
    """The config in one of our files, whose fields are those of this version."""
    kind = FORMATS[mark][1]
    fields = {field.name for field in dataclasses.fields(kind)}
    require(values.keys() == fields, f"the file was written by another version of this project: its config "
                                     f"differs in {', '.join(sorted(values.keys() ^ fields))}")
    return kind(**values)


def closest_preset(mark, state, rename=lambda name: name):
    """(name, config) of the preset whose tensors, under the names of `rename`, are most like `state`."""
    def unlike(config):
        with torch.device("meta"):
            own = FORMATS[mark][0](config).state_dict()
        own = {(rename(name), tensor.shape) for name, tensor in own.items()}
        return len(own ^ {(name, tensor.shape) for name, tensor in state.items()})
    return min(FORMATS[mark][2].items(), key=lambda item: unlike(item[1]))


def load_own(path, stored, ema, kinds):
    """(model, info) of a checkpoint of ours whose format is one of `kinds`."""
    mark = stored["format"]
    what = "AR model" if kinds == [AR] else "tokenizer"
    require(mark in kinds, f"{path} is no {what}, but marked {mark}")
    config = own_config(mark, stored["config"])
    part = "ema" if ema and stored["ema"] else "model"
    model = build(mark, config, stored[part], path)
    preset = next((name for name, known in FORMATS[mark][2].items() if known == config), "custom")
    if mark == AR:                                        # of any number of classes
        preset = stored["preset"]
    return model, facts(path, stored, preset, part == "ema")


def facts(path, stored, preset, ema):
    """What the loaders say about a file."""
    ours = "format" in stored
    args = stored.get("args", {})
    return {"path": str(path), "preset": preset, "weights": "EMA" if ema else "raw",
            "step": stored.get("step" if ours else "global_step"), "source": "ours" if ours else "published",
            "trained_on": {name: args.get(name) for name in TRAINED_ON}}


def load_tokenizer(path, ema=True, trust=False):
    """(tokenizer of images or clips, info) of a checkpoint of ours, or a published one or AR file.

    ema: take the EMA weights where the file has them (published results are with EMA), else the raw ones.
    trust: see `read`. The model is in eval mode on the CPU; info says "path", "preset", "weights" ("EMA" or
    "raw"), "step", "source" ("ours" or "published") and "trained_on". Raises `UserError`, listing names.
    """
    path = find(path)
    stored = read(path, trust)
    with guard(path):
        if "format" in stored:
            return load_own(path, stored, ema, TOKENIZERS)
        require("state_dict" in stored, f"{path} is no tokenizer checkpoint: it has neither our format mark "
                                        f"nor a state_dict")
        return published_tokenizer(path, stored, ema)


def published_tokenizer(path, stored, ema):
    """The same of a published tokenizer, or of the tokenizer in a published AR file."""
    groups = {"": {}, "loss.discriminator.": {}, "model_ema.": {}, "loss.perceptual_loss.": {}}
    extra = []
    for name, tensor in stored["state_dict"].items():
        bare = name.removeprefix("first_stage_model.")
        group = next((prefix for prefix in groups if prefix and name.startswith(prefix)), "")
        if group:
            groups[group][name.removeprefix(group)] = tensor
        elif bare.startswith(("encoder.", "decoder.")):
            groups[""][bare] = tensor
        elif not name.startswith("transformer."):
            extra.append(name)
    require(not extra, f"{path} holds names that no published tokenizer has: {', '.join(sorted(extra))}")
    raw = groups[""]
    averaged = groups["model_ema."]
    require(raw, f"{path} holds no tokenizer: no encoder.* and no decoder.*")
    if ema and averaged:
        # One to one with the raw parameters, so that a weight too many or too few is found, also of D.
        names = [*raw, *[f"loss.discriminator.{name}" for name in groups["loss.discriminator."]
                         if not name.endswith(BUFFERS)]]
        dotless = {name.replace(".", ""): name for name in names}
        wrong = dotless.keys() ^ (averaged.keys() - {"decay", "num_updates"})
        require(not wrong, f"the EMA weights in {path} do not match its raw ones, in "
                           f"{', '.join(sorted(dotless.get(name, name) for name in wrong))}; --raw-weights "
                           f"does without them")
        raw = {name: averaged[name.replace(".", "")] for name in raw}
    of_images, of_clips = TOKENIZERS
    mark = of_clips if any(WRAPPER in name for name in raw) else of_images
    raw = {name.replace(WRAPPER, "."): tensor for name, tensor in raw.items()}
    preset, config = closest_preset(mark, raw)
    return build(mark, config, raw, path), facts(path, stored, preset, ema and averaged)


def published_ar_name(name):
    """Our name of a transformer's parameter in the published files."""
    for ours, theirs in AR_NAMES.items():
        if name.startswith(ours):
            return f"transformer.{theirs}{name.removeprefix(ours)}"
    return f"transformer.{name}"


def load_ar(path, ema=True, trust=False):
    """(ARModel, its tokenizer or None, info) of one of our checkpoints or a published file.

    As `load_tokenizer`; info also says "classes" (their names, None where the file has none) and "tokenizer",
    the record of the one that made the tokens.
    """
    path = find(path)
    stored = read(path, trust)
    with guard(path):
        if "format" in stored:
            model, info = load_own(path, stored, ema, [AR])
            inner = {**stored["first_stage"], "ema": {}, "step": None}
            decoder, _ = load_own(f"the tokenizer inside {path}", inner, False, TOKENIZERS)
            return model, decoder, {**info, "classes": stored["classes"], "tokenizer": stored["tokenizer"]}
        require("state_dict" in stored, f"{path} is no checkpoint of an AR model")
        state = {name: tensor for name, tensor in stored["state_dict"].items()
                 if not name.startswith("first_stage_model.")}
        preset, config = closest_preset(AR, state, published_ar_name)
        with torch.device("meta"):
            own = ar_model.ARModel(config).state_dict()
        problem = differences({published_ar_name(name): tensor for name, tensor in own.items()}, state)
        require(not problem, f"{path} is no whole {preset}; {problem}")
        model = build(AR, config, {name: state[published_ar_name(name)] for name in own}, path)
        decoder = None
        record = None
        if any(name.startswith("first_stage_model.") for name in stored["state_dict"]):
            decoder, its = published_tokenizer(path, stored, ema)
            record = {**{name: its[name] for name in ("path", "weights", "preset")}, "sha256": None}
        return model, decoder, {**facts(path, stored, preset, False), "classes": None, "tokenizer": record}


def weights_hash(model):
    """sha256 of names and weights: which model it is, wherever its file lies and whatever else is in it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


# ---- 3. The networks of the metrics ------------------------------------------------------------------------

RANDOM_LABEL = "NOT COMPARABLE (random weights)"
HEADS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
NETWORK_FILES = {                   # (URL, sha256 or its first digits) of each file
    "inception": [("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                   "pt_inception-2015-12-05-6726825d.pth",
                   "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")],
    "i3d": [("https://huggingface.co/spaces/LanguageBind/Open-Sora-Plan-v1.0.0/resolve/"
             "810fa8c4bdb3a4c8eec9bd57375c29bde6fb46de/opensora/eval/fvd/videogpt/i3d_pretrained_400.pt",
             "55095f049e706479d48e221adcdb145b2b9dc930ba28b081ed72367ffaa32343")],
    "lpips-vgg": [("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
                  (f"{HEADS}/vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")],
    "lpips-alex": [("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
                   (f"{HEADS}/alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0")]}


def load_lpips(net, weights_dir, path=None):
    """`metrics.LPIPS(net)` with its published weights, downloaded to `weights_dir`.

    path: take them out of a published tokenizer instead, which holds the whole network ("vgg").
    """
    model = metrics.LPIPS(net)
    if path is None:
        files = NETWORK_FILES[f"lpips-{net}"]
        trunk, heads = [read(runtime.fetch(url, weights_dir, sha)) for url, sha in files]
        state = {name: tensor for name, tensor in trunk.items() if name in model.state_dict()}
        state.update({f"heads.{i}": heads[f"lin{i}.model.1.weight"] for i in range(5)})
    else:
        state = {}
        with guard(path):
            published = dict(read(find(path)).get("state_dict", {}))
        for name, tensor in published.items():
            name = name.removeprefix("loss.perceptual_loss.")
            if match := re.fullmatch(r"net\.slice\d\.(\d+)\.(weight|bias)", name):
                state[f"features.{match[1]}.{match[2]}"] = tensor
            elif match := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
                state[f"heads.{match[1]}"] = tensor
    load_state(model, state, f"the LPIPS of {path or weights_dir}")
    return model


def load_network(name, weights_dir, random=False, eps=1e-3):
    """(network of a metric in eval mode on the CPU, what its weights are: their sha256, or `RANDOM_LABEL`).

    name: "inception", "i3d" (eps of its BatchNorms), "lpips-vgg" or "lpips-alex". random: seeded random ones.
    """
    net = name.removeprefix("lpips-")
    if random:
        build = {"inception": metrics.FIDInception, "i3d": lambda: metrics.I3D(eps)}
        network = build[name]() if name in build else metrics.LPIPS(net)
        return metrics.randomise(network).eval().requires_grad_(False), RANDOM_LABEL
    source = " ".join(sha for _, sha in NETWORK_FILES[name])
    if net in metrics.LPIPS_TAPS:
        return load_lpips(net, weights_dir), source
    network = metrics.FIDInception() if name == "inception" else metrics.I3D(eps)
    (url, sha), = NETWORK_FILES[name]
    path = runtime.fetch(url, weights_dir, sha)
    # Old files lack BatchNorm's counters of training steps, which nothing reads in eval mode.
    counters = {key: value for key, value in network.state_dict().items() if key.endswith("_tracked")}
    load_state(network, {**counters, **read(path)}, str(path))
    return network.eval().requires_grad_(False), source
