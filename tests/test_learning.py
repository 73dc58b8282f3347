# SPDX-License-Identifier: MIT
"""Learning from pixels to a known optimum: pytest -m slow tests/test_learning.py, 5 to 11 minutes each on one core."""

import importlib

import numpy as np
import pytest

# of runs that are short: larger learning rates, an optimiser that forgets its first, huge gradients soon, and enough
# exploration that the policy does not choose before the model remembers
SHORT = dict(size="debug", imag_horizon=5, batch_size=16, batch_length=12, total_timesteps=12_000)
V3 = dict(learning_rate=4e-4, warmup=100, entropy_scale=0.1, train_ratio=48.0, learning_starts=256)
IMAGE, BOTH = {**V3, "beta2": 0.997}, {**V3, "beta2": 0.99, "total_timesteps": 16_000}
V2 = dict(learning_rate=1e-3, actor_learning_rate=3e-4, critic_learning_rate=1e-3, entropy_scale=0.03)
V2 |= dict(train_every=4.0, prefill=256)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,flags,kind,optimum",
    [("dreamerv3", IMAGE, "image", 0.5), ("dreamerv3", BOTH, "both", 0.75), ("dreamerv2", V2, "image", 0.5)],
)
def test_memory(name, flags, tmp_path, kind, optimum):
    """The cue of two frames ago decides; 90% of the optimum, where forgetting gives 0, and one cue of two 67%."""
    module = importlib.import_module(name)
    args = module.Args(env_id=f"toy_envs:Recall-{kind}-v0", device="cpu", run_root=str(tmp_path), **SHORT | flags)
    agent, args = module.load_agent(module.train(args)["run_dir"], module.Args(device="cpu"))
    scores = module.evaluate(agent, args, 4000)
    assert np.mean(scores) > 0.9 * optimum
