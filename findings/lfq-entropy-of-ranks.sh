#!/bin/sh
# On two ranks, vector-quantize-pytorch's LFQ halves its codebook entropy instead of averaging over ranks.
#
# Guess, written down before: its `maybe_distributed_mean` does what it is called: the codebook entropy of two
# ranks with half the tokens each is that of one process with all of them, in value and, averaged by DDP, in
# gradient.
#
# Seen with vector-quantize-pytorch 1.32.0 and torch 2.14.1 (gloo, CPU): the sum over ranks is computed and
# dropped, and the rank's own distribution divided by the number of ranks R. What is reported is then
# (H of the rank's own tokens + ln R) / R, and its gradient 1 / R of that of the rank's own tokens.
#
#     one process, all tokens         4.059 nats
#     rank 0 of 2: reports 2.270; its own tokens alone 3.847; gradient x 0.500
#     rank 1 of 2: reports 2.310; its own tokens alone 3.926; gradient x 0.500
#
# What it means here. The term that keeps a large codebook in use weighs half on two GPUs and an eighth on
# eight, against a per-token term of full weight: a setting found on one GPU loses its codebook on many, and
# the number in the log, which falls with every GPU added, is no entropy. With diversity_gamma multiplied by
# the number of ranks one has the term of each rank's own tokens; that of all tokens is not to be had.
set -eu
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --target "$site" torch==2.14.1 vector-quantize-pytorch==1.32.0 numpy==2.4.1
cat > "$site/ranks.py" <<'PYTHON'
import math
import os
import warnings

import torch
import torch.distributed as dist
from vector_quantize_pytorch import LFQ

WORLD = 2


def entropy_and_gradient(z):
    """The codebook entropy (nats) that LFQ reports for z, and its gradient."""
    quantizer = LFQ(dim=6, codebook_size=64).train()
    z = z.clone().requires_grad_()
    _, breakdown = quantizer(z, return_loss_breakdown=True)
    gradient, = torch.autograd.grad(breakdown.batch_entropy, z)
    return breakdown.batch_entropy.item(), gradient


def run(rank, store, results):
    """One rank with its half of the tokens."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    value, gradient = entropy_and_gradient(tokens()[rank::WORLD])
    results.put((rank, value, gradient.norm().item()))
    dist.barrier()
    dist.destroy_process_group()


def tokens():
    """z of eight images (8, 6, 4, 4)."""
    return torch.randn(8, 6, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.02


def main():
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    store = os.path.join(os.path.dirname(__file__), "store")
    ranks = [context.Process(target=run, args=(rank, store, results)) for rank in range(WORLD)]
    for each in ranks:
        each.start()
    measured = sorted((results.get() for _ in ranks), key=lambda each: each[0])
    for each in ranks:
        each.join()
    print(f"one process, all tokens         {entropy_and_gradient(tokens())[0]:.3f} nats")
    for rank, value, norm in measured:
        own, own_gradient = entropy_and_gradient(tokens()[rank::WORLD])
        expected = (own + math.log(WORLD)) / WORLD
        ratio = norm / own_gradient.norm().item()
        print(f"rank {rank} of {WORLD}: reports {value:.3f}; its own tokens alone {own:.3f}; "
              f"gradient x {ratio:.3f}")
        assert abs(value - expected) < 1e-3 and abs(ratio - 1 / WORLD) < 1e-3, "ranks are averaged now"
    print("as written above: (own + ln R) / R, and 1 / R of the gradient")


if __name__ == "__main__":
    main()
PYTHON
PYTHONPATH="$site" python3 "$site/ranks.py"
