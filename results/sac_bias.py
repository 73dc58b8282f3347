# SPDX-License-Identifier: MIT
"""What the sampled gradients of trained agents are worth: python results/sac_bias.py runs/A runs/B ...

For each estimator the mean gradient to the policy's logits in 500 states of the replay, 400 samples each, against the
exact one, p (Q - p.Q): relative error and cosine.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "applications"))
import sac_discrete  # noqa: E402

torch.set_num_threads(1)
for path in sys.argv[1:]:
    agent, args, saved = sac_discrete.load_agent(path)
    data, count = saved["replay"]
    torch.manual_seed(0)
    obs = data["obs"][torch.randint(min(count, len(data["obs"])), (500,))] / agent.scale
    with torch.no_grad():
        logp, q = agent.actor(obs).log_softmax(-1), agent.values(agent.critics, obs)
    p = logp.exp()
    exact = p * (q - (p * q).sum(-1, keepdim=True))
    text = f"{args.env_id} {args.estimator} seed {args.seed}:"
    for name in sac_discrete.ESTIMATORS:
        agent.args.estimator = name
        logits = logp.repeat(400, 1).requires_grad_()
        (grad,) = torch.autograd.grad(agent.gain(obs.repeat(400, 1), logits).sum(), logits)
        mean = grad.unflatten(0, (400, -1)).mean(0)
        cos = (mean * exact).sum() / mean.norm() / exact.norm()
        text += f"  {name} {(mean - exact).norm() / exact.norm():.2f} {cos:.2f}"
    print(text)
