"""The kernels that an image has for classes of processors."""

import platform
from pathlib import Path

import pytest
import torch

from server.engine.native import cpu_class, kernel_build, prebuilt_kernel
from server.engine.native.cpu_class import own_classes
from server.engine.native.kernel import Kernel

AVX2 = "abm avx avx2 bmi1 bmi2 f16c fma movbe sse4_2"
AVX512 = f"{AVX2} avx512bw avx512cd avx512dq avx512f avx512vl"


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, machine: str, listed: str) -> None:
    """Let this machine's processor be another one, as Linux describes it."""
    cpuinfo = folder / "cpuinfo"
    name = "Features" if machine == "aarch64" else "flags"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: some CPU\n{name}\t\t: {listed}\n")
    monkeypatch.setattr(cpu_class, "CPUINFO", cpuinfo)
    monkeypatch.setattr(platform, "machine", lambda: machine)


def touch_all(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """An empty file for every library of the pretended machine."""
    monkeypatch.setattr(prebuilt_kernel, "PREBUILT", folder / "prebuilt")
    monkeypatch.setattr(kernel_build, "compile_kernel", lambda _, path: path.touch())
    prebuilt_kernel.build_all()


@pytest.mark.parametrize(
    ("machine", "listed", "expected"),
    [
        ("x86_64", AVX2, "avx2"),
        ("x86_64", AVX512, "avx512"),
        ("x86_64", f"{AVX512} avx512_vnni amx_int8", "avx512-vnni"),
        ("x86_64", AVX2.replace("fma", ""), None),
        ("aarch64", "fp asimd aes", "armv8"),
        ("riscv64", "", None),
    ],
)
def test_a_processor_gets_the_best_library_that_it_can_run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    machine: str,
    listed: str,
    expected: str | None,
) -> None:
    pretend(monkeypatch, tmp_path, machine, listed)
    touch_all(monkeypatch, tmp_path)
    found = prebuilt_kernel.find_prebuilt()
    name = None if found is None else found.name.removeprefix("kernel-").rpartition("-")[0]
    assert name == expected


def test_a_library_of_another_source_is_not_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, tmp_path, "x86_64", AVX2)
    touch_all(monkeypatch, tmp_path)
    assert prebuilt_kernel.find_prebuilt()
    changed = tmp_path / "kernel.cpp"
    changed.write_text("// changed\n")
    monkeypatch.setattr(kernel_build, "SOURCE", changed)
    assert prebuilt_kernel.find_prebuilt() is None


def test_a_prebuilt_kernel_serves_where_there_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An image without a compiler ran without the kernel."""
    if not own_classes():
        pytest.skip("this processor belongs to no class")
    monkeypatch.setattr(prebuilt_kernel, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(prebuilt_kernel, "classes_of", lambda _: own_classes()[:1])
    assert len(prebuilt_kernel.build_all()) == 1
    monkeypatch.setenv("PATH", "")
    kernel = Kernel(torch.float32, tmp_path / "kernels")
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(40)
    expected = torch.nn.functional.rms_norm(x, (40,), ones, 1e-5)
    torch.testing.assert_close(kernel.norm(x, ones, 1e-5), expected)
    assert not (tmp_path / "kernels").exists()


def test_all_are_built_or_none_is_left_half_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text("no C++")
    monkeypatch.setattr(kernel_build, "SOURCE", source)
    monkeypatch.setattr(prebuilt_kernel, "PREBUILT", tmp_path / "prebuilt")
    with pytest.raises(Exception, match=r"does not build the kernel|no C\+\+ compiler"):
        prebuilt_kernel.build_all()
    assert not list((tmp_path / "prebuilt").iterdir())
