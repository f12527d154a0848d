"""The server's configuration from its sources: flags, then `PARITYSERVE_*` variables, then a TOML file, then defaults.

A key that is not a setting is an error in the file, which is ours alone. A variable that is not one is a warning:
whoever starts the server may not choose its environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin

from serving.config import ServerConfig
from serving.credentials import TOKEN_VARIABLE
from serving.options import build, flag, kind_of, near, read_toml

PREFIX = "PARITYSERVE_"
CONFIG_VARIABLE = "PARITYSERVE_CONFIG"
_OTHERS = {CONFIG_VARIABLE, TOKEN_VARIABLE, "PARITYSERVE_DATA_DIR"}  # the client's and the trainer's

# What Kubernetes puts into every pod of the namespace for a Service named parityserve:
# https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables
_SERVICE_LINK = re.compile(r"PARITYSERVE_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_.*)")
_SERVICE_LINK_PORT = re.compile(r"(tcp|udp|sctp)://.*")


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
    from_file = read_toml(ServerConfig, file) if file else {}
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
        f"{name} is not read: there is no such setting{near(name, known)}"
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


def _variable(environment: Mapping[str, str], name: str) -> str:
    text = environment.get(PREFIX + name.upper(), "")
    return "" if name == "port" and _SERVICE_LINK_PORT.fullmatch(text) else text


def _toml(value: Any) -> str:
    """A setting's value: JSON writes text, numbers, truth and lists of text as TOML does."""
    return json.dumps(value, ensure_ascii=False)
