"""Loads a user's class from its import path. May import: types."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from megatron_nsr.types import UserError


def load_object(path: str, field: str) -> Any:
    """Returns what `module:name` names, looking in the working directory too, as a script beside the config would.

    Raises UserError naming `field` where there is no such module or name.
    """
    module_name, _, name = path.partition(":")
    if not name:
        raise UserError(f"{field}={path!r}: write an import path as module:Class")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise UserError(f"{field}={path!r}: cannot import {error.name}") from None
    except AttributeError:
        raise UserError(f"{field}={path!r}: module {module_name} has no {name}") from None
