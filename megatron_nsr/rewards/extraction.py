"""Finds the final answer in a response: the last balanced box.

May import: the standard library.
"""

from __future__ import annotations

import re

# An escaped brace is text, not grouping. A doubled backslash before `boxed` is over-escaped JSON, not a line break.
_TOKEN = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)"
    r"|\\(?:boxed|fbox)\s+(?P<bare>[^\s{}$\\]+)\s*\$"
    r"|\\\\(?!boxed|fbox)|\\[{}]"
    r"|(?P<open>\{)|(?P<close>\})"
)


def last_boxed(text: str) -> str | None:
    r"""The contents of the last balanced `\boxed{...}` or `\fbox{...}`, without surrounding blanks; None where there is none.

    "Last" is the box that starts last, so of nested boxes the innermost counts. A box that is never closed is passed over.
    The brace-less `\boxed 2$` of some MATH solutions counts too: its answer runs to the dollar sign. Time is linear in the text.
    """
    open_groups: list[tuple[int, int] | None] = []  # of a box: where it starts, where its contents start; None for other groups
    best_start, best = -1, None
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "box":
            open_groups.append((token.start(), token.end()))
        elif kind == "open":
            open_groups.append(None)
        elif kind == "close" and open_groups:
            box = open_groups.pop()
            if box is not None and box[0] > best_start:
                best_start, best = box[0], text[box[1] : token.start()]
        elif kind == "bare":
            best_start, best = token.start(), token["bare"]
    return None if best is None else best.strip()
