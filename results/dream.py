# SPDX-License-Identifier: MIT
"""Four dreams of a trained agent side by side: one real observation each (green bar), then its model alone (red).

    python results/dream.py dreamerv3 runs/RUN            dream.gif in the run folder; or dreamerv2, planet
    python results/dream.py dreamerv3 runs/RUN --beside   what really happened above what the model says, and the error

In the Dreamers the policy acts on imagined states; PlaNet plans at each of them, by the cross-entropy method.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclass
class Args:
    file: Annotated[Literal["dreamerv3", "dreamerv2", "planet"], tyro.conf.Positional]  # that made the run
    run: Annotated[str, tyro.conf.Positional]  # run folder, or checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    steps: int = 64  # to dream
    beside: bool = False  # reality above: the agent plays, and the model predicts from its actions


@torch.no_grad()
def dream(module, agent, args, steps):
    """-> uint8 (1 + steps, H, W, 3), a frame for the observation and one for each step."""
    envs = module.make_envs(args.env_id, 4, args.seed, args)
    row, planner = module.start_row(envs, args.seed), hasattr(agent, "plan")
    envs.close()
    state = agent.act(agent.inputs(row, agent.initial(4)), **({"random": True} if planner else {}))
    feats = [agent.rssm.feat(state)]
    for _ in range(steps if planner else 0):
        action = agent.played(agent.plan(state)["action"])
        with agent.autocast():
            future = agent.rssm.imagine(state, action[:, None])
        state = {key: future[key][:, 0] for key in ("deter", "stoch")}
        feats.append(agent.rssm.feat(state))
    with agent.autocast():
        feat = torch.stack(feats, 1) if planner else agent.rssm.imagine(state, agent.actor.sample, steps)[0]
        recon = agent.decoder(feat)
    shown = module.shown(recon) if planner else recon  # PlaNet's images are -0.5 to 0.5
    return module.film(module.picture(shown), seen=1)


def beside(module, agent, args, steps, before=100):
    """-> uint8 (steps, H, W, 3): truth, model, error, as in open_loop.gif, of four games played now."""
    envs, rows = module.make_envs(args.env_id, 4, args.seed, args), []
    row, state = module.start_row(envs, args.seed), agent.initial(4)
    for _ in range(before + steps + 1):
        state = agent.act(agent.inputs(row, state))
        rows.append({**row, "action": agent.env_action(state)})
        row = module.next_row(envs, rows[-1]["action"], row)
    envs.close()
    batch = {key: torch.as_tensor(np.stack([x[key] for x in rows[before:]], 1)) for key in rows[0]}
    with torch.no_grad():
        return module.open_loop(agent, batch)


def main(options):
    module = importlib.import_module(options.file)
    agent, args = module.load_agent(options.run, module.Args(device=options.device))
    path = Path(options.run)
    path = (path if path.is_dir() else path.parent) / "dream.gif"
    film = beside if options.beside else dream
    module.save_gif(path, film(module, agent, args, options.steps))
    print(path)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
