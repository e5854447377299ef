"""Loads and builds a user's class from its import path. May import: types."""

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
    if not (module_name and name):
        raise UserError(f"{field}={path!r}: write an import path as module:Class")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{field}={path!r}: cannot import {error.name}; it must lie in the working directory, or on PYTHONPATH") from None
    try:
        return getattr(module, name)
    except AttributeError:
        raise UserError(f"{field}={path!r}: module {module_name} has no {name}") from None


def load_instance(path: str, field: str, method: str) -> Any:
    """Builds the class that `module:Class` names, without arguments. method: what it must have, spelled as a call.

    Raises UserError naming `field`, one line, whatever goes wrong in the user's module.
    """
    try:
        instance = load_object(path, field)()
    except UserError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())
        raise UserError(f"{field}={path!r}: building it raised {type(error).__name__}: {line}") from None
    if not callable(getattr(instance, method.partition("(")[0], None)):
        raise UserError(f"{field}={path!r}: it has no method {method}")
    return instance
