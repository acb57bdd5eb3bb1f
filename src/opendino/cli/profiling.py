# SPDX-License-Identifier: Apache-2.0
"""`opendino pretrain --profile N`: where the time of a step goes, and whether loading or compute is the limit."""

from __future__ import annotations

import tempfile

from rich.console import Console

from opendino.native.build import kernels
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.profile import make_profile, measure_loader, show_profile, top_operators
from opendino.pretrain.stages import timeline
from opendino.pretrain.trainer import Trainer

WARM_UP = 2
"""Steps before the ones that count; the first compile, touch memory and start workers."""
LOADER_BATCHES = 1000
"""More than a measurement of the loader takes."""


def profile_steps(config: PretrainConfig, steps: int) -> int:
    """Time steps of a run in a temporary folder, by parts and by operators, and the loader alone; print the tables."""
    # Log steps come as often as in the run itself; nothing is saved and no probe is scored.
    never = 10**9
    length = WARM_UP + steps + 1 + LOADER_BATCHES
    with tempfile.TemporaryDirectory() as folder:
        update = {"out": folder, "probe": None, "checkpoint_every": never, "loggers": (), "steps": length}
        trainer = Trainer(timeline(config)[0].config.model_copy(update=update))
        console = Console(stderr=True)
        console.print(f"Warming up {WARM_UP} steps, then timing {steps} …")
        trainer.engine.clock.on = True
        batches = trainer.batches()
        for number in range(WARM_UP + steps):
            trainer.advance(batches)
            if number + 1 == WARM_UP:
                trainer.engine.clock.reset()
        trainer.engine.clock.on = False  # the step under the profiler is slower and does not count
        operators = top_operators(lambda: trainer.advance(batches), trainer.engine.device)
        batches = trainer.batches()  # fresh: the workers of the others, which would read along, are gone
        console.print("Timing the loader alone …")
        rate = measure_loader(batches, config.batch_size)
        profile = make_profile(
            trainer.engine.clock,
            config.batch_size,
            loader_rate=rate,
            operators=operators,
            num_workers=config.num_workers,
        )
    show_profile(profile)
    Console().print(kernels().about, highlight=False)
    return 0
