"""A backend with what looks at its operands and changes none of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_fp4.precision.backends import Backend, NonFiniteWatch
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.precision.health.probe import ChannelProbe
from megatron_fp4.precision.ledger import GemmLedger
from megatron_fp4.precision.statistics_probe import StatisticsProbe
from megatron_fp4.precision.table import PrecisionTable


@dataclass
class Probes:
    """What looks at a run's operands; what was not asked for is None.

    nonfinite: records every NaN or Inf, which else would raise. gemms: counts every GEMM. statistics: measures every
    operand. channels: watches which channels die. checked_table: the precision table that the GEMMs were compared with
    last; each is compared once.
    """

    nonfinite: NonFiniteWatch = field(default_factory=NonFiniteWatch)
    gemms: GemmLedger | None = None
    statistics: StatisticsProbe | None = None
    channels: ChannelProbe | None = None
    checked_table: PrecisionTable | None = None


def make_probed_backend(
    config: PrecisionConfig, *, gemms: bool = False, statistics: bool = False, channels: bool = False
) -> tuple[Backend, Probes]:
    """The backend that `precision.backend` names, wrapped in the probes that are asked for."""
    probes = Probes()
    backend = make_backend(config, probes.nonfinite)
    if channels:
        backend = probes.channels = ChannelProbe(backend)
    if statistics:
        backend = probes.statistics = StatisticsProbe(backend)
    if gemms:
        backend = probes.gemms = GemmLedger(backend)
    return backend, probes
