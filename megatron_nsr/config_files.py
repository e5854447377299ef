"""Reads and writes configurations: YAML files that include one another, dotted overrides, and one line about what is wrong.

May import: config, types.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from megatron_nsr.config import Config
from megatron_nsr.types import UserError


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file with the files it includes, applies `key=value` overrides and validates.

    Raises UserError with one line that names the field, its value and what would be right.
    """
    return parse_config(read_values(path, overrides))


def read_values(path: str | Path | None, overrides: list[str] | None = None) -> Any:
    """A YAML file (None: nothing) with the files it includes and `key=value` overrides as a plain mapping.

    Raises UserError as `load_config` does.
    """
    for item in overrides or []:
        if "=" not in item:
            raise UserError(f"override {item!r}: write it as section.key=value")
    written = OmegaConf.create() if path is None else _read(Path(path), ())
    try:
        merged = OmegaConf.merge(written, OmegaConf.from_dotlist(list(overrides or [])))
        return OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        raise UserError(f"config {path}: {' '.join(str(error).split())}") from None


def _read(path: Path, including: tuple[Path, ...]) -> Any:
    """A file's keys on top of those of the file that it names as `include`, by a path relative to its own."""
    if path.resolve() in including:
        raise UserError(f"config {including[-1]}: include={path} includes this file in turn")
    if not path.is_file():
        raise UserError(f"config {including[-1]}: include={path}: no such file" if including else f"config file {path}: no such file")
    try:
        own = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        raise UserError(f"config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(own, DictConfig):
        raise UserError(f"config {path}: a list, where sections with their keys are wanted")
    if (included := own.pop("include", None)) is None:
        return own
    if not isinstance(included, str):
        raise UserError(f"config {path}: include={included}: give one file's path, relative to this file")
    return OmegaConf.merge(_read(path.parent / included, (*including, path.resolve())), own)


def parse_config(values: Any) -> Config:
    """Validates a plain mapping; raises UserError naming every wrong field."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"config: {describe_errors(error, Config)}") from None


def describe_errors(error: ValidationError, schema: type[BaseModel]) -> str:
    """Every wrong field of a mapping that was validated as `schema`, in one line."""
    return "; ".join(_describe(item, schema) for item in error.errors())


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="python", by_alias=True)))


def _describe(item: Any, schema: type[BaseModel]) -> str:
    """One pydantic error as `field=value: what would be right`."""
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).removeprefix(".")
    if item["type"] == "extra_forbidden":
        return f"{field}: no such key{_nearest(item['loc'], schema)}"
    if item["type"] == "missing":
        return f"{field}: required, but not given"
    if item["type"] == "value_error":
        problem = str(item["ctx"]["error"])
        return f"{field}={item['input']!r}: {problem}" if field else problem
    if item["type"] == "int_type" and isinstance(item["input"], float) and item["input"].is_integer():
        return f"{field}={item['input']!r}: write it as a whole number, {int(item['input'])}"  # 1e3 is a float in YAML
    return f"{field}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _nearest(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """Suggests the schema's keys beside an unknown one."""
    model: Any = schema
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        model = next(kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields"))  # a section may be optional
    names = [info.alias or name for name, info in model.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(names)}"
