"""The server's configuration from its sources: flags, then `PARITYSERVE_*` variables, then a TOML file, then defaults.

A key that is not a setting is an error in the file, which is ours alone. A variable that is not one is a warning:
whoever starts the server may not choose its environment.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from serving.config import ServerConfig
from serving.options import build, flag, kind_of

PREFIX = "PARITYSERVE_"
CONFIG_VARIABLE = "PARITYSERVE_CONFIG"
TOKEN_VARIABLE = "PARITYSERVE_TOKEN"  # the client's
_OTHERS = {CONFIG_VARIABLE, TOKEN_VARIABLE, "PARITYSERVE_DATA_DIR"}  # the last is the trainer's

# What Kubernetes puts into every pod of the namespace for a Service named parityserve:
# https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables
_SERVICE_LINK = re.compile(r"PARITYSERVE_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_.*)")
_SERVICE_LINK_PORT = re.compile(r"(tcp|udp|sctp)://.*")

_TABLE_BEGINS = "<!-- Made by `make docs` from serving/config.py. -->"
_TABLE_ENDS = "<!-- The end of what is made. -->"


def load(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> tuple[ServerConfig, dict[str, str]]:
    """Build the configuration.

    Args:
        flags: the options that were given, by setting.
        environment: the process's variables. An empty one counts as not set; several models are joined by commas.
        file: TOML with one key a setting; the one that PARITYSERVE_CONFIG names when not given.

    Returns:
        The configuration, and the source of each setting: `flag --port`, `environment PARITYSERVE_PORT`,
        `file server.toml` or `default`.

    Raises:
        ValueError: a value is not accepted, or the file is not TOML or has an unknown key.
        OSError: the file cannot be read.
    """
    if file is None and environment.get(CONFIG_VARIABLE):
        file = Path(environment[CONFIG_VARIABLE])
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    names: dict[str, str] = {}
    from_file = _read(file) if file else {}
    for name in ServerConfig.model_fields:
        names[name] = name
        variable = PREFIX + name.upper()
        if name in flags:
            values[name], names[name] = flags[name], flag(ServerConfig, name)
            sources[name] = f"flag {names[name]}"
        elif text := _variable(environment, name):
            values[name] = text.split(",") if get_origin(kind_of(ServerConfig, name)) is tuple else text
            sources[name], names[name] = f"environment {variable}", variable
        elif name in from_file:
            values[name], names[name] = from_file[name], f"{file}: {name}"
            sources[name] = f"file {file}"
        else:
            sources[name] = "default"
    return build(ServerConfig, values, names), sources


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A warning for every `PARITYSERVE_*` variable that nothing here reads."""
    known = {PREFIX + name.upper() for name in ServerConfig.model_fields} | _OTHERS
    return [
        f"{name} is not read: there is no such setting{_near(name, known)}"
        for name in sorted(environment)
        if name.startswith(PREFIX) and name not in known and not _SERVICE_LINK.fullmatch(name)
    ]


def show(config: ServerConfig, sources: Mapping[str, str]) -> str:
    """Every setting with its value and source, as a TOML file that says the same. No setting is itself a secret."""
    lines = [
        (f"# {name} is not set" if value is None else f"{name} = {_toml(value)}", sources[name])
        for name, value in config.model_dump(mode="json").items()
    ]
    width = max(len(setting) for setting, _ in lines)
    return "\n".join(f"{setting:<{width}}  # {source}" for setting, source in lines)


def write_table(page: Path) -> None:
    """Write the table of every setting into a Markdown page, between its two markers."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(_TABLE_BEGINS)
    _, _, after = rest.partition(_TABLE_ENDS)
    page.write_text(f"{before}{_TABLE_BEGINS}\n\n{_table()}\n\n{_TABLE_ENDS}{after}", encoding="utf-8")


def _table() -> str:
    lines = ["| key | flag | accepted | default | what |", "|---|---|---|---|---|"]
    for name, field in ServerConfig.model_fields.items():
        default = "" if field.default in (None, ()) else f"`{_toml(_plain(field.default))}`"
        cells = (
            f"`{name}`",
            f"`{flag(ServerConfig, name)}`",
            _accepted(name),
            default,
            (field.description or "").replace("<", "&lt;"),
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _accepted(name: str) -> str:
    """What a setting may be, in words, from its type and bounds."""
    kind = kind_of(ServerConfig, name)
    if get_origin(kind) is Literal:
        return " ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return "list of text"
    if get_origin(kind) in (types.UnionType, Union):
        return "`auto` or integer"
    words = {bool: "boolean", int: "integer", float: "number", Path: "path"}.get(kind, "text")
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for bound in ServerConfig.model_fields[name].metadata:
        words += "".join(f" {sign} {getattr(bound, word)}" for word, sign in signs.items() if hasattr(bound, word))
    return words


def _variable(environment: Mapping[str, str], name: str) -> str:
    text = environment.get(PREFIX + name.upper(), "")
    return "" if name == "port" and _SERVICE_LINK_PORT.fullmatch(text) else text


def _read(file: Path) -> dict[str, Any]:
    try:
        keys = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not TOML: {error}") from error
    unknown = [
        f"{name}{_near(name, ServerConfig.model_fields)}" for name in keys if name not in ServerConfig.model_fields
    ]
    if unknown:
        raise ValueError(f"{file}: no such setting: {', '.join(unknown)}; --help lists them all, with dashes for _")
    return keys


def _near(name: str, known: Mapping[str, Any] | set[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=2)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _toml(value: Any) -> str:
    """A setting's value: JSON writes text, numbers, truth and lists of text as TOML does."""
    return json.dumps(value, ensure_ascii=False)
