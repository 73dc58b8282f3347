# SPDX-License-Identifier: MIT
"""python kills.py FILE ROOT: runs of a file in ROOT/MOMENT, each killed with -9 in its second save."""

import importlib
import io
import itertools
import os
import pathlib
import signal
import sys

from helpers import short

MOMENTS = {  # name: the function, the file that it works on, when; the step of the checkpoint that is left
    "begin": ("Replay.save", "replay", "before", 40),
    "rows_half_written": ("torch.save", "rows", "middle", 40),
    "rows_synced": ("os.fsync", "rows", "after", 40),
    "rows_renamed": ("os.replace", "rows", "after", 40),
    "rows_saved": ("Replay.save", "replay", "after", 40),
    "checkpoint_half_written": ("torch.save", "checkpoint", "middle", 40),
    "checkpoint_synced": ("os.fsync", "checkpoint", "after", 40),
    "checkpoint_renamed": ("os.replace", "checkpoint", "after", 80),
}


def hook(module, function, file, when):
    """Have the second call of a function with that file end the process."""
    owner, name = function.split(".")
    owner = getattr(module, owner)
    real, calls = getattr(owner, name), itertools.count(1)

    def call(*args):
        target = args[-1] if name != "fsync" else os.readlink(f"/proc/self/fd/{args[-1]}")
        due = pathlib.Path(getattr(target, "name", target)).name.startswith(file) and next(calls) == 2
        if due and when == "middle":
            whole = io.BytesIO()
            real(args[0], whole)
            target.write(whole.getvalue()[: whole.tell() // 2]), target.flush()
        if not due or when == "after":
            result = real(*args)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    for moment, (function, file, when, _) in MOMENTS.items():
        if (child := os.fork()) == 0:  # before torch has started a thread; the imports take longer than the run
            hook(module, function, file, when)
            # a ring so small that the rows of the first save have left it at the second
            args = short(module, "Tiny-vector-discrete-v0", f"{sys.argv[2]}/{moment}", checkpoint_every=40)
            args.buffer_size = 40
            module.train(args)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, f"{moment}: the run was not killed"
