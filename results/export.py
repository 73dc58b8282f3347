# SPDX-License-Identifier: MIT
"""The acting step of a DreamerV3 agent as an ONNX file, for a machine without PyTorch: pip install onnx onnxscript

    python results/export.py runs/RUN                     agent.onnx in the run folder

Inputs: the observations by their names, (1, ...), uint8 images and float32 vectors as the environment gives them;
is_first (1,), true at the first step of an episode; noise (1, S, K), uniform in (0, 1), which draws the latents;
last_deter, last_stoch and last_action, what the last step returned, zeros at first. Outputs: deter; stoch; action, the
most likely one, (1, A): one-hot, or numbers from -1 to 1, the bounds.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamerv3  # noqa: E402


class Step(nn.Module):
    """Agent.act of --eval, with its noise as an input: the file gives the same for the same inputs."""

    def __init__(self, agent):
        super().__init__()
        self.agent = agent

    def forward(self, obs, is_first, noise, deter, stoch, action):
        agent, obs = self.agent, {key: x[:, None] for key, x in obs.items()}
        noise, state = -noise.clamp(min=1e-12).log()[:, None], {"deter": deter, "stoch": stoch}
        post = agent.rssm.observe(agent.encoder(obs), action[:, None], is_first[:, None], state, noise)
        state = {key: post[key][:, 0] for key in state}
        return *state.values(), agent.actor.sample(agent.rssm.feat(state), mode=True).clamp(-1, 1)


def export(run):
    """run: folder or checkpoint. -> path of the ONNX file beside it."""
    agent, args = dreamerv3.load_agent(run, dreamerv3.Args(device="cpu"))
    envs = dreamerv3.make_envs(args.env_id, 1, args.seed, args)
    row, state = dreamerv3.start_row(envs, args.seed), agent.initial(1)
    envs.close()
    inputs = agent.inputs(row, state)
    obs = {key: inputs[key] for key in agent.decoder.shapes}
    keys = ["deter", "stoch", "action"]
    names = [*obs, "is_first", "noise", *(f"last_{key}" for key in keys)]
    example = obs, inputs["is_first"], torch.rand_like(state["stoch"]), *(state[key] for key in keys)
    path = Path(run) / "agent.onnx" if Path(run).is_dir() else Path(run).with_suffix(".onnx")
    options = dict(input_names=names, output_names=keys, external_data=False, verbose=False)
    torch.onnx.export(Step(agent).eval(), example, path, **options)
    return path


if __name__ == "__main__":
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        dreamerv3.fail("results/export.py needs onnx and onnxscript: pip install onnx onnxscript")
    if len(sys.argv) != 2:
        dreamerv3.fail("allowed: python results/export.py runs/RUN")
    print(export(sys.argv[1]))
