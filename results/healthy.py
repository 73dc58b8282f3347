# SPDX-License-Identifier: MIT
"""What healthy runs look like: python results/healthy.py runs/A runs/B ... [--at 100 500 1000 2000]

Prints a Markdown table: each loss and statistic, smallest to largest over the runs, around several numbers of updates.
"""

import argparse
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run):
    """-> {name: [(updates so far, value), ...]} of losses and statistics."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    updates = {x.step: x.value for x in events.Scalars("charts/updates")}
    names = [name for name in events.Tags()["scalars"] if name.split("/")[0] in ("losses", "stats")]
    return {name: [(updates[x.step], x.value) for x in events.Scalars(name)] for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--at", nargs="+", type=int, default=[100, 500, 1000, 2000], help="numbers of updates")
    args = parser.parse_args()
    tables = [scalars(run) for run in args.runs]
    print(f"| updates | {' | '.join(f'{at:,}' for at in args.at)} |\n|---|{'---|' * len(args.at)}")
    for name in sorted(set().union(*tables)):
        cells = []
        for at in args.at:  # within a quarter of that number
            near = [x for table in tables for update, x in table.get(name, []) if abs(update - at) <= at / 4]
            low, high = (f"{x:.3g}" for x in (min(near), max(near))) if near else ("–", "–")
            cells.append(low if low == high else f"{low} … {high}")
        print(f"| `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
