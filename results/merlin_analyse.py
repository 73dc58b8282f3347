# SPDX-License-Identifier: MIT
"""What MERLIN's memory is for, as a picture: python results/merlin_analyse.py RUN [--device cpu]

RUN: run folder or checkpoint of merlin.py. One episode is played without exploration noise, and analysis.png is left
beside the checkpoint: which row is read when, by each key of the predictor and by the policy's; and what was seen, as
the posterior has it, and as the prior had expected it before (the paper's pictures).
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import merlin  # noqa: E402


@torch.no_grad()
def episode(agent, args):
    """-> {name: (T, ...)} of one episode: rows, the number of rows in memory, what each step has computed."""
    envs = merlin.make_envs(args.env_id, 1, args.seed, args)
    row, state, rows = merlin.start_row(envs, args.seed + 1_000), agent.initial(1), []
    start = agent.inputs(row, state)
    torch.manual_seed(args.seed)
    while not rows or not rows[-1]["is_last"][0]:
        state = agent.act(agent.inputs(row, state), eval=True)
        rows.append({**row, "action": agent.env_action(state), "noise": state["noise"], "count": state["count"]})
        row = merlin.next_row(envs, rows[-1]["action"], row)
    envs.close()
    rows = {key: torch.stack([torch.as_tensor(x[key]) for x in rows], 1).to(agent.device) for key in rows[0]}
    computed = agent.unroll({**{key: x for key, x in start.items() if "state/" in key}, **rows})
    return {key: x[0].cpu() for key, x in {**rows, **computed}.items()}


def shown(x, decoder, key, seen=False):
    """An observation, or its prediction, (T, ...) as an image: images side by side, numbers as columns."""
    if key in decoder.images:
        return (x / 255 if seen else x).permute(1, 0, 2, 3).flatten(1, 2)[..., :3]
    if key in decoder.numbers:
        counts = decoder.numbers[key]
        if seen:
            parts = [merlin.onehot(x[:, i], count) for i, count in enumerate(counts)]
        else:
            parts = [logits.softmax(-1) for logits in x.split(counts, -1)]
        return torch.cat(parts, -1).T
    return x.sigmoid().T


@torch.no_grad()
def analyse(agent, args, path):
    """Play one episode and draw it."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, decoder = episode(agent, args), agent.decoder
    weights = torch.cat([steps["weights"], steps["policy_weights"]], 1)  # (T, K+1, R)
    T, heads, _ = weights.shape
    names = [f"key {i + 1}" for i in range(heads - 1)] + ["policy"]
    key = decoder.images[0] if decoder.images else next(iter(decoder.shapes))
    figure, axes = plt.subplots(heads + 3, 1, figsize=(8, 1.6 * (heads + 3)), layout="constrained")
    for axis, name, x in zip(axes[:heads], names, weights.unbind(1), strict=True):
        axis.imshow(x.T[: T + 1].numpy(), aspect="auto", vmin=0, vmax=1, cmap="magma")
        axis.set_ylabel(f"{name}: row")
    pictures = {"seen": shown(steps[key], decoder, key, seen=True)}
    for name, params in ("posterior", steps["post"]), ("prior", steps["prior"]):
        mean, _ = agent.gaussian(params.to(agent.device))
        pictures[name] = shown(decoder(mean)[key].cpu(), decoder, key)
    for axis, (name, x) in zip(axes[heads:], pictures.items(), strict=True):
        axis.imshow(x.numpy(), aspect="auto", vmin=0, vmax=1, cmap="gray")
        axis.set_ylabel(name)
        axis.set_yticks([])
    axes[heads - 1].set_xlabel("step")
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder or checkpoint of merlin.py --agent merlin")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(argv)
    agent, args = merlin.load_agent(asked.run, merlin.Args(device=asked.device))
    if args.agent != "merlin":
        merlin.fail(f"{asked.run}: a baseline, which predicts nothing; allowed: a run of --agent merlin")
    path = (asked.run if asked.run.is_dir() else asked.run.parent) / "analysis.png"
    analyse(agent, args, path)
    print(f"{path}: reads and predictions in one episode")


if __name__ == "__main__":
    main()
