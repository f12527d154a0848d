"""What the architecture promises: which way imports go, generated code that is fresh, commands that exist."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import running

import serving.__main__
import trainer.__main__

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Who may import whom; tests and examples may import everything.
ALLOWED = {
    "protos": {"protos"},
    "serving": {"protos", "serving"},
    "trainer": {"serving", "trainer"},
    "benchmarks": {"protos", "serving", "trainer", "benchmarks"},
}
# Heavy or optional packages, and the only modules that may import them.
OWNERS = {
    "onnxruntime": {"serving/backends/onnx.py", "serving/backends/onnx_buffers.py"},
    "torch": {f"serving/backends/{name}.py" for name in ("torch_files", "torchscript", "pt2", "aoti")},
    "opentelemetry": {"serving/tracing.py"},
    "prometheus_client": {"serving/metrics.py"},
}


def imports(path: Path) -> set[str]:
    """The top-level packages that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    modules = list((ROOT / package).rglob("*.py"))
    assert modules
    for module in modules:
        ours = imports(module) & set(ALLOWED)
        assert ours <= ALLOWED[package], f"{module.relative_to(ROOT)} imports {ours - ALLOWED[package]}"


@pytest.mark.parametrize("name", OWNERS)
def test_heavy_packages_have_one_owner_in_the_server(name):
    users = {str(path.relative_to(ROOT)) for path in (ROOT / "serving").rglob("*.py") if name in imports(path)}
    assert users == OWNERS[name]


def test_nothing_uses_what_grpcio_does_not_promise_to_keep():
    private = re.compile(r"^\s*(from|import) grpc\._", re.MULTILINE)
    assert not [path for path in (ROOT / "serving").rglob("*.py") if private.search(path.read_text())]


def test_the_generated_code_is_fresh(tmp_path):
    """As `make protos` makes it."""
    recipe = re.search(r"^protos:.*\n\t\$\(PYTHON\) (-m grpc_tools.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = [re.sub(r"_out=\.$", f"_out={tmp_path}", word) for word in shlex.split(recipe[1])]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    assert len(made) == 3
    for name, text in made.items():
        assert (ROOT / "protos" / name).read_text() == text, f"protos/{name} is stale: make protos"


def shell_lines() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_names_make_targets_that_exist():
    targets = [line.split()[1] for line in shell_lines() if line.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_the_readmes_commands_are_accepted():
    lines = [line for line in shell_lines() if re.match(r"(\S*python3? )?-m |\S*python", line)]
    ours = [line for line in lines if re.search(r"-m (trainer|serving) ", line)]
    assert len(ours) >= 8
    for line in ours:
        _, module, rest = re.split(r" -m (trainer|serving) ", line)
        parser = {"trainer": trainer.__main__.parser, "serving": serving.__main__.parser}[module]()
        parser.parse_args(shlex.split(rest))  # exits, which fails the test, when it is not accepted


def test_the_readmes_python_runs(repository, sample, tmp_path, monkeypatch, capsys):
    from PIL import Image

    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    Image.fromarray(sample[1].images[0, 0].numpy()).save("seven.png")
    Image.fromarray(sample[1].images[1, 0].numpy()).save("photo.jpg")
    with running(repository) as server:
        for code in blocks:
            code = code.replace("127.0.0.1:8001", server.address).replace("mnist", "fashion-mnist")
            exec(compile(code, "README.md", "exec"), {})
            assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_server_starts_without_what_only_clients_need():
    code = "import sys, serving.__main__, serving.server; print({'rich', 'serving.client'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in ALLOWED:
        for module in (ROOT / package).rglob("*.py"):
            name = module.relative_to(ROOT).as_posix()
            if module.name != "__init__.py" and "_pb2" not in module.name:
                assert f"`{name}`" in text, f"docs/architecture.md does not say what {name} is for"
