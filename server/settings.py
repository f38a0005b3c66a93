"""Every setting of the server, in one list. No other module reads settings.

A setting `x` comes from the environment variable `CRMA_X`. An unknown `CRMA_` variable is an error:
a mistyped limit must not be silently off. Only what Kubernetes sets for a Service whose name begins
with `crma` is left aside (`server/service_links.py`).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from crma.core.allowed import describe
from crma.core.errors import ConfigError
from crma.store.source import check_address, is_address
from server.service_links import service_links

PREFIX = "CRMA_"
MAX_KEPT_SECONDS = 3_153_600_000  # a hundred years, which dates can go back
MAX_SECONDS = 31_536_000  # a year; the longest that clocks can wait is a few hundred
ONLY_NATIVE = frozenset({"quantization", "kernel", "target_step_s", "step_timeout_s"})
ONLY_VLLM = frozenset(
    {
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "vllm_quantization",
        "memory_share",
        "max_loras",
        "max_lora_rank",
    }
)
_ADDRESS = r"https?://[^\s?#]+"
_ORIGIN = r"https?://[^\s/?#@*]+"  # as browsers send it: no path, not even a final slash


def _setting(default: Any, help: str, **limits: Any) -> Any:
    return Field(default=default, description=help, **limits)


def _seconds(default: float, help: str, **limits: Any) -> Any:
    return _setting(default, help, le=MAX_SECONDS, **limits)


def _expanded(value: Any) -> Any:
    return value.expanduser() if isinstance(value, Path) else value


class Settings(BaseSettings):
    """Frozen.

    A name that ends in `_s` is in seconds, in `_bytes` or `_mib` in those; others count.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(8000, "Port to listen on.", ge=1, le=65535)
    health_port: int | None = _setting(
        None, "Port for health and metrics alone, with connections of its own.", ge=1, le=65535
    )

    home: Path | None = _setting(None, "Folder of pulled models; unset: ~/.cache/crma.")
    model: str = _setting(
        "SmolLM2-135M-Instruct", "Base model: a pulled one's name, or its folder.", min_length=1
    )
    store: Path | str = _setting(
        Path("adapters_store"),
        "Folder of the adapter store, or its address elsewhere: `s3://…`, `gs://…`, `hf://…`.",
    )
    store_poll_s: float = _seconds(
        10.0, "How often a store on another machine is looked at for changes.", gt=0
    )
    require_signature: Path | None = _setting(
        None, "Public key, a PEM file: only versions that it signed serve; unset: all do."
    )
    load_backbone: bool = _setting(
        True, "Load the CRMA backbone; false: requests that need it get 409."
    )
    engine: Literal["native", "vllm"] = _setting(
        "native", "What computes: our own engine, or [vLLM](vllm.md)."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _setting(
        "auto", "Type of weights and KV cache; auto: by device."
    )
    quantization: Literal["none", "int8"] = _setting(
        "none", "Weights of the base; int8 needs the native kernel. Not with vLLM."
    )
    device: Literal["auto", "cpu", "cuda"] = _setting(
        "auto", "Where the model runs; auto: CUDA if there is one."
    )
    kernel: Literal[
        "auto", "on", "off", "amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "generic"
    ] = _setting(
        "auto", "Native CPU kernel; auto: where a compiler builds it; or the class of processors."
    )
    num_threads: int = _setting(
        0, "CPU threads of the model; 0: one per core, or per CPU of a container's quota.", ge=0
    )

    tensor_parallel_size: int = _setting(1, "vLLM: processes that share every layer.", ge=1)
    pipeline_parallel_size: int = _setting(
        1, "vLLM: groups of processes that have some of the layers each.", ge=1
    )
    vllm_quantization: str | None = _setting(
        None, "vLLM: its name of a quantization; unset: as the model's files are.", min_length=1
    )
    memory_share: float | None = _setting(
        None, "vLLM: share of a device's memory that it takes; unset: its own, on CUDA.", gt=0, le=1
    )
    max_loras: int = _setting(
        8, "vLLM: selections of adapters that a step can have, beside the base model.", ge=1
    )
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = _setting(
        32, "vLLM: largest rank of a task adapter or backbone; all take its memory."
    )

    max_num_seqs: int = _setting(16, "Sequences that run at once.", ge=1)
    max_num_batched_tokens: int = _setting(
        512, "Tokens a step over all sequences; at least max_num_seqs.", ge=1
    )
    max_model_len: int = _setting(
        2048, "Prompt + answer tokens of one sequence; at most the model's own.", ge=2
    )
    kv_cache_tokens: int | None = _setting(
        None,
        "Tokens that the KV cache holds, of all sequences; at least max_model_len. Unset: 8192; on "
        "CUDA more, where memory is free.",
        ge=32,
    )
    kv_cache_mib: int | None = _setting(
        None, "Size of the KV cache in MiB, in place of `kv_cache_tokens`.", ge=1
    )
    prefix_caching: bool = _setting(
        True, "Share the KV of prompts that begin alike, under the same adapters."
    )
    max_loaded_adapters: int = _setting(
        32, "Tasks and backbones in memory; the least recently used is evicted.", ge=2
    )
    max_adapter_mib: int | None = _setting(
        None, "Limit on the weights of resident adapters, in MiB; unset: no limit.", ge=1
    )
    target_step_s: float = _seconds(
        0.5,
        "How long prompts may make a step, and so the gaps of running streams; 0: no limit.",
        ge=0,
    )
    step_timeout_s: float = _seconds(
        300.0, "A step that takes longer ends the process, within a tenth more; 0: never.", ge=0
    )
    max_queue: int = _setting(
        256, "Sequences that may wait, and prompts to encode; one more gets 429.", ge=1
    )

    request_timeout_s: float = _seconds(
        120.0, "Deadline of a request, and the longest it may ask for; then 504.", gt=0
    )
    drain_timeout_s: float = _seconds(
        30.0, "How long running requests may go on after SIGTERM.", ge=0
    )
    drain_grace_s: float = _seconds(
        5.0, "How long the port stays open after SIGTERM at least, answering 503.", ge=0
    )
    max_connections: int | None = _setting(
        None, "Connections at once; unset: 4096, or what open files allow.", ge=1
    )
    keep_alive_s: int = _setting(5, "How long a connection may wait for its next request.", ge=1)
    max_head_bytes: int = _setting(65_536, "Largest request line and headers; then 431.", ge=1024)
    head_timeout_s: float = _seconds(10.0, "Time for a request's headers to come; then 408.", gt=0)
    body_timeout_s: float = _seconds(
        30.0, "Time for a body to come, and 1 s more for 4 KiB; then 408.", gt=0
    )
    max_body_bytes: int = _setting(1 << 20, "Largest request body; above it 413.", ge=1024)
    max_n: int = _setting(8, "Largest `n` of a request.", ge=1)
    max_stop: int = _setting(4, "Most `stop` strings of a request.", ge=1)
    max_ablation_direct: int = _setting(
        800, "Most item-variants of one /ablation that is not in the background.", ge=1
    )
    max_ablation_inflight: int = _setting(
        8, "Item-variants of all ablations in the engine at once.", ge=1
    )

    max_ablation_jobs: int = _setting(
        4, "Background ablations that run at once; others wait. 0: none are accepted.", ge=0
    )
    max_ablation_queue: int = _setting(
        32, "Background ablations of one key that may wait; one more gets 429.", ge=1
    )
    max_ablation_kept: int = _setting(
        100, "Background ablations of one key that are kept; the oldest is deleted.", ge=1
    )
    ablation_kept_s: float = _seconds(
        2_592_000.0, "How long an ended background ablation is kept, and how long one waits.", gt=0
    )
    max_question_set_mib: int = _setting(
        256, "Largest upload of a question set, in MiB; above it 413.", ge=1, le=8192
    )
    max_question_sets: int = _setting(
        100, "Uploaded question sets of one key, and shared ones; one more gets 409.", ge=1
    )
    evaluations: Path = _setting(
        Path("evaluations"),
        "Folder of background ablations, uploaded question sets, acts of administrators and usage.",
    )
    database_url: SecretStr | None = _setting(
        None, "PostgreSQL to keep them in, `postgresql://…`; unset: SQLite in `evaluations`."
    )
    audit_kept_s: float = _setting(
        31_536_000.0,
        "How long the acts of administrators are kept there.",
        gt=0,
        le=MAX_KEPT_SECONDS,
    )
    usage_kept_s: float = _setting(
        34_560_000.0, "How long the usage of a day is kept there.", gt=0, le=MAX_KEPT_SECONDS
    )
    usage_flush_s: float = _seconds(
        5.0, "How often usage is written there; a server that is killed loses so much.", gt=0
    )

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = _setting(
        (), "Comma-separated API keys; empty, and no keys_file: open to all."
    )
    admin_key: SecretStr | None = _setting(
        None, "Key of the admin routes, which opens all others too.", min_length=1
    )
    keys_file: Path | None = _setting(
        None, "File of keys that `crma keys` writes; read again when it changes."
    )
    allow_open: bool = _setting(
        False, "Serve without keys although `host` is not this machine's loopback."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = _setting(
        (), "Comma-separated names by which a server without keys may be called, beside its own."
    )
    audit_log: Path | None = _setting(
        None, "File with a line for each act of an administrator; unset: only the log has them."
    )

    runs: Path | None = _setting(
        None, "Folder of records of training runs, for `GET /runs`; unset: the release's."
    )
    page: bool = _setting(True, "Serve the page for people at `/`; off: leave it out.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = _setting(
        (), "Comma-separated origins whose web pages may call this server, or `*`; empty: none."
    )

    import_roots: Annotated[tuple[Path, ...], NoDecode] = _setting(
        (), "Comma-separated folders below which administrators may import; empty: none."
    )
    max_upload_mib: int = _setting(
        512, "Largest upload of an adapter, in MiB; above it 413.", ge=1, le=8192
    )

    log_format: Literal["text", "json"] = _setting("text", "Form of the log on standard error.")
    max_adapter_labels: int = _setting(
        64, "Adapters with a metrics label of their own; the rest share `_other`.", ge=0
    )
    metrics_compat: bool = _setting(
        False, "Also serve what vLLM's dashboards read, under vLLM's names."
    )
    otlp_endpoint: str | None = _setting(
        None, "OpenTelemetry collector (OTLP over HTTP) for traces and metrics; unset: none."
    )

    @field_validator("api_keys", "cors_origins", "import_roots", "allowed_hosts", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = (part.strip() for part in value.split(","))
        listed = tuple(part for part in parts if part)
        if value and not listed:  # a mistyped list of keys must not open the server to all
            raise ValueError("only commas and spaces")
        return listed

    @field_validator("kv_cache_mib")
    @classmethod
    def _check_one_size(cls, mib: int | None, info: ValidationInfo) -> int | None:
        if mib is not None and info.data.get("kv_cache_tokens") is not None:
            raise ValueError("CRMA_KV_CACHE_TOKENS is set too: only one of the two can be")
        return mib

    @field_validator("store", mode="before")
    @classmethod
    def _as_folder_or_address(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return check_address(value) if is_address(value) else Path(value)

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(_ORIGIN, origin):
                raise ValueError(
                    f"{origin!r} is no origin: write https://host or https://host:port"
                )
        return origins

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not re.fullmatch(_ADDRESS, endpoint):
            raise ValueError(f"{endpoint!r} is no address: write http://collector:4318")
        return endpoint

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(_expanded, value))
        return _expanded(value)

    def check_engine(self) -> None:
        """Raises ConfigError if a setting was made that the chosen engine does not have."""
        of_others = ONLY_NATIVE if self.engine == "vllm" else ONLY_VLLM
        for name in sorted(of_others & self.model_fields_set):
            message = f"CRMA_ENGINE={self.engine} does not have this setting"
            value = getattr(self, name)
            raise ConfigError(message, field=name, value=value, allowed="leave it out")

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""
        return not self.api_keys and self.keys_file is None

    @property
    def max_running_adapters(self) -> int:
        """Adapters that the requests of one step can have, for routers."""
        return self.max_loras if self.engine == "vllm" else self.max_loaded_adapters

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Settings from the environment, and before that those that are `given`.

        Raises:
            ConfigError: an unknown variable, or a value that its setting does not take.
        """
        known = {PREFIX + name.upper() for name in cls.model_fields}
        for name in os.environ:
            if name.upper().startswith(PREFIX) and name.upper() not in known:
                message = f"{name} is not a setting"
                raise ConfigError(message, field=name, value=None, allowed=sorted(known))
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = str(first["loc"][0])
            is_secret = field in ("api_keys", "admin_key", "database_url")
            name = PREFIX + field.upper()
            raise ConfigError(
                f"{name}: {first['msg']}",
                field=name,
                value=None if is_secret else first.get("input"),
                allowed=cls.allowed(field),
            ) from None

    @classmethod
    def allowed(cls, field: str) -> str:
        """The values that a setting takes, in words."""
        schema = cls.model_json_schema()["properties"][field]
        if schema.get("type") == "array":
            return "texts, separated by commas"
        return describe(schema)


def drop_service_links() -> list[str]:
    """Take out of the environment what Kubernetes put there for a Service. Returns the names.

    CRMA_PORT=tcp://10.0.0.1:8000 is no setting, but would be read as one.
    """
    links = service_links(os.environ, PREFIX)
    for name in links:
        del os.environ[name]
    return links


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set variables of the environment that the operator has not set, for other people's code."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
