"""The settings of a training run: one TOML file, every key known, every value checked."""

import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from crma.core.errors import ConfigError
from crma.core.json_lines import checked
from crma.training.arms import ALL_GROUPS, ArmName, Group


class Settings(BaseModel):
    """A table of a TOML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraSettings(Settings):
    """The LoRA of every task. `target_modules`: "attention", "all-linear" or a comma-separated list of names."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    target_modules: str = "attention"
    lr: float = Field(5e-3, gt=0)


class CrmaSettings(Settings):
    """The backbone. `lr` moves R and W, `mixing_lr` moves S and gamma; after task 1 both are multiplied by
    `later_scale`, and only the groups in `later_moves` move at all. In task 1 it starts to move after a share
    `starts_at` of the steps: until then the LoRA learns alone. A share `drop` of all batches is trained without it."""

    num_streams: int = Field(4, ge=1)
    stream_rank: int = Field(4, ge=1)
    lr: float = Field(2e-3, gt=0)
    mixing_lr: float = Field(1e-2, gt=0)
    later_scale: float = Field(0.02, ge=0)
    later_moves: tuple[Group, ...] = ALL_GROUPS
    starts_at: float = Field(0.0, ge=0, lt=1)
    drop: float = Field(0.0, ge=0, lt=1)


class TrainConfig(Settings):
    """One run of the sequential protocol: an arm, a seed, an order of tasks.

    `tasks` are domain names of `crma data`, or folders with train, validation and holdout .jsonl of one's own.
    `train_items` takes the first so many training examples (0 = all). `dtype` is that of the frozen base and the
    activations ("auto": bfloat16 where the hardware has it); adapters always train in float32. `measure` is the split
    of the record: "validation" for every choice, "holdout" once it is made. `start` is a store: its serving backbone
    goes on learning, each task as a later one, and what is trained is a candidate for `crma promote`.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    arm: ArmName = "MODULAR"
    seed: int = 0
    model: str = "SmolLM2-135M-Instruct"
    epochs: int = Field(3, ge=1)
    batch_size: int = Field(16, ge=1)
    train_items: int = Field(0, ge=0)
    warmup: float = Field(0.06, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    start: str = ""
    measure: Literal["validation", "holdout"] = "holdout"
    dtype: str = Field("auto", pattern="^(auto|bfloat16|float32)$")
    lora: LoraSettings = LoraSettings()
    crma: CrmaSettings = CrmaSettings()

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len({Path(task).name for task in tasks}) != len(tasks):
            raise ValueError("a task is named twice; a folder is named by its last part")
        return tasks

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ConfigError that names the first wrong key."""
        return checked("", values, cls.model_validate, ConfigError)

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> Self:
        """From a TOML file; `overrides` that are not None replace top-level keys."""
        return cls.from_dict(
            read_toml(path) | {key: value for key, value in overrides.items() if value is not None}
        )


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file. Raises ConfigError if it is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        message = f"cannot read {path.name}: {error}"
        raise ConfigError(message, field="config", value=str(path), allowed="a TOML file") from None
