"""The newest value of every metric, for Prometheus to scrape.

May import: types; prometheus_client only where it is switched on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_nsr.types import StepMetrics, UserError

PREFIX = "megatron_nsr_"


class PrometheusLogger:
    """`http://HOST:PORT/metrics` on every address of the machine: one gauge a metric, and `megatron_nsr_step`; label `run`.

    A metric that is not logged at every step keeps its last value. Raises UserError where the port cannot be listened on.
    """

    def __init__(self, *, port: int, run: str) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._run = run
        self._values: dict[str, float] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            raise UserError(f"logging.prometheus_port={port}: cannot listen on it ({error.strerror}); choose a free port") from None

    @staticmethod
    def check(port: int) -> None:
        """Raises UserError where the port cannot be listened on now."""
        PrometheusLogger(port=port, run="").close()

    def log(self, metrics: StepMetrics) -> None:
        # A new dictionary, as the server's thread may be reading the old one.
        self._values = {**self._values, "step": metrics.step, **{name: float(value) for name, value in metrics.values.items()}}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks a collector for at each scrape."""
        from prometheus_client.core import GaugeMetricFamily

        for name, value in self._values.items():
            family = GaugeMetricFamily(prometheus_name(name), name, labels=["run"])
            family.add_metric([self._run], value)
            yield family


def prometheus_name(name: str) -> str:
    """`policy/grad_norm` is `megatron_nsr_policy_grad_norm`, `eval/MATH/pass@8` is `megatron_nsr_eval_MATH_pass_at_8`."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name.replace("@", "_at_"))
