"""What a cluster runs: the file of `python -m server.ray`, or the arguments of a RayService."""

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crma.core.errors import ConfigError
from server.settings import Settings


class Autoscaling(BaseModel):
    """How many replicas there are, by the requests that each has.

    Attributes:
        min_replicas: the fewest.
        max_replicas: the most.
        target_requests: open requests of a replica, running and waiting, that another replica
            is added to get back to.
        upscale_delay_s: how long there have to be more before that.
        downscale_delay_s: how long there have to be fewer before a replica goes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(ge=1)
    target_requests: float = Field(16.0, gt=0)
    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is less than min_replicas")
        return self


class ReplicasConfig(BaseModel):
    """The replicas of a server, and where they run.

    Attributes:
        replicas: how many; or autoscaling.
        autoscaling: how many there are when.
        num_cpus: CPUs of a replica; its engine has as many threads, unless `num_threads` says.
        num_gpus: GPUs of a replica.
        ingress_cpus: CPUs that are kept for the ingress.
        ingress_resources: resources of Ray that only its machine has, such as {"ingress": 1}.
        affinity: requests go where their adapters are in memory; false: to the least loaded.
        max_lead: how many more open requests than the least loaded a replica may have and still
            be preferred for its adapters.
        settings: of the server, by name, as in `docs/settings.md` but without CRMA_ and in small
            letters. Secrets belong into the environment.
        address: of the cluster; unset: one of this machine's own, which ends with the server.
        cluster_cpus: CPUs of that own cluster; unset: those of the machine.
        object_store_mib: memory that it shares between processes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(2, ge=1)
    autoscaling: Autoscaling | None = None
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    ingress_cpus: float = Field(0.0, ge=0)
    ingress_resources: dict[str, float] = Field(default_factory=dict)
    affinity: bool = True
    max_lead: int = Field(8, ge=0)
    settings: dict[str, Any] = Field(default_factory=dict)
    address: str | None = None
    cluster_cpus: int | None = Field(None, ge=1)
    object_store_mib: int = Field(256, ge=80)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML file. Raises ConfigError that names the first invalid key."""
        try:
            values = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, yaml.YAMLError) as error:
            message = f"{path} cannot be read: {error}"
            raise ConfigError(message, field="config", value=str(path)) from error
        return cls.of({} if values is None else values)

    @classmethod
    def of(cls, values: object) -> Self:
        """The configuration that a mapping has. Raises ConfigError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            message = f"{field}: {first['msg']}"
            allowed = sorted(cls.model_fields)
            raise ConfigError(
                message, field=field, value=first.get("input"), allowed=allowed
            ) from None

    def server_settings(self) -> Settings:
        """The settings of each process: its environment, and before that `settings`.

        Raises:
            ConfigError: as `Settings.load`; one that does not exist, or that Ray Serve does not
                honour.
        """
        known = Settings.model_fields
        for name, value in self.settings.items():
            if name not in known:
                message = f"settings.{name} is not a setting"
                raise ConfigError(message, field=name, value=value, allowed=sorted(known))
        settings = Settings.load(**self.settings)
        for name in UNSUPPORTED:
            value, default = getattr(settings, name), known[name].default
            if value != default:
                message = f"{name}: connections are Ray Serve's, which does not know this setting"
                raise ConfigError(message, field=name, value=value, allowed=default)
        return settings

    def for_processes(self) -> Self:
        """The configuration for the processes of a server that was found to be allowed to start.

        The ingress cannot know where Serve listens, and refuses to be open. On a cluster of its
        own it has this process's keys, if there are any, and is told that it may. On another it
        must have some, or be told by who wrote the configuration.
        """
        if self.address is not None:
            return self
        return self.model_copy(update={"settings": {**self.settings, "allow_open": True}})

    def environment(self, settings: Settings) -> dict[str, str]:
        """Variables of a replica's process, and of those that it starts.

        Ray gives every process of a replica as many threads as the replica has CPUs; those of
        vLLM share them.
        """
        if settings.engine != "vllm":
            return {}
        num_processes = settings.tensor_parallel_size * settings.pipeline_parallel_size
        num_threads = settings.num_threads or int(self.num_cpus)
        return {"OMP_NUM_THREADS": str(max(1, num_threads // num_processes))}


UNSUPPORTED = ("health_port", "keep_alive_s", "max_head_bytes", "head_timeout_s", "drain_grace_s")
"""Settings of the connections of `python -m server`."""
