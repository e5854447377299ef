from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.rewards.extraction import last_boxed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{7}.", "7"),
        (r"first \boxed{7}, no: \boxed{8}", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{ 3 }", "3"),
        (r"\boxed {17}.", "17"),
        (r"$\boxed 2$.", "2"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\boxed{3 \boxed{4}", "4"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\\boxed{5}", "5"),
        (r"} { { \boxed{6}", "6"),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed{open", None),
        (r"\boxedtext{1}", None),
        ("", None),
    ],
)
def test_the_last_balanced_box(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


BALANCED = st.recursive(
    st.text(alphabet="x1+ \\,^", max_size=5).map(lambda text: text.replace("\\", "")),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
    max_leaves=10,
)


@given(before=st.text(), contents=BALANCED, after=st.text(alphabet="ab $.{}\n"))
def test_whatever_is_boxed_last_comes_back(before: str, contents: str, after: str) -> None:
    text = before.rstrip("\\") + r" \boxed{" + contents + "}" + after
    assert last_boxed(text) == contents.strip()


@given(st.text(alphabet="\\boxedf{} $2"))
def test_any_text_gives_a_substring_or_none(text: str) -> None:
    answer = last_boxed(text)
    assert answer is None or answer in text


@pytest.mark.parametrize("piece", ["{", r"\boxed{", r"\boxed ", r"\boxed a", "}", "\\", r"\boxed{}"])
def test_time_is_linear_in_adversarial_text(piece: str) -> None:
    """A quadratic scan of 100,000 open groups takes minutes; the bound is far from both."""
    start = time.process_time()
    last_boxed(piece * 100_000 + r"\boxed{1")
    assert time.process_time() - start < 20
