#!/bin/sh
# Averaging a model's weights with torch changes integer buffers that never change: tables, level counts.
#
# Guess, written down before: with use_buffers=True, which one needs for BatchNorm, an integer buffer that is
# the same in every step is the same in the averaged model, whatever the decay: the mean of equal numbers.
#
# Seen with torch 2.14.1 and vector-quantize-pytorch 1.32.0: integers are averaged as fp32 and cut off, not
# rounded. n * decay + n * (1 - decay) lies just below n for up to a third of all n, with some decays and not
# with others; such an n loses 1 in a step, and large ones fall further. No warning. After twenty steps in
# which no weight changes at all: the share of ids of an FSQ that are still the same, its levels, and how many
# of the numbers 0 .. 960 (the table of relative positions of a 16 x 16 attention window) are others.
#
#     decay    FSQ 8 6 5             FSQ 7 5 5 5 5             0 .. 960 changed
#     0.999    1.000  levels 8 6 5   1.000  levels 7 5 5 5 5      0
#     0.9995   0.011  levels 8 5 5   0.075  levels 7 5 5 5 5    288
#     0.9998   1.000  levels 8 6 5   1.000  levels 7 5 5 5 5      0
#     0.9999   1.000  levels 8 6 5   1.000  levels 7 5 5 5 5    188
#
# What it means here. Finite scalar quantisers hold their levels and the place values of their digits (1 7 35
# 175 875, which becomes 1 7 35 174 875) in integer buffers, so the averaged tokenizer, the one that is
# published and that makes the ids a transformer learns from, writes other ids than the trained one. These
# buffers are not persistent: no comparison of state_dicts shows it. And it hangs on the decay, so that a run
# with 0.999 tells nothing of one with 0.9995. Average floating-point tensors only, and copy the others.
set -eu
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --target "$site" torch==2.14.1 vector-quantize-pytorch==1.32.0 numpy==2.4.1
PYTHONPATH="$site" python3 - <<'PYTHON'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from vector_quantize_pytorch import FSQ


def averaged(model, decay):
    """The average of a model over twenty steps in which it stays as it is."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(20):
        average.update_parameters(model)
    return average.module


def same_ids(levels, decay):
    """The share of ids that the average gives as the model does, and the levels that it ends with."""
    torch.manual_seed(0)
    width = len(levels)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), FSQ(levels, preserve_symmetry=True)).eval()
    average = averaged(model, decay)
    assert torch.equal(model[0].weight, average[0].weight)
    x = torch.randn(1, 2000, width)
    with torch.no_grad():
        share = (model(x)[1] == average(x)[1]).float().mean().item()
    return share, " ".join(map(str, average[1]._levels.tolist()))


def changed(decay):
    """How many of the numbers 0 .. 960 are others in the average."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("index", torch.arange(961))
    return (averaged(model, decay).index != model.index).sum().item()


rows = {}
print("decay    FSQ 8 6 5             FSQ 7 5 5 5 5             0 .. 960 changed")
for decay in (0.999, 0.9995, 0.9998, 0.9999):
    small, small_levels = same_ids([8, 6, 5], decay)
    large, large_levels = same_ids([7, 5, 5, 5, 5], decay)
    rows[decay] = small, large, changed(decay)
    print(f"{decay:<8} {small:.3f}  levels {small_levels}   {large:.3f}  levels {large_levels}   "
          f"{rows[decay][2]:4d}")
assert rows[0.999] == rows[0.9998] == (1, 1, 0)
assert max(rows[0.9995][:2]) < 0.5 and rows[0.9995][2] > 200, "constants stay constants with 0.9995 now"
assert rows[0.9999][:2] == (1, 1) and rows[0.9999][2] > 100, "constants stay constants with 0.9999 now"
print("as written above: the average of equal integers is another integer")
PYTHON
