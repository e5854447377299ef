"""Whatever is wrong with a user's module is one line that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nsr.platform.imports import load_instance
from megatron_nsr.types import UserError

MODULE = """
class Counter:
    def count(self):
        return 3
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, which an import adds to the path, is the test's own, and so are the modules' names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_class_beside_the_config_is_built(tmp_path: Path) -> None:
    (tmp_path / "beside_the_config.py").write_text(MODULE)
    assert load_instance("beside_the_config:Counter", "a.field", "count()").count() == 3


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("bad_syntax", "class :", "building it raised SyntaxError: "),
        ("bad_attribute", "import os\nos.no_such_function()", "building it raised AttributeError: module 'os' has no attribute"),
        ("bad_import", "import no_such_library", "cannot import no_such_library"),
        ("bad_class", "Counter = 3", "building it raised TypeError: 'int' object is not callable"),
        ("no_method", "class Counter: pass", "it has no method count()"),
        ("no_class", "", "module no_class has no Counter"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, name: str, source: str, message: str) -> None:
    (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(UserError) as error:
        load_instance(f"{name}:Counter", "a.field", "count()")
    assert str(error.value).startswith(f"a.field='{name}:Counter': {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["module", "module:", ":Class"])
def test_what_is_no_import_path_is_told_the_form(path: str) -> None:
    with pytest.raises(UserError, match=f"^a.field='{path}': write an import path as module:Class$"):
        load_instance(path, "a.field", "count()")
