#!/bin/sh
# Inside one autocast region, torch keeps computing with the weights of the region's first forward pass.
#
# Guess, written down before: autocast casts the fp32 weights to bf16 again in every forward pass, or notices
# when they change; so weights that were loaded or updated are those that compute from then on.
#
# Seen with torch 2.14.1, on a CPU: the bf16 copy of a parameter is made once and kept until the outermost
# region ends. Neither an optimizer's step, nor load_state_dict, nor an in-place change renews it, in training
# as under no_grad. The three lines say what a network returned before its weights changed, after that in the
# same region, and in a new one.
#
#     D after optimizer.step()     -0.092 -0.092 -1.408
#     EMA weights swapped in        1.727  1.727  0.000
#     the same in fp32              1.726  0.000  0.000      (no copy, no surprise)
#
# What it means here. A GAN step that stands in one `with autocast` as a whole, forward passes and both
# optimizers, lets the generator be judged by the discriminator of before its step. An evaluation that swaps
# EMA weights in within the region of the last training step measures the raw weights, without a word: the two
# curves then lie on each other, and one concludes that the EMA does nothing. Open a region for each forward
# pass, or call torch.clear_autocast_cache() after every change.
set -eu
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --target "$site" torch==2.14.1 numpy==2.4.1
PYTHONPATH="$site" python3 - <<'PYTHON'
import contextlib

import torch


def swapped(region):
    """What a layer returns before zeros are loaded, after that in the same region, and in a new one."""
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 8)
    x = torch.randn(16, 8)
    with torch.no_grad():
        with region():
            before = net(x).abs().max().item()
            net.load_state_dict({name: torch.zeros_like(each) for name, each in net.state_dict().items()})
            after = net(x).abs().max().item()
        with region():
            return before, after, net(x).abs().max().item()


def stepped(region):
    """The same of a discriminator's mean logit, around its optimizer's step."""
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    x = torch.randn(16, 8)
    with region():
        before = net(x).float().mean()
        before.backward()
        optimizer.step()
        after = net(x).float().mean()
    with region():
        return before.item(), after.item(), net(x).float().mean().item()


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


rows = {"D after optimizer.step()": stepped(bf16), "EMA weights swapped in": swapped(bf16),
        "the same in fp32": swapped(contextlib.nullcontext)}
for name, (before, same, new) in rows.items():
    print(f"{name:<28} {before:6.3f} {same:6.3f} {new:6.3f}")
for name in list(rows)[:2]:
    before, same, new = rows[name]
    assert before == same and abs(new - before) > 0.1, f"{name}: a change of weights is seen now"
before, same, new = rows["the same in fp32"]
assert before > 1 and same == new == 0
print("as written above: the old weights compute on until the region ends")
PYTHON
