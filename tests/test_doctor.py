"""What the two doctors say of a machine, by files as Linux has them."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from serving import hardware
from serving.backends import cuda
from trainer import data, devices, doctor

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni
processor\t: 1
model name\t: another
"""
GRAVITON = """processor\t: 0
Features\t: fp asimd asimddp sve bf16
CPU part\t: 0xd40
"""
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n"


@pytest.fixture
def proc(tmp_path):
    (tmp_path / "cpuinfo").write_text(XEON)
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path


def test_an_x86_processor_and_what_it_lacks(proc):
    found = hardware.cpu(proc, proc)
    assert found.name == "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz"
    assert found.has == ("AVX2", "AVX-512", "int8 dot products (VNNI)")
    assert found.lacks == ("bf16", "AMX bf16", "AMX int8")
    assert "lacks bf16, AMX bf16, AMX int8" in found.text()


def test_an_arm_processor_is_not_asked_for_what_only_x86_has(proc):
    (proc / "cpuinfo").write_text(GRAVITON)
    found = hardware.cpu(proc, proc)
    assert found.has == ("SVE", "int8 dot products (VNNI)", "bf16")
    assert found.lacks == ()


def test_a_container_with_half_a_core(proc):
    (proc / "cpu.max").write_text("50000 100000\n")
    found = hardware.cpu(proc, proc)
    assert found.usable == 0.5
    assert "of which this process may use 0.5" in found.text()
    (proc / "cpu.max").write_text("max 100000\n")
    assert hardware.cpu(proc, proc).usable >= 1


def test_memory_of_a_machine_and_of_a_container(proc):
    assert hardware.memory(proc, proc) == hardware.Memory(2**34, 2**33)
    assert hardware.memory(proc, proc).text() == "16.0 GiB, 8.0 GiB free"
    (proc / "memory.max").write_text("max\n")
    assert hardware.memory(proc, proc).total == 2**34
    (proc / "memory.max").write_text(str(2**31))
    (proc / "memory.current").write_text(str(2**30))
    assert hardware.memory(proc, proc) == hardware.Memory(2**31, 2**30)


def test_a_system_that_tells_nothing(tmp_path):
    nowhere = tmp_path / "nothing"
    found = hardware.cpu(nowhere, nowhere)
    assert found.name
    assert found.text().endswith("; its extensions are not known on this system")
    memory = hardware.memory(nowhere, nowhere)
    assert memory is None or memory.text() == f"{memory.total / 2**30:.1f} GiB"


def test_a_step_that_cannot_run_says_why():
    assert doctor.step_problem(torch.device("cpu"), torch.float32) is None
    assert "meta" in doctor.step_problem(torch.device("meta"), torch.float32)


def test_the_verdict_is_of_the_device_that_auto_takes(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "select_device", lambda spec: (torch.device("meta"), "auto: a test"))
    output = io.StringIO()
    assert not doctor.doctor(Console(file=output, width=200), tmp_path)
    assert "--device auto takes meta: a test" in output.getvalue()
    assert "cpu, float32: runs" in output.getvalue()
    assert "meta, float32: no: " in output.getvalue()


@pytest.mark.data
def test_data_sets_that_are_there_are_counted(data_dir):
    output = io.StringIO()
    assert doctor.doctor(Console(file=output, width=200), data_dir)
    assert "  mnist: 60,000 training and 10,000 test images" in output.getvalue()


def test_a_damaged_data_set_is_named(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / data.TRAIN_IMAGES).write_bytes(b"not pixels")
    output = io.StringIO()
    doctor.doctor(Console(file=output, width=200), tmp_path)
    assert f"mnist: no: {data.TRAIN_IMAGES} from {folder} is not mnist's: its sha256 is" in output.getvalue()


@pytest.mark.parametrize(("number", "text"), [(92400, "9.24.0"), (91002, "9.10.2"), (8902, "8.9.2")])
def test_cudnns_version_as_it_is_written(number, text):
    assert doctor.cudnn_text(number) == text


def test_the_drivers_version_where_there_is_one():
    version = cuda.driver_version()
    assert (version is None) == (cuda.device_problem(0) is not None)
    assert version is None or float(version) >= 11


@pytest.mark.gpu
def test_a_gpu_is_described_and_trains():
    output = io.StringIO()
    assert doctor.doctor(Console(file=output, width=200), Path("nowhere"))
    assert f"cuda:0: {torch.cuda.get_device_name(0)}, " in output.getvalue()
    assert "cuda:0, float32: runs" in output.getvalue()
    assert "cuda:0, bfloat16: runs" in output.getvalue()
