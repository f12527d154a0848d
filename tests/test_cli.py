"""The two command lines, as processes: output, exit codes, signals."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, running
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_images import photograph
from test_parity import change_weight

import trainer.__main__
from protos import classifier_pb2 as pb
from serving.__main__ import main as serving_here
from serving.client import Client, _models
from trainer import checkpoint as checkpoints

ROOT = Path(__file__).parents[1]


def command(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300, "env": environment(), **options},
    )


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}


def trainer_here(words: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the errors of a trainer's command in this process, which has torch already."""
    try:
        code = trainer.__main__.main([str(word) for word in words])
    except SystemExit as end:  # of argparse
        code = end.code
    return code, capsys.readouterr().err


@contextlib.contextmanager
def serving(
    *words: object, start: tuple[str, ...] = ("-m", "serving"), line: str = "READY on"
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process that has logged the line, and the address in it."""
    process = subprocess.Popen(
        [sys.executable, *start, "serve", "--port", "0", *map(str, words)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log = ""
        for logged in process.stderr:
            log += logged
            if ready := re.search(rf"{line} (\S+)", logged):
                yield process, ready[1]
                break
        else:
            pytest.fail(f"the server did not start: {log}")
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_predict_pictures_of_every_kind(served, sample, tmp_path):
    Image.fromarray(sample[1].images[0, 0].numpy()).save(tmp_path / "boot.png")
    photograph().save(tmp_path / "photo.jpg")
    done = command("serving", "predict", "--server", served, tmp_path / "boot.png", tmp_path / "photo.jpg")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"boot\.png\s*│\s*\S.*│\s*\d+\.\d\d%", done.stdout)
    assert "photo.jpg" in done.stdout
    assert f"{MODEL} version 1, onnx, CPUExecutionProvider on cpu" in done.stdout


def test_predict_lists_files_by_their_whole_names(served, sample, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["[red]seven.png", ":dog:.png"]  # which rich would take for a colour, and for a picture
    for name in names:
        Image.fromarray(sample[1].images[0, 0].numpy()).save(name)
    assert serving_here(["predict", "--server", served, *names]) == 0
    told = capsys.readouterr().out
    assert all(f"│ {name} " in told for name in names)


def test_predict_names_a_bad_file_and_answers_the_others(served, sample, tmp_path):
    Image.fromarray(sample[1].images[0, 0].numpy()).save(tmp_path / "boot.png")
    (tmp_path / "notes.txt").write_text("hello")
    files = [tmp_path / name for name in ("notes.txt", "none.png", "boot.png")]
    done = command("serving", "predict", "--server", served, *files)
    assert done.returncode == 2
    assert re.search(r"error: .*notes\.txt: .*5 bytes that are not a picture; want one of PNG", done.stderr)
    assert re.search(r"error: .*none\.png: .*No such file", done.stderr)
    assert "boot.png" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("top_k", ["-3", "0", "many", "4294967296"])
def test_predict_refuses_a_wrong_number_of_classes(top_k, capsys):
    with pytest.raises(SystemExit, match="2"):
        serving_here(["predict", "--top-k", top_k, "none.png"])
    assert f"argument --top-k: got '{top_k}', want a whole number from 1 up" in capsys.readouterr().err


def test_predict_without_a_server_says_where_it_looked(tmp_path, sample):
    Image.fromarray(sample[1].images[0, 0].numpy()).save(tmp_path / "boot.png")
    done = command("serving", "predict", "--server", "127.0.0.1:1", tmp_path / "boot.png")
    assert done.returncode == 1
    assert "error: 127.0.0.1:1: no server answers there; start one with python -m serving serve (" in done.stderr


def test_models(served):
    done = command("serving", "models", "--server", served)
    assert done.returncode == 0
    assert re.search(rf"{MODEL}.*1.*READY.*CPU on cpu", done.stdout)


def test_models_at_80_columns_has_whole_words_and_the_reasons_below(tampered, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    name = "model.onnx_of-somebody-else"
    shutil.copytree(tampered / MODEL, tampered / name)  # whose manifest describes another model
    with running(tampered) as server:
        assert serving_here(["models", "--server", server.address]) == 0
    told = capsys.readouterr().out.splitlines()
    assert re.match(rf"│ {MODEL} +│ 1 +│ READY +│ model\.onnx, +│ onnx, ", next(line for line in told if MODEL in line))
    assert any(re.match(rf"│ {re.escape(name)} │ 1 +│ UNAVAILABLE │", line) for line in told)
    assert told[-1].startswith(f"{name} version 1: ")
    assert told[-1].endswith(f"describes {MODEL} version 1, but lies in {name}/1")
    assert sum("│" in line for line in told) == 5  # of which the first version has four


def test_models_shows_a_reason_with_its_square_brackets(monkeypatch, capsys):
    reason = "image: got shape [1,28,28], want [batch,1,28,28] :on: cpu"
    model = _models(pb.ListModelsResponse(models=[pb.Model(name="m" * 100, state="STATE_UNAVAILABLE", reason=reason)]))
    monkeypatch.setattr(Client, "list_models", lambda _: model)
    monkeypatch.setenv("COLUMNS", "80")
    assert serving_here(["models"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"│ {'m' * 100} │         │ UNAVAILABLE │ ") for line in told)
    assert told[-1] == f"{'m' * 100}: {reason}"


def test_doctor_says_what_runs_and_why_not():
    done = command("serving", "doctor")
    assert done.returncode == 0
    assert "onnx, CPUExecutionProvider: runs" in done.stdout
    assert re.search(r"onnx, CUDAExecutionProvider: (runs|no: \S.+)", done.stdout)
    assert re.search(r"grpcio\s*│\s*\d", done.stdout)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--port", "70000"], "--port: Input should be less than or equal to 65535, got '70000'"),
        (["--device", "gpu"], "--device: Input should be auto, cpu, cuda or cuda:0, got 'gpu'"),
        (["--workers", "all"], "--workers: Input should be 'auto' or Input should be a valid integer"),
        (["--drain-s", "inf"], "--drain-s: Input should be a finite number, got 'inf'"),
        (["--backend", "tensorflow"], "invalid choice: 'tensorflow'"),
        (["--max-batch-size", "many"], "--max-batch-size: Input should be a valid integer"),
        (["--metrics-port", "-1"], "--metrics-port: Input should be greater than or equal to 0, got '-1'"),
        (["--metrics-host", "::"], "--metrics-host: needs --metrics-port too, got '::'"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_serve_refuses_a_wrong_option(words, problem):
    done = command("serving", "serve", *words)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_refuses_a_wrong_variable(repository):
    variables = {**environment(), "PARITYSERVE_THREADS": "none"}
    done = command("serving", "serve", "--repository", repository, env=variables)
    assert done.returncode == 2
    assert "PARITYSERVE_THREADS: Input should be a valid integer" in done.stderr


def test_serve_without_a_repository_says_how_to_make_one(tmp_path):
    done = command("serving", "serve", "--repository", tmp_path / "none")
    assert done.returncode == 1
    assert "No such file or directory; make train fills exported/" in done.stderr
    done = command("serving", "serve", "--repository", tmp_path)
    assert done.returncode == 1
    assert "no model; make train puts one into exported/" in done.stderr


def test_serve_of_a_models_folder_names_the_repository(tampered):
    (tampered / MODEL / "plots" / "1").mkdir(parents=True)  # as an export leaves it
    done = command("serving", "serve", "--repository", tampered / MODEL, "--port", "0")
    assert done.returncode == 1
    problem = f"error: {tampered / MODEL} is a model, not a repository: give --repository {tampered}"
    assert done.stderr.splitlines()[-1] == problem
    done = command(
        "serving",
        "serve",
        "--port",
        "0",
        "--repository",
        ".",
        cwd=tampered / MODEL,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )
    assert done.stderr.splitlines()[-1] == f"error: . is a model, not a repository: give --repository {tampered}"


def test_serve_refuses_a_model_whose_answers_changed(tampered):
    change_weight(tampered / MODEL / "1", 1.01)
    done = command("serving", "serve", "--repository", tampered, "--port", "0")
    assert done.returncode == 1
    assert "no model may be served" in done.stderr
    assert "the answers on cpu (CPUExecutionProvider) are not the trained model's" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_serves_not_all_it_should_says_so_and_serves_the_rest(tampered):
    shutil.copytree(tampered / MODEL / "1", tampered / MODEL / "2")  # which says that it is version 1
    with serving("--repository", tampered, "--version-policy", "all", line="NOT READY on") as (_, address):
        done = command("serving", "models", "--server", address.rstrip(","))
    assert re.search(rf"{MODEL} +│ 1 +│ READY", done.stdout)
    assert "UNAVAILABLE" in done.stdout


def test_serve_refuses_a_port_in_use(repository):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = command("serving", "serve", "--repository", repository, "--port", other.getsockname()[1])
    assert done.returncode == 1
    assert "choose another with --port" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_the_server_cleanly(repository, sample, number):
    with serving("--repository", repository, "--device", "cpu") as (process, address):
        with Client(address) as client:
            assert len(client.predict(sample[1].images[:2].numpy()).predictions) == 2
        process.send_signal(number)
        log = process.stderr.read()
        assert process.wait(10) == 0
    assert "stopped" in log
    assert "Traceback" not in log


def test_the_readmes_commands_for_tritons_client_run(repository):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Use it with Triton's client")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    serve, check = (shlex.split(line, comments=True) for line in block.splitlines())
    assert serve[:4] == ["python", "-m", "serving", "serve"]
    words = [str(repository) if word == "exported" else word for word in serve[4:]]
    with serving(*words, "--model", MODEL) as (_, address):
        assert check[:4] == ["python", "-m", "serving", "conformance"]
        done = command("serving", "conformance", *(address if word == "127.0.0.1:8001" else word for word in check[4:]))
    assert done.returncode == 0, done.stdout
    assert " 0 violations" in done.stdout


NO_TORCH = """
import sys
sys.modules["torch"] = None  # importing it is an error from here on
from serving.__main__ import main
sys.exit(main())
"""


def test_the_onnx_server_needs_no_torch(repository, sample, reference, tmp_path):
    script = tmp_path / "no_torch.py"
    script.write_text(NO_TORCH)
    with serving("--repository", repository, start=(str(script),)) as (_, address), Client(address) as client:
        result = client.predict(sample[1].images[:20].numpy())
    assert [p.class_id for p in result.predictions] == reference[:20].argmax(1).tolist()
    done = subprocess.run(
        [sys.executable, script, "serve", "--repository", repository, "--backend", "torchscript", "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "backend torchscript needs torch, which is not installed: pip install 'parityserve[train]'" in done.stderr


# --- the trainer


def test_the_trainers_doctor_says_what_runs_and_what_auto_takes(tmp_path):
    done = command("trainer", "doctor", "--data-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^CPU: .+ cores", done.stdout, re.MULTILINE)
    assert re.search(r"^memory: [\d.]+ GiB", done.stdout, re.MULTILINE)
    assert re.search(r"^torch: \d.* built .*CUDA.* threads$", done.stdout, re.MULTILINE)
    assert re.search(r"^--device auto takes (cpu|mps|cuda:0): \S", done.stdout, re.MULTILINE)
    assert "  cpu, float32: runs\n" in done.stdout
    missing = f"fashion-mnist: no: {tmp_path}/fashion-mnist/train-images-idx3-ubyte is missing: python -m trainer data"
    assert missing in done.stdout


@pytest.mark.parametrize("words", [["data"], ["train"], ["summary"], ["export", "--checkpoint", "none.pt"]])
def test_a_command_without_torch_says_how_to_get_it(tmp_path, words):
    script = tmp_path / "no_torch.py"
    script.write_text(NO_TORCH.replace("serving.__main__", "trainer.__main__"))
    environ = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environ, check=False)
    assert (done.returncode, done.stderr) == (1, "error: torch is not installed: pip install 'parityserve[train]'\n")


def test_the_doctor_without_torch_says_how_to_get_it(tmp_path):
    script = tmp_path / "no_torch.py"
    script.write_text(NO_TORCH.replace("serving.__main__", "trainer.__main__"))
    done = subprocess.run(
        [sys.executable, script, "doctor"],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert "torch is not installed: pip install 'parityserve[train]'" in done.stdout
    assert "CPU: " in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["train", "--epochs", "0"], 2, "--epochs: Input should be greater than or equal to 1, got '0'"),
        (["train", "--dataset", "cifar"], 2, "invalid choice: 'cifar'"),
        (["train", "--recipe", "slow"], 2, "invalid choice: 'slow'"),
        (["train", "--checkpoint", "docs"], 2, "--checkpoint: docs is a folder, want the file to write"),
        (["train", "--config", "none.toml"], 2, "error: none.toml: No such file or directory"),
        (["train", "--recipe", "fast", "--flip"], 2, "--flip is for --dataset fashion-mnist, which is mnist here"),
        (["train", "--learning-rate", "fast"], 2, "--learning-rate: Input should be a valid number"),
        (["export", "--checkpoint", "none.pt"], 1, "none.pt is missing: python -m trainer train --checkpoint none.pt"),
        (["parity", "--bundle", "nowhere"], 1, "nowhere: neither a version nor a model with versions"),
        (
            ["parity", "--bundle", "nowhere", "--device", "mps"],
            2,
            "--device: Input should be auto, cpu, cuda or cuda:0, got 'mps'",
        ),
    ],
)
def test_a_wrong_command_says_what_is_wrong(words, code, problem, capsys):
    found, errors = trainer_here(words, capsys)
    assert found == code
    assert problem in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["parity", "--bundle", "nowhere"], 1, "error: nowhere: neither a version nor a model with versions"),
        (["train", "--epochs", "0"], 2, "error: --epochs: Input should be greater than or equal to 1, got '0'"),
    ],
)
def test_a_wrong_command_ends_its_process_with_the_code_and_without_a_traceback(words, code, problem):
    done = command("trainer", *words)
    assert done.returncode == code
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.data
def test_export_and_parity(data_dir, checkpoint, tmp_path):
    saved = tmp_path / "net.pt"
    checkpoints.save(checkpoint, saved)
    done = command("trainer", "export", "--checkpoint", saved, "--repository", tmp_path / "exported", "--model", "m")
    assert done.returncode == 0, done.stderr
    assert "exported: " in done.stdout
    drawn = {path.name for path in (tmp_path / "exported" / "m" / "plots" / "1").iterdir()}
    assert {"curves.png", "confusion-matrix.png", "feature-maps-2.png"} <= drawn
    report = tmp_path / "report.json"
    words = ["trainer", "parity", "--bundle", tmp_path / "exported" / "m", "--device", "cpu", "--json", report]
    change_weight(tmp_path / "exported" / "m" / "1", 1.05)
    done = command(*words)
    assert done.returncode == 1
    assert done.stdout.count("pass") == 6  # the other file's rows, and two for golden answers and manifest
    assert json.loads(report.read_text())["images"] == 10_018
    assert "FAILED model.onnx, CPU on cpu, batch 1: logits: " in done.stdout
    assert json.loads(report.read_text())["passed"] is False


@pytest.mark.data
def test_ctrl_c_stops_training_cleanly(data_dir, tmp_path):
    path = tmp_path / "net.pt"
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", "--checkpoint", str(path), "--device", "cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("network:"):  # from here on it trains
            break
    time.sleep(2)  # into the first epoch, which takes longer than that
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "stopped; nothing was written\n"
    assert not path.exists()


@pytest.mark.data
def test_a_killed_training_is_resumed_by_the_same_command(data_dir, tmp_path, capsys):
    """Other options than the checkpoint's are refused by name; without any, the checkpoint's are taken."""
    small = [
        "--network",
        "mlp",
        "--train-images",
        "2000",
        "--validation-images",
        "200",
        "--epochs",
        "40",
        "--ema",
        "0.9",
    ]
    train = ["trainer", "train", *small, "--device", "cpu"]
    assert command(*train, "--checkpoint", tmp_path / "whole.pt").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", *train, "--checkpoint", str(tmp_path / "net.pt")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    for line in process.stdout:
        if line.startswith("epoch 3/40"):
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "net.pt").exists()
    again = ["train", "--resume", "--checkpoint"]
    code, errors = trainer_here([*again, tmp_path / "net.pt", "--learning-rate", "0.5"], capsys)
    assert code == 1
    assert "error: the checkpoint is of another training: --learning-rate is 0.5 here and 0.004 there" in errors
    done = command("trainer", *again, tmp_path / "net.pt")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^resumed after epoch \d+$", done.stdout, re.MULTILINE)
    resumed, whole = checkpoints.load(tmp_path / "net.pt"), checkpoints.load(tmp_path / "whole.pt")
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())
    code, errors = trainer_here([*again, tmp_path / "none.pt"], capsys)
    assert code == 1
    assert re.search(r"error: nothing to resume: .*none\.last\.pt is missing; train without --resume", errors)


@pytest.mark.data
def test_torchrun_trains_in_two_processes(data_dir, tmp_path):
    small = ["--train-images", "2000", "--validation-images", "200", "--epochs", "2", "--device", "cpu"]
    train = ["trainer", "train", "--network", "mlp", *small, "--checkpoint", tmp_path / "net.pt"]
    done = command("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *train)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("network: mlp, 59,850 parameters, on cpu (asked for), in 2 processes") == 1
    assert [line.partition(":")[0] for line in done.stdout.splitlines() if line.startswith("epoch")] == [
        "epoch 1/2",
        "epoch 2/2",
    ]
    assert done.stdout.count("test accuracy: ") == 1
    assert checkpoints.load(tmp_path / "net.pt").test_accuracy > 0.7


@pytest.mark.data
def test_train_writes_a_checkpoint(data_dir, tmp_path):
    path = tmp_path / "net.pt"
    words = ["--epochs", "1", "--batch-size", "500", "--train-images", "10000", "--checkpoint", path]
    done = command("trainer", "train", *words, "--tensorboard", tmp_path / "events")
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 1/1: training loss \d.*images/s", done.stdout)
    saved = checkpoints.load(path)
    assert saved.training["batch_size"] == 500
    assert f"test accuracy: {saved.test_accuracy:.2%} of 10000 images" in done.stdout
    assert saved.test_accuracy > 0.8
    assert np.isfinite([row["train_loss"] for row in saved.history]).all()
    (run,) = (tmp_path / "events").iterdir()
    events = EventAccumulator(str(run)).Reload()
    assert events.Scalars("loss/train")[0].value == pytest.approx(saved.history[0]["train_loss"])
    assert {"confusion-matrix", "feature-maps-0"} <= set(events.Tags()["images"])
