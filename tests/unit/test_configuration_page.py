"""docs/configuration.md is what the schema says."""

from __future__ import annotations

import pytest

from megatron_nsr.config import Config
from tools.write_configuration_page import PAGE, page


def test_the_page_is_the_schema_s() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tools/write_configuration_page.py"


@pytest.mark.parametrize("section", Config.model_fields)
def test_every_field_is_listed_with_a_meaning(section: str) -> None:
    fields = Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]  # each section is a model
    table = page().split(f"## {section}", 1)[1].split("\n## ", 1)[0]
    rows = {line.split("`", 2)[1]: line for line in table.splitlines() if line.startswith("| `")}
    assert list(rows) == [info.alias or name for name, info in fields.items()]
    for row in rows.values():
        cells = row.replace(r"\|", "").strip("| ").split(" | ")
        assert len(cells) == 4
        assert len(cells[3]) > 5


def test_types_and_defaults_are_in_words() -> None:
    text = page()
    assert "| `lambda` | number ≥ 0 | `0.1` |" in text
    assert "| `eps` | number > 0 | `1e-8` |" in text
    assert "| `limit` | integer ≥ 1 or null | `null` |" in text
    assert "| `schedule` | `constant`, `cosine` | `constant` |" in text
    assert "| `steps` | integer ≥ 0 | required |" in text
