# SPDX-License-Identifier: MIT
"""Puts the folder with the scripts on the path. They are single files: there is no package to install."""

import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(2)
