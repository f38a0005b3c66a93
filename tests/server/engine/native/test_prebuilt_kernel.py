"""The kernels that an image has for classes of processors."""

import platform
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from crma.core.errors import ConfigError
from server.engine.native import cpu_class, kernel_build, prebuilt_kernel
from server.engine.native.cpu_class import GENERIC, CpuClass, default_classes, own_classes
from server.engine.native.kernel import Kernel
from server.engine.native.packed_weight import PackedWeight

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
        ("x86_64", f"{AVX512} avx512_vnni", "avx512vnni"),
        ("x86_64", f"{AVX512} avx512_vnni avx512_bf16", "avx512bf16"),
        ("x86_64", f"{AVX512} avx512_vnni avx512_bf16 amx_tile amx_bf16", "amx"),
        ("x86_64", AVX2.replace("fma", ""), "generic"),
        ("aarch64", "fp asimd aes", "generic"),
        ("arm64", "", "generic"),
    ],
)
def test_a_processor_belongs_to_the_classes_whose_instructions_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, listed: str, expected: str
) -> None:
    pretend(monkeypatch, tmp_path, machine, listed)
    names = [each.name for each in own_classes()]
    assert names[0] == expected
    assert names[-1] == "generic"


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (f"{AVX512} avx512_vnni avx512_bf16", "avx512bf16"),
        (f"{AVX512} avx512_vnni avx512_bf16 amx_tile amx_bf16", "avx512vnni"),
    ],
)
def test_a_class_that_was_never_measured_has_another_serve_in_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listed: str, expected: str
) -> None:
    pretend(monkeypatch, tmp_path, "x86_64", listed)
    names = [each.name for each in default_classes()]
    assert names[0] == expected
    assert names[-1] == "generic"


def test_the_image_has_a_library_for_every_class(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, tmp_path, "x86_64", AVX2)
    touch_all(monkeypatch, tmp_path)
    found = {prebuilt_kernel.find_prebuilt(each) for each in cpu_class.CPU_CLASSES}
    assert len(found) == len(cpu_class.CPU_CLASSES)
    assert None not in found


def test_a_library_of_another_source_is_not_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, tmp_path, "x86_64", AVX2)
    touch_all(monkeypatch, tmp_path)
    assert prebuilt_kernel.find_prebuilt(GENERIC)
    changed = tmp_path / "kernel.cpp"
    changed.write_text("// changed\n")
    monkeypatch.setattr(kernel_build, "SOURCE", changed)
    assert prebuilt_kernel.find_prebuilt(GENERIC) is None


@pytest.mark.e2e
def test_a_prebuilt_kernel_serves_where_there_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An image without a compiler ran without the kernel."""
    monkeypatch.setattr(prebuilt_kernel, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(prebuilt_kernel, "classes_of", lambda _: default_classes()[:1])
    assert len(prebuilt_kernel.build_all()) == 1
    monkeypatch.setenv("PATH", "")
    built_before = Kernel(torch.float32, tmp_path / "kernels")
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(40)
    expected = torch.nn.functional.rms_norm(x, (40,), ones, 1e-5)
    torch.testing.assert_close(built_before.norm(x, ones, 1e-5), expected)
    assert not (tmp_path / "kernels").exists()


@pytest.mark.e2e
def test_a_class_that_is_not_measured_is_chosen_only_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if tiny.library() is None:
        pytest.skip("no C++ compiler")
    new = CpuClass("new", None, (), frozenset(), stand_in="generic")
    classes = (new, CpuClass("older", None, (), frozenset()), GENERIC)
    monkeypatch.setattr(cpu_class, "CPU_CLASSES", classes)
    assert Kernel(torch.float32, tmp_path).cpu_class == GENERIC
    assert Kernel(torch.float32, tmp_path, "new").cpu_class == new


def test_a_class_that_this_processor_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of the class other") as caught:
        Kernel(torch.float32, tmp_path, "other")
    assert caught.value.field == "kernel"
    assert "generic" in str(caught.value.allowed)


@pytest.mark.e2e
def test_a_compiler_without_openmp_builds_a_kernel_of_one_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Apple's clang refuses -fopenmp."""
    if tiny.library() is None:
        pytest.skip("no C++ compiler")
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *"-fopenmp "*) exit 1;; esac\nexec {shutil.which("g++")} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent), prepend=":")
    alone = Kernel(torch.float32, tmp_path / "kernels")
    x, weight = torch.ones(3, 40), torch.ones(5, 40)
    assert torch.equal(alone.product(x, PackedWeight.of(weight)), torch.full((3, 5), 40.0))


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
