"""What other libraries say of themselves stays off the terminal, unless a user asks for it."""

from __future__ import annotations

import logging
import os
import warnings

import pytest

from megatron_nsr.platform.quiet import ignore_library_warnings


@pytest.mark.parametrize(("chosen", "level"), [(None, "ERROR"), ("INFO", "INFO")])
def test_warnings_of_torchs_own_code_are_hidden_unless_asked_for(monkeypatch: pytest.MonkeyPatch, chosen: str | None, level: str) -> None:
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", chosen or "")  # put back afterwards, whatever is set meanwhile
    if chosen is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    logger = logging.getLogger("vllm.triton_utils.importing")
    monkeypatch.setattr(logger, "filters", [])
    with warnings.catch_warnings():
        ignore_library_warnings()
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == level
