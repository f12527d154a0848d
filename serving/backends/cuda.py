"""Why CUDA cannot be used, asked of the driver and of the libraries themselves, before a framework hides the cause."""

from __future__ import annotations

import ctypes
import sys

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def device_problem(index: int) -> str | None:
    """Why CUDA device `index` cannot be used, with the remedy; None when the driver offers it."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        return f"there is no NVIDIA driver ({error}); install one (R580 or newer for CUDA 13) or use --device cpu"
    status = driver.cuInit(0)
    if status != 0:
        return f"the NVIDIA driver does not start (cuInit answered {status}); see nvidia-smi, or use --device cpu"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if index >= count.value:
        return f"device cuda:{index} does not exist, the driver offers {count.value}; see nvidia-smi -L"
    return None


def device_names() -> list[str]:
    """The names of the CUDA devices that the driver offers; empty without a driver."""
    if device_problem(0):
        return []
    driver = ctypes.CDLL(DRIVER)
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGetName(name, len(name), index)
        names.append(name.value.decode(errors="replace"))
    return names


def driver_version() -> str | None:
    """The newest CUDA version that the driver serves, such as `13.0`; None when it cannot be used."""
    if device_problem(0):
        return None
    version = ctypes.c_int()
    ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def library_problem(path: str) -> str | None:
    """Why a shared library does not load, in the dynamic linker's words; None when it does."""
    try:
        ctypes.CDLL(path)
    except OSError as error:
        return str(error)
    return None
