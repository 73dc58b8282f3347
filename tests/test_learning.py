# SPDX-License-Identifier: MIT
"""Learning from pixels to a known optimum: pytest -m slow tests/test_learning.py, about 9 minutes each on one core."""

import importlib

import numpy as np
import pytest
from test_common import AGENTS

# of runs that are short: a larger learning rate, and an optimiser that forgets its first, huge gradients soon
SHORT = dict(size="debug", learning_rate=1e-3, warmup=100, beta2=0.99, imag_horizon=5, entropy_scale=0.003)
SHORT |= dict(batch_size=16, batch_length=12, train_ratio=48.0, learning_starts=256, total_timesteps=12_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind,optimum", [("image", 0.5), ("both", 0.75)])
@pytest.mark.parametrize("name", [name for name in AGENTS if name != "planet"])  # which knows no ends
def test_memory(name, tmp_path, kind, optimum):
    """The cue of two frames ago decides; 90% of the optimum, where forgetting gives 0, and one cue of two 67%."""
    module = importlib.import_module(name)
    args = module.Args(env_id=f"envs:Recall-{kind}-v0", device="cpu", run_root=str(tmp_path), **SHORT)
    agent, args = module.load_agent(module.train(args)["run_dir"], module.Args(device="cpu"))
    scores = module.evaluate(agent, args, 4000)
    assert np.mean(scores) > 0.9 * optimum
