"""What a Prometheus server would scrape from a run."""

from __future__ import annotations

import math
import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_nsr.observability.prometheus_logger import PrometheusLogger, prometheus_name
from megatron_nsr.types import StepMetrics, UserError


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    yield number


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert {sample.labels["run"] for family in families for sample in family.samples} <= {"nsr"}
    assert {family.type for family in families} <= {"gauge"}
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_a_scrape_finds_the_newest_value_of_every_metric(port: int) -> None:
    logger = PrometheusLogger(port=port, run="nsr")
    assert scrape(port) == {}
    logger.log(StepMetrics(1, {"policy/loss": 1.0, "eval/MATH/pass@8": 0.5}))
    logger.log(StepMetrics(2, {"policy/loss": math.nan}))
    values = scrape(port)
    logger.close()
    assert math.isnan(values.pop("megatron_nsr_policy_loss"))
    assert values == {"megatron_nsr_step": 2, "megatron_nsr_eval_MATH_pass_at_8": 0.5}


def test_closing_frees_the_port_and_a_taken_one_is_wrong_input(port: int) -> None:
    first = PrometheusLogger(port=port, run="nsr")
    with pytest.raises(UserError, match=rf"^logging\.prometheus_port={port}: cannot listen on it \(.*in use\); choose a free port"):
        PrometheusLogger(port=port, run="psr")
    first.close()
    PrometheusLogger(port=port, run="psr").close()


def test_names_keep_to_prometheus_characters() -> None:
    assert prometheus_name("eval/AMC 23/cons@16") == "megatron_nsr_eval_AMC_23_cons_at_16"
