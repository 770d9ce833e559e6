"""Do the installed torch, FBGEMM and TorchRec fit together? Found out without importing them."""

import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from joint import __version__
from joint.errors import UserError

PACKAGES = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec")
UNINSTALL = "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && "  # both fill one folder: a new one needs it empty
INSTALL_CPU = 'pip install "torch==2.13.0" "fbgemm-gpu-cpu==1.8.0" && pip install --no-deps "torchrec==1.8.0"'
INSTALL_GPU = 'pip install "torch==2.13.0" "fbgemm-gpu==1.8.0" "torchrec==1.8.0"'


def installed_versions() -> dict[str, str]:
    """The versions of those of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def versions_text() -> str:
    """What a report of a fault should begin with: the version of this trainer and of what it stands on."""
    found = installed_versions()
    named = [name for name in PACKAGES if name in found or "fbgemm" not in name]
    return ", ".join([f"joint {__version__}", *(f"{name} {found.get(name, 'not installed')}" for name in named)])


def check_versions(found: Mapping[str, str] | None = None) -> None:
    """Check the versions that are installed, or those given.

    FBGEMM is built against one torch minor: torch 2.m goes with FBGEMM and TorchRec 1.(m-5); 2.13 with 1.8 is
    tested. A fbgemm-gpu of version '+cpu' is a CPU build, or a shim that requires fbgemm-gpu-cpu.

    Raises:
        UserError: they do not fit; one line with what was found and the command that mends it.
    """
    found = installed_versions() if found is None else found
    gpu = "fbgemm-gpu" in found and "+cpu" not in found["fbgemm-gpu"]
    if trouble := _trouble(found, gpu):
        cpu = "fbgemm-gpu-cpu" in found or any("+cpu" in text for text in found.values())
        clean = UNINSTALL if any("fbgemm" in name for name in found) else ""
        commands = [f"for CPU: {clean}{INSTALL_CPU}"] if cpu or not gpu else []
        commands += [f"for GPU: {clean}{INSTALL_GPU}"] if gpu or not cpu else []
        versions = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name in found) or "none of them"
        raise UserError(f"{trouble} (found {versions}); mend it {'; '.join(commands)}")


def _trouble(found: Mapping[str, str], gpu: bool) -> str:
    """What does not fit, or ''; `gpu`: fbgemm-gpu is the CUDA build."""
    missing = [name for name in ("torch", "torchrec") if name not in found]
    if not {"fbgemm-gpu", "fbgemm-gpu-cpu"} & set(found):
        missing.append("fbgemm-gpu (or fbgemm-gpu-cpu)")
    if missing:
        return f"not installed: {', '.join(missing)}"
    if gpu and "fbgemm-gpu-cpu" in found:
        return "fbgemm-gpu and fbgemm-gpu-cpu share a folder and the last one installed overwrote the other"
    if gpu and "+cpu" in found["torch"]:
        return "fbgemm-gpu does not load with a CPU build of torch"
    numbers = [re.findall(r"\d+", found[name]) for name in PACKAGES if name in found]
    (major, minor), *others = [(int(number[0]), int(number[1])) for number in numbers]
    fit = major == 2 and set(others) == {(1, minor - 5)}
    return "" if fit else f"torch 2.{minor} goes with FBGEMM and TorchRec 1.{minor - 5}"
