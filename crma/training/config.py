"""The configuration of a training run: a TOML file whose every key and value is checked."""

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
    """The LoRA of every task.

    Attributes:
        rank, alpha: as in Hu et al. 2021; the update is scaled by alpha / rank.
        target_modules: "attention", "all-linear" or a comma-separated list of module names.
        lr: peak learning rate.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    target_modules: str = "attention"
    lr: float = Field(5e-3, gt=0)


class CrmaSettings(Settings):
    """The shared backbone.

    Attributes:
        num_streams, stream_rank: n and k of docs/method.md, section 2.
        lr: peak learning rate of R and W.
        mixing_lr: peak learning rate of S and gamma.
        later_scale: factor on both learning rates after task 1.
        later_moves: the parameter groups that train after task 1.
        starts_at: share of task 1's steps in which the LoRA trains alone, before the backbone.
        drop: share of all batches that are trained without the backbone.
    """

    num_streams: int = Field(4, ge=1)
    stream_rank: int = Field(4, ge=1)
    lr: float = Field(2e-3, gt=0)
    mixing_lr: float = Field(1e-2, gt=0)
    later_scale: float = Field(0.02, ge=0)
    later_moves: tuple[Group, ...] = ALL_GROUPS
    starts_at: float = Field(0.0, ge=0, lt=1)
    drop: float = Field(0.0, ge=0, lt=1)


class TrainConfig(Settings):
    """One run of the sequential protocol: an arm, a seed and an order of tasks.

    Attributes:
        tasks: domain names of `crma data`, or folders that hold train.jsonl, validation.jsonl and
            holdout.jsonl.
        arm: a name from `crma.training.arms`.
        seed: seeds every random draw of the run.
        model: name or folder of a pulled base model.
        epochs, batch_size: of every task.
        train_items: use only the first so many training examples of a task; 0 means all.
        warmup: share of the steps in which the learning rate rises.
        clip: largest gradient norm of a parameter group.
        weight_decay: AdamW's; never applied to S and gamma.
        prompt_format: how prompts are put to the model, recorded with every adapter: "chat" is one
            user turn in the base model's chat template, without a system turn; "raw" is the text
            alone; anything else is the file of a chat template, taken as "chat".
        start: an adapter store whose serving backbone goes on learning. Every task then trains as a
            later one, and the result is a candidate for `crma promote`. Empty: a new backbone.
        measure: the split that the record reports: "validation" for every choice, "holdout" once
            the choice is made.
        dtype: of the frozen base model and the activations; "auto" is bfloat16 where the hardware
            has it. Adapters always train in float32.
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
    prompt_format: str = Field("chat", min_length=1)
    start: str = ""
    measure: Literal["validation", "holdout"] = "holdout"
    dtype: str = Field("auto", pattern="^(auto|bfloat16|float32)$")
    lora: LoraSettings = LoraSettings()
    crma: CrmaSettings = CrmaSettings()

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        names = {task_name(task) for task in tasks}
        if len(names) != len(tasks):
            raise ValueError("two tasks have the same name; a folder is named by its last part")
        return tasks

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Check parsed values. Raises ConfigError that names the first invalid key."""
        return checked("", values, cls.model_validate, ConfigError)

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> Self:
        """Read a TOML file.

        Args:
            path: the file.
            overrides: top-level keys that replace those of the file; None keeps the file's value.

        Raises:
            ConfigError: the file cannot be read, or names the first invalid key.
        """
        given = {key: value for key, value in overrides.items() if value is not None}
        return cls.from_dict(read_toml(path) | given)


def task_name(task: str) -> str:
    """The name of a configured task in the store: the domain, or the last part of its folder."""
    return Path(task).name


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file. Raises ConfigError if it cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        message = f"cannot read {path.name}: {error}"
        raise ConfigError(message, field="config", value=str(path), allowed="a TOML file") from None
