# SPDX-License-Identifier: Apache-2.0
"""The same with submitit, from Python:  python examples/slurm/submit.py photos/ runs/large --nodes 4

Needs `pip install submitit`, which opendino itself does not depend on. A job that comes to its time limit is submitted
again by submitit (`checkpoint`) and continues where it was.
"""

import argparse
import os

import submitit


class Pretrain:
    """One process of the run, as submitit starts it on each GPU."""

    def __init__(self, data: str, run: str, recipe: str) -> None:
        self.data, self.run, self.recipe = data, run, recipe

    def __call__(self) -> int:
        from opendino.cli import main

        submitit.helpers.TorchDistributedEnvironment().export()  # torchrun's variables, which opendino joins by
        if os.path.exists(f"{self.run}/config.yaml"):
            return main(["resume", self.run])
        return main(["pretrain", "--recipe", self.recipe, "--data", self.data, "--out", self.run])

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("run")
    parser.add_argument("--recipe", default="vitl14_short")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="per node")
    parser.add_argument("--hours", type=int, default=24)
    args = parser.parse_args()
    executor = submitit.AutoExecutor(folder=f"{args.run}/slurm")
    executor.update_parameters(
        nodes=args.nodes, tasks_per_node=args.gpus, gpus_per_node=args.gpus, cpus_per_task=10, timeout_min=60 * args.hours
    )
    print("job", executor.submit(Pretrain(args.data, args.run, args.recipe)).job_id)


if __name__ == "__main__":
    main()
