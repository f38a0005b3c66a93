"""The configuration of a training run: a TOML file whose every key and value is checked."""

import reprlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from crma.core.errors import ConfigError
from crma.core.json_lines import checked
from crma.training.arms import ALL_GROUPS, ArmName, Group

Measured = Literal["validation", "holdout", "reserve", "holdout+reserve"]


class Settings(BaseModel):
    """A table of a TOML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _key(default: Any, meaning: str, **limits: Any) -> Any:
    """A key with its default, its meaning, and the limits of its value."""
    return Field(default=default, description=meaning, **limits)


class LoraSettings(Settings):
    """The LoRA of every task, as in Hu et al. 2021."""

    rank: int = _key(8, "Rank.", ge=1)
    alpha: float = _key(16.0, "The update is scaled by alpha / rank.", gt=0)
    drawn_rank: int = _key(
        0,
        "A of a new LoRA is drawn at this rank and its first rows are taken, so that arms of "
        "different ranks begin alike; 0: at its own rank.",
        ge=0,
    )
    orthogonality: float = _key(
        0.5,
        "In the arm O-LoRA, the weight of the sum of |A_i A_t| over earlier tasks i and the task t "
        "in the loss.",
        ge=0,
    )
    target_modules: str = _key(
        "attention", "`attention`, `all-linear` or a comma-separated list of module names."
    )
    lr: float = _key(5e-3, "Peak learning rate.", gt=0)


class CrmaSettings(Settings):
    """The shared backbone (docs/method.md, section 2)."""

    num_streams: int = _key(4, "Streams, n of the method.", ge=1)
    stream_rank: int = _key(4, "Rank of a stream, k of the method.", ge=1)
    lr: float = _key(2e-3, "Peak learning rate of R and W.", gt=0)
    mixing_lr: float = _key(1e-2, "Peak learning rate of S and gamma.", gt=0)
    later_scale: float = _key(0.02, "Factor on both learning rates after task 1.", ge=0)
    later_moves: tuple[Group, ...] = _key(
        ALL_GROUPS, "The parameter groups that train after task 1."
    )
    starts_at: float = _key(
        0.0, "Share of task 1's steps in which the LoRA trains alone.", ge=0, lt=1
    )
    drop: float = _key(
        0.0, "Share of all batches that are trained without the backbone.", ge=0, lt=1
    )


class TrainConfig(Settings):
    """One run of the sequential protocol: an arm, a seed and an order of tasks."""

    tasks: tuple[str, ...] = Field(
        min_length=1,
        description="Domains of `crma data`, or folders with `train.jsonl`, `validation.jsonl` "
        "and `holdout.jsonl`, in the order of training.",
    )
    arm: ArmName = _key("MODULAR", "What is trained: Method, section 3.")
    seed: int = _key(0, "Seeds every random draw of the run.")
    model: str = _key("SmolLM2-135M-Instruct", "Name or folder of a pulled base model.")
    epochs: int = _key(3, "Of every task.", ge=1)
    batch_size: int = _key(16, "Examples a step.", ge=1)
    train_items: int = _key(0, "Only the first so many training examples; 0: all.", ge=0)
    warmup: float = _key(0.06, "Share of the steps in which the learning rate rises.", ge=0, lt=1)
    ema: float = _key(
        0.0,
        "Decay of the moving average of the adapters' weights, which is what a task publishes; 0: "
        "the last weights.",
        ge=0,
        lt=1,
    )
    clip: float = _key(1.0, "Largest gradient norm of a parameter group.", gt=0)
    weight_decay: float = _key(0.0, "AdamW's; never applied to S and gamma.", ge=0)
    prompt_format: str = _key(
        "chat",
        "How prompts are put to the model, recorded with every adapter: `chat` is one user turn in "
        "the base model's chat template, without a system turn; `raw` is the text alone; anything "
        "else is the file of a chat template, taken as `chat`.",
        min_length=1,
    )
    start: str = _key(
        "",
        "An adapter store whose serving backbone goes on learning: every task then trains as a "
        "later one, and the result is a candidate for `crma store promote`. Empty: a new backbone.",
    )
    measure: Measured = _key(
        "holdout",
        "The split that the record reports: `validation` for every choice, `holdout` once the "
        "choice is made. `reserve`: further questions of the built-in domains, for experiments "
        "with an endpoint.",
    )
    matrix: bool = _key(
        True,
        "Measure every task after every stage; false, for screening: only when it was learned, and "
        "at the end.",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = _key(
        "auto",
        "Of the frozen base model and the activations; `auto`: bfloat16 where the hardware has it, "
        "otherwise float32. Adapters always train in float32.",
    )
    lora: LoraSettings = LoraSettings()
    crma: CrmaSettings = CrmaSettings()

    @model_validator(mode="after")
    def _keeps_earlier_rows(self) -> Self:
        if self.arm == "O-LoRA" and self.weight_decay:
            raise ValueError("O-LoRA needs weight_decay = 0: it would shrink earlier tasks' rows")
        return self

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
        _check_keys(cls, values)
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


def _check_keys(table: type[Settings], values: Mapping[str, Any], place: str = "") -> None:
    """Raises ConfigError for a key that a table, or a table in it, does not have.

    pydantic would refuse it too, but not list the keys that there are.
    """
    for key, value in values.items():
        known = table.model_fields
        if key not in known:
            field, allowed = f"{place}{key}", ", ".join(known)
            message = "there is no such key."
            raise ConfigError(message, field=field, value=reprlib.repr(value), allowed=allowed)
        kind = known[key].annotation
        if isinstance(kind, type) and issubclass(kind, Settings) and isinstance(value, dict):
            _check_keys(kind, value, f"{place}{key}.")


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
