"""Why does ReLU's error in Figure 3 hardly depend on beta? The same error for far smaller beta, in float64.

    python benchmarks/paper/fig3_small_beta.py --data data/tiny-imagenet-0-100

If crossed kinks add an error of their own, it stays when beta goes to 0. If instead a smooth error has only reached the
distance of unrelated trajectories, it is proportional to beta below some beta. The batch size tells whether more images
per gradient change that. Finished draws are in fig3_small_beta.json: the command resumes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.paper.fig3 import ALPHA, K, Task
from benchmarks.paper.figures import RESULTS
from benchmarks.paper.long_horizon_runs import differences
from dist_cts.data.batches import DataConfig, TaskBatches, open_task

BETAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CASES = {  # activation, batch size
    "ReLU, batch 16": ("ReLU", 16),
    "Softplus, batch 16": ("Softplus", 16),
    "ReLU, batch 64": ("ReLU", 64),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a prepared task's folder")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of fig3_small_beta.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = DataConfig()
    source = open_task(args.data, "train", config, torch.device("cpu"))
    path = args.out / "fig3_small_beta.json"
    settings = {"data": source.manifest.name, "alpha": ALPHA, "k": K, "betas": list(BETAS)}
    stored = json.loads(path.read_text()) if path.exists() else {"settings": settings, "log10_errors": {}}
    if different := differences(stored["settings"], settings):
        raise SystemExit(f"{path}: made with other settings ({different}); move it away, or use --out")
    for name, (activation, batch_size) in CASES.items():
        errors = stored["log10_errors"].setdefault(name, [])
        for draw in range(len(errors), args.draws):
            batches = TaskBatches(source, draw, batch_size, config)
            task = Task(batches, source.manifest.classes, draw, activation, torch.float64)
            errors.append([task.log_errors(beta, [K], ALPHA)[0] for beta in BETAS])
            print(f"{name}, draw {draw + 1}: {np.round(errors[-1], 2)}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(stored, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
