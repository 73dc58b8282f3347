# SPDX-License-Identifier: MIT
"""Puts the folder with the scripts on the path. They are single files: there is no package to install."""

import os
import pathlib
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait for each other cost more than they give
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
