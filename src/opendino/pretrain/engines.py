# SPDX-License-Identifier: Apache-2.0
"""Which engine computes a run: pre-training has its own, other kinds of training theirs."""

from __future__ import annotations

from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.engine import Engine


def make_engine(config: PretrainConfig) -> Engine:
    """Make the engine of a run by the kind of its settings."""
    if type(config) is PretrainConfig:
        return Engine(config)
    from opendino.pretrain.distill.config import DistillConfig, WarmHeadsConfig

    if isinstance(config, DistillConfig):
        from opendino.pretrain.distill.engine import DistillEngine

        return DistillEngine(config)
    if isinstance(config, WarmHeadsConfig):
        from opendino.pretrain.distill.warm_heads import WarmHeadsEngine

        return WarmHeadsEngine(config)
    return Engine(config)
