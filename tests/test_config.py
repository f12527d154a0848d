"""Where the server's settings come from, what each source may say, and what it is told when it is wrong."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from serving import option_table
from serving.__main__ import main, parser
from serving.config import ServerConfig
from serving.options import flag, given
from serving.sources import load, show, unknown_variables


@pytest.fixture
def file(tmp_path):
    """Write a configuration file; gives its path."""

    def write(text: str) -> Path:
        path = tmp_path / "server.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def flags(*words: str) -> dict[str, object]:
    return given(ServerConfig, parser().parse_args(["serve", *words]))


def test_flags_come_before_variables_before_the_file_before_defaults(file):
    path = file("port = 1\nthreads = 2\ndrain_s = 3.5\nserver_name = 'file'\n")
    variables = {"PARITYSERVE_PORT": "11", "PARITYSERVE_THREADS": "12"}
    config, sources = load(flags("--port", "21"), variables, path)
    assert (config.port, config.threads, config.drain_s, config.max_batch_size) == (21, 12, 3.5, 1024)
    assert sources["port"] == "flag --port"
    assert sources["threads"] == "environment PARITYSERVE_THREADS"
    assert sources["drain_s"] == f"file {path}"
    assert sources["max_batch_size"] == "default"
    assert set(sources) == set(ServerConfig.model_fields)


def test_every_setting_can_come_from_every_source(file):
    """No field has a type that one of the sources cannot write: each takes its own default back."""
    config = ServerConfig()
    path = file(show(config, dict.fromkeys(ServerConfig.model_fields, "")))
    assert load({}, {}, path)[0] == config
    for name, value in config.model_dump(mode="json").items():
        if value is None or value == []:
            continue
        variables = {"PARITYSERVE_" + name.upper(): str(value)}
        assert load({}, variables)[0] == config
        if isinstance(value, bool):
            words = [flag(ServerConfig, name).replace("--", "--" if value else "--no-", 1)]
        else:
            words = [flag(ServerConfig, name), str(value)]
        assert load(flags(*words), {})[0] == config


def test_several_models_in_every_source(file):
    assert load(flags("--model", "a", "--model", "b"), {})[0].models == ("a", "b")
    assert load({}, {"PARITYSERVE_MODELS": "a,b"})[0].models == ("a", "b")
    assert load({}, {}, file('models = ["a", "b"]'))[0].models == ("a", "b")


def test_booleans_in_every_source(file):
    path = file("allow_unverified = true")
    assert load({}, {}, path)[0].allow_unverified
    assert load({}, {"PARITYSERVE_ALLOW_UNVERIFIED": "1"})[0].allow_unverified
    assert not load({}, {"PARITYSERVE_ALLOW_UNVERIFIED": "false"}, path)[0].allow_unverified
    assert not load(flags("--no-allow-unverified"), {"PARITYSERVE_ALLOW_UNVERIFIED": "true"}, path)[0].allow_unverified


def test_an_empty_variable_counts_as_not_set():
    config, sources = load({}, {"PARITYSERVE_PORT": ""})
    assert (config.port, sources["port"]) == (8001, "default")


def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting():
    variables = {
        "PARITYSERVE_PORT": "tcp://10.0.0.7:8001",
        "PARITYSERVE_PORT_8001_TCP": "tcp://10.0.0.7:8001",
        "PARITYSERVE_PORT_8001_TCP_ADDR": "10.0.0.7",
        "PARITYSERVE_SERVICE_HOST": "10.0.0.7",
        "PARITYSERVE_SERVICE_PORT": "8001",
        "PARITYSERVE_SERVICE_PORT_GRPC": "8001",
    }
    config, sources = load({}, variables)
    assert (config.port, sources["port"]) == (8001, "default")
    assert unknown_variables(variables) == []


def test_the_file_may_be_named_by_a_variable(file):
    path = file("port = 7")
    assert load({}, {"PARITYSERVE_CONFIG": str(path)})[0].port == 7
    assert load({}, {"PARITYSERVE_CONFIG": "none.toml"}, path)[0].port == 7  # the flag comes first


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("port = 70000", r"server\.toml: port: Input should be less than or equal to 65535, got 70000"),
        ("prot = 1", r"server\.toml: no such setting: prot \(did you mean port\?\); --help lists them all"),
        ("max-batch-size = 1", r"no such setting: max-batch-size \(did you mean max_batch_size"),
        ("[server]\nport = 1", r"server\.toml: no such setting: server"),
        ("zzz = 1", r"no such setting: zzz; --help"),
        ("port = ", r"server\.toml: not TOML: Invalid value \(at "),
        ('device = "tpu"', r"server\.toml: device: Input should be auto, cpu, cuda or cuda:0, got 'tpu'"),
        ('models = "mnist"', r"server\.toml: models: Input should be a list, got 'mnist'"),
        ("repository = 5", r"server\.toml: repository: Input should be a path, got 5"),
        ("threads = 0\nmax_queue = 0", r"server\.toml: threads: .*, got 0; .*server\.toml: max_queue: .*, got 0"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(file, text, problem):
    with pytest.raises(ValueError, match=problem):
        load({}, {}, file(text))


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        load({}, {}, tmp_path / "none.toml")
    (tmp_path / "server.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"server\.toml: not TOML: 'utf-8' codec"):
        load({}, {}, tmp_path / "server.toml")


def test_a_wrong_value_names_the_source_that_has_it(file):
    path = file("port = 1\nthreads = 2")
    with pytest.raises(ValueError, match=r"^PARITYSERVE_PORT: .*, got '-1'$"):
        load({}, {"PARITYSERVE_PORT": "-1"}, path)
    with pytest.raises(ValueError, match=r"^--port: .*, got '-2'$"):
        load(flags("--port", "-2"), {"PARITYSERVE_PORT": "-1"}, path)


def test_an_unknown_variable_is_a_warning_with_near_matches():
    variables = {"PARITYSERVE_MAX_QUEU": "1", "PARITYSERVE_TOKEN": "t", "PARITYSERVE_DATA_DIR": "d", "HOME": "h"}
    (warning,) = unknown_variables(variables)
    assert re.match(r"PARITYSERVE_MAX_QUEU is not read: .* \(did you mean PARITYSERVE_MAX_QUEUE", warning)


def test_show_config_prints_a_file_that_says_the_same(file, tmp_path):
    path = file('repository = "a \\"quoted\\" ümlaut"\ndrain_s = 2.0')
    done = subprocess.run(
        [sys.executable, "-m", "serving", "serve", "--config", path, "--port", "9", "--show-config"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PARITYSERVE_THREADS": "2", "PARITYSERVE_THREDS": "3"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert re.search(r"^port = 9 +# flag --port$", done.stdout, re.MULTILINE)
    assert re.search(r"^threads = 2 +# environment PARITYSERVE_THREADS$", done.stdout, re.MULTILINE)
    assert re.search(rf"^drain_s = 2\.0 +# file {path}$", done.stdout, re.MULTILINE)
    assert re.search(r"^max_queue = 1024 +# default$", done.stdout, re.MULTILINE)
    assert "PARITYSERVE_THREDS is not read" in done.stderr
    assert tomllib.loads(done.stdout)["repository"] == 'a "quoted" ümlaut'
    again = tmp_path / "again.toml"
    again.write_text(done.stdout, encoding="utf-8")
    config, _ = load({}, {}, again)
    assert (config.port, config.threads, config.drain_s) == (9, 2, 2.0)


def test_a_wrong_configuration_ends_the_command_with_2(file, capsys):
    assert main(["serve", "--config", str(file("prot = 1"))]) == 2
    assert "no such setting: prot (did you mean port?)" in capsys.readouterr().err


# --- docs/operations.md

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"


def test_the_table_of_settings_is_current(tmp_path):
    made = tmp_path / "operations.md"
    shutil.copy(PAGE, made)
    option_table.write(made, ServerConfig)
    assert made.read_text() == PAGE.read_text(), "docs/operations.md is stale: make docs"
    for name in ServerConfig.model_fields:
        assert f"| `{name}` |" in made.read_text()


def test_the_pages_settings_and_commands_are_accepted(file):
    (example,) = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert load({}, {}, file(example))[0].log_format == "json"
    lines = [line for line in PAGE.read_text().splitlines() if " -m serving " in line]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line.partition(" -m serving ")[2], comments=True)
        parser().parse_args(words)  # exits, which fails the test, when it is not accepted


def test_the_page_mentions_no_flag_that_does_not_exist():
    known = {flag(ServerConfig, name) for name in ServerConfig.model_fields}
    mentioned = set(re.findall(r"`(--[a-z][a-z-]+[a-z])", PAGE.read_text()))
    assert mentioned
    assert mentioned <= known | {"--config"}, mentioned - known
