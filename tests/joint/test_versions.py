"""The version check: what fits, what does not, and whether the message names the mending command."""

import pytest

from joint.errors import UserError
from joint.versions import INSTALL_CPU, INSTALL_GPU, UNINSTALL, check_versions, installed_versions


def found(torch: str = "2.13.0", cuda: str = "", cpu: str = "", torchrec: str = "1.8.0") -> dict[str, str]:
    versions = {"torch": torch, "fbgemm-gpu": cuda, "fbgemm-gpu-cpu": cpu, "torchrec": torchrec}
    return {name: text for name, text in versions.items() if text}


@pytest.mark.parametrize(
    "versions",
    [
        found("2.13.0+cpu", cpu="1.8.0"),
        found("2.13.1", cuda="1.8.0"),
        found("2.13.0+cu130", cpu="1.8.0"),  # works on CPU tensors
        found("2.12.0", cuda="1.7.0", torchrec="1.7.0"),
        found("2.14.0.dev20260801", cuda="1.9.0rc1", torchrec="1.9.0"),
        found("2.13.0+cpu", cuda="1.8.0+cpu", cpu="1.8.0"),  # the shim
        found("2.13.0+cpu", cuda="1.8.0+cpu"),  # a CPU build under the other name
    ],
)
def test_fitting_versions_pass(versions: dict[str, str]) -> None:
    check_versions(versions)


@pytest.mark.parametrize(
    ("versions", "trouble"),
    [
        (found("2.13.0+cpu", cpu="1.9.0"), "torch 2.13 goes with FBGEMM and TorchRec 1.8 "),
        (
            found("2.12.0+cpu", cpu="1.7.0", torchrec="1.8.0"),
            "torch 2.12 goes with FBGEMM and TorchRec 1.7 ",
        ),
        (found("2.14.0", cuda="1.8.0"), "torch 2.14 goes with FBGEMM and TorchRec 1.9 "),
        (found("2.13.0", cuda="1.8.0", torchrec="2.8.0"), "torch 2.13 goes with FBGEMM and TorchRec 1.8 "),
        (found("1.13.0", cuda="1.8.0"), "torch 2.13 goes with FBGEMM and TorchRec 1.8 "),
        (found("2.13.0", cuda="1.8.0", cpu="1.8.0"), "fbgemm-gpu and fbgemm-gpu-cpu share a folder"),
        (found("2.13.0+cpu", cuda="1.8.0"), "fbgemm-gpu does not load with a CPU build of torch"),
        (found(cpu="1.8.0", torchrec=""), "not installed: torchrec "),
        (found(), "not installed: fbgemm-gpu (or fbgemm-gpu-cpu) "),
        ({}, "not installed: torch, torchrec, fbgemm-gpu (or fbgemm-gpu-cpu) (found none of them)"),
    ],
)
def test_versions_that_do_not_fit_are_named_in_one_line(versions: dict[str, str], trouble: str) -> None:
    with pytest.raises(UserError) as caught:
        check_versions(versions)
    message = str(caught.value)
    assert message.startswith(trouble)
    assert "\n" not in message
    assert all(f"{name} {text}" in message for name, text in versions.items())


@pytest.mark.parametrize(
    ("versions", "commands"),
    [
        (found("2.13.0+cpu", cpu="1.9.0"), f"mend it for CPU: {UNINSTALL}{INSTALL_CPU}"),
        (found("2.14.0", cuda="1.8.0"), f"mend it for GPU: {UNINSTALL}{INSTALL_GPU}"),
        (found("2.13.0+cpu"), f"mend it for CPU: {INSTALL_CPU}"),
        ({}, f"mend it for CPU: {INSTALL_CPU}; for GPU: {INSTALL_GPU}"),
        (
            found(cuda="1.8.0", cpu="1.8.0"),
            f"mend it for CPU: {UNINSTALL}{INSTALL_CPU}; for GPU: {UNINSTALL}{INSTALL_GPU}",
        ),
    ],
)
def test_the_command_is_for_the_device_at_hand(versions: dict[str, str], commands: str) -> None:
    with pytest.raises(UserError) as caught:
        check_versions(versions)
    assert str(caught.value).endswith(commands)


def test_the_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch" in installed_versions()
    monkeypatch.setattr("joint.versions.installed_versions", lambda: {})
    with pytest.raises(UserError, match="not installed: torch"):
        check_versions()
