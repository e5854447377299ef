"""The head gives one rank's results however vocabulary and tokens are shared: tensor, sequence and context parallelism."""

from __future__ import annotations

import pytest

from tests.distributed.fused_head_cases import CASES, LAYOUTS, WORLD
from tests.distributed.launcher import run_cases

Results = dict[str, dict[str, float]]
SUMS = {"d_hidden", "d_weight", "input_grad_sq"}  # of parts over ranks: in bf16, the parts are rounded


@pytest.fixture(scope="module")
def results() -> Results:
    return run_cases("tests.distributed.fused_head_cases", WORLD)


def tolerance(dtype: str, quantity: str) -> float:
    if dtype == "bfloat16":
        return 2e-2 if quantity in SUMS else 1e-5
    return {"float64": 1e-12, "float32": 1e-5}[dtype]


@pytest.mark.parametrize("case", CASES)
def test_every_layout_gives_one_ranks_loss_and_gradients(results: Results, case: str) -> None:
    dtype, _, scenario = case.split("/")
    assert {"loss", "logprobs", "entropy", "token_loss", "d_hidden", "d_weight"} < results[case].keys()
    assert ("clipped" in results[case]) is not scenario.startswith("own_loss")
    assert ("input_grad_sq" in results[case]) is scenario.startswith("sign_norms")
    too_large = {name: error for name, error in results[case].items() if not error <= tolerance(dtype, name)}
    assert not too_large


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_run_gives_the_same_bits(results: Results, layout: str) -> None:
    repeated = {case: errors["repeated"] for case, errors in results.items() if case.split("/")[1] == layout}
    assert repeated and not any(repeated.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bf16_weights_main_grad_is_not_rounded(results: Results, layout: str) -> None:
    assert results[f"bfloat16/{layout}/main_grad_over_micro_batches"]["d_weight"] < 1e-5
