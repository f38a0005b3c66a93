"""The sequential protocol: task after task, a snapshot after each, then the matrices and the drift.

A run folder holds `store/` (every snapshot, in the store's own format), `work/` (the step logs) and `record.json`
(format: API.md, run records). A run that was killed goes on after the last task it finished, to the same result.

Shapes: T tasks; loss[i][t] is L_{i,t}: task t after training task i, row 0 the base model.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any

import torch
from accelerate import Accelerator

from crma.core.digests import file_digest
from crma.core.errors import ConfigError, TrainingError
from crma.core.files import replace_file, to_json
from crma.core.provenance import commit, hardware
from crma.data.splits import SPLITS, load_split, split_path
from crma.evaluation.evaluator import Evaluator, Measure
from crma.method.backbone import Backbone, CrmaConfig
from crma.method.certificate import certify
from crma.method.injection import Injection, Plan, target_names
from crma.method.lora import Lora, LoraConfig, match_targets, new_lora
from crma.models.base_model import BaseModel
from crma.models.loading import load_model, load_tokenizer, resolve_dtype
from crma.models.model_shape import ModelShape
from crma.models.prompts import chat_format
from crma.store.adapter_store import AdapterStore
from crma.store.entry import BackboneEntry, TaskEntry, read_backbone
from crma.store.manifest import TrainedOn, check_name
from crma.store.publication import Origin, backbone_digest
from crma.training.arms import ARMS, Arm
from crma.training.config import TrainConfig
from crma.training.drift import measures
from crma.training.loop import AdaptedModel, TaskTrainer

Progress = Callable[[str, int, int], None]  # (what, done, total)
LICENCE = "Apache-2.0"


@dataclass
class Run:
    """One run of one arm: everything that stays the same from task to task."""

    config: TrainConfig
    base: BaseModel
    folder: Path
    progress: Progress

    def __post_init__(self) -> None:
        self.arm: Arm = ARMS[self.config.arm]
        for task in self.config.tasks:
            check_name(
                name_of(task)
            )  # now, and not when the first task is trained and cannot be published
        self.start = AdapterStore(Path(self.config.start)).backbone() if self.config.start else None
        self._check_start()
        self.accelerator = Accelerator()
        device = self.accelerator.device
        self.model = load_model(self.base, device, resolve_dtype(self.config.dtype, device))
        self.serving_attention = self.model.config._attn_implementation
        if (
            device.type == "cpu"
        ):  # the backward pass of torch's fused attention takes a third of a step there
            self.model.set_attn_implementation("eager")
        self.injection = Injection(self.model)
        tokenizer = load_tokenizer(self.base)
        self.evaluator = Evaluator(self.injection, tokenizer, chat_format(tokenizer))
        self.store = AdapterStore(self.folder / "store")
        tasks, items = self.config.tasks, self.config.train_items or None
        self.stages: list[tuple[str, tuple[str, ...]]] = [
            (name_of(task), (task,)) for task in tasks
        ]
        if self.arm.joint:
            self.stages = [("joint", tasks)]
        self.train_rows = {
            task: self.evaluator.encode(load_split(task, "train")[:items]) for task in tasks
        }
        self.rows = {
            task: self.evaluator.encode(load_split(task, self.config.measure)) for task in tasks
        }

    def execute(self) -> dict[str, Any]:
        """Train every task, measure, write the record and return it."""
        self._pin_config()
        started = time.perf_counter()
        record = self._record(sum(self._train(index) for index in range(len(self.stages))))
        record["wall_s"] = time.perf_counter() - started
        replace_file(self.folder / "record.json", to_json(record))
        return record

    def _check_start(self) -> None:
        """Raises BaseMismatch or ConfigError where `start` cannot go on learning in this run."""
        if not self.config.start:
            return
        if self.start is None or not self.arm.crma:
            message = "no backbone serves in that store, or the arm trains none"
            raise ConfigError(
                message, field="start", value=self.config.start, allowed="a store with a backbone"
            )
        self.start.check_base(self.base.digest)
        asked = shape_of(self.config)
        if any(self.start.manifest.config[key] != value for key, value in asked.items()):
            message = "the backbone of that store has another shape"
            raise ConfigError(
                message, field="crma", value=asked, allowed=self.start.manifest.config
            )

    def _pin_config(self) -> None:
        """A folder belongs to one config: going on with another would mix two runs."""
        path = self.folder / "config.json"
        if path.exists() and TrainConfig.from_dict(json.loads(path.read_text())) != self.config:
            message = "the run folder holds a run with another config; name a new one"
            raise TrainingError(
                message, field="out", value=str(self.folder), allowed="the same config"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, to_json(self.config))

    def _train(self, index: int) -> float:
        """Train stage number `index` unless its snapshot is there, and snapshot it. The seconds that training took."""
        task, tasks = self.stages[index]
        folder = self.folder / "work" / task
        if (folder / "stats.json").exists():
            return json.loads((folder / "stats.json").read_text())["wall_s"]
        lora, backbone = self._start_lora(index, task), self._start_backbone(index)
        first = index == 0 and self.start is None
        moves = backbone is not None and (
            first or (self.arm.backbone_learns and self.config.crma.later_scale > 0)
        )
        adapted = AdaptedModel(self.injection, lora, backbone, backbone_moves=moves).to(
            self.accelerator.device
        )
        M_0 = (
            self._first_backbone().to(self.accelerator.device).mixing().detach() if moves else None
        )
        rows, pad_id = (
            [row for name in tasks for row in self.train_rows[name]],
            self.evaluator.stop_id,
        )
        trainer = TaskTrainer(
            self.config, self.accelerator, adapted, rows, task, first, pad_id, folder, M_0
        )
        wall_s = trainer.run(
            partial(self.progress, f"{self.arm.name} seed {self.config.seed}: {task}")
        )
        self._snapshot(index, lora, backbone)
        replace_file(folder / "stats.json", to_json({"wall_s": wall_s}))
        return wall_s

    def _start_lora(self, index: int, task: str) -> Lora:
        """Fresh, seeded by run and task; or (NAIVE) the one from the task before."""
        if index and not self.arm.fresh_lora:
            return self.store.task(self.stages[index - 1][0]).load().trainable()
        config = lora_config(self.config, self.injection)
        return new_lora(config, self.injection.shapes, generator(self.config.seed, task))

    def _first_backbone(self) -> Backbone:
        """The identity, or where another store's backbone stands."""
        return (
            self.start.load(ModelShape.of(self.injection.model))
            if self.start
            else new_backbone(self.config, self.injection)
        )

    def _start_backbone(self, index: int) -> Backbone | None:
        """The snapshot before this task."""
        if not self.arm.crma:
            return None
        return self.backbone_after(index).load() if index else self._first_backbone()

    def backbone_after(self, i: int) -> BackboneEntry:
        """The backbone after i tasks."""
        return read_backbone(self.store.root, f"v{i}")

    def _origin(self, tasks: Sequence[str]) -> Origin:
        """What a snapshot says of where it comes from."""
        data = {
            f"{name_of(task)}/{split}": digest
            for task in tasks
            for split, digest in split_digests(task).items()
        }
        config = self.config.model_dump(mode="json")
        trained_on = TrainedOn(
            data=data, seed=self.config.seed, commit=commit(), arm=self.arm.name, config=config
        )
        return {"base": self.base, "trained_on": trained_on, "measured": {}, "licence": LICENCE}

    def _snapshot(self, index: int, lora: Lora, backbone: Backbone | None) -> None:
        """LoRA_t and CRMA_t as they are served. A snapshot left by a run killed just after it is kept.

        Raises:
            TrainingError: that snapshot is of another backbone: training the task again did not give the same one.
        """
        version, under, (task, tasks) = f"v{index + 1}", None, self.stages[index]
        if backbone is not None:
            if version not in self.store.backbone_versions():
                ancestors = dict.fromkeys(
                    self.backbone_after(i).digest for i in range(index, 0, -1)
                )
                if self.start is not None:
                    ancestors |= dict.fromkeys((self.start.digest, *self.start.manifest.lineage))
                ancestors.pop(
                    backbone_digest(backbone), None
                )  # one that did not move is its own ancestor
                origin = self._origin(self.config.tasks[: index + 1])
                self.store.publish_backbone(backbone, lineage=list(ancestors), **origin)
            under, trained = self.backbone_after(index + 1).digest, backbone_digest(backbone)
            if under != trained:
                message = f"{task}: trained again after the run was killed, it gave another backbone; start a new run"
                raise TrainingError(message, field="out", value=trained, allowed=under)
        if task not in self.store.task_names():
            fmt, origin = self.evaluator.fmt, self._origin(tasks)
            self.store.publish_task(task, lora, backbone=under, prompt_format=fmt, **origin)

    # -- after training: everything below reads the snapshots back ------------------------------------------------

    def plan_after(self, i: int, t: int) -> Plan:
        """What serves task t (0-based) after i stages were trained (METHOD, section 4)."""
        device, dtype = self.accelerator.device, self.model.dtype
        lora, backbone = [], []
        learned = (
            t if self.arm.fresh_lora and not self.arm.joint else i - 1
        )  # NAIVE: its one LoRA, as it was then
        if i >= self.learned_after(t) or (i > 0 and not self.arm.fresh_lora):
            lora = [(None, self.store.task(self.stages[learned][0]).load().to(device, dtype))]
        if self.arm.crma and i > 0:
            backbone = [(None, self.backbone_after(i).load().folded(device, dtype))]
        return Plan(lora, backbone)

    def learned_after(self, t: int) -> int:
        """The number of stages after which task t is learned."""
        return 1 if self.arm.joint else t + 1

    def _record(self, train_s: float) -> dict[str, Any]:
        tasks = self.config.tasks
        T = len(self.stages)
        measured: list[list[Measure]] = []
        for i in range(T + 1):
            self.progress("measuring", i, T + 1)
            measured.append([])
            for t, task in enumerate(tasks):
                plan = self.plan_after(i, t)
                known = i and plan == Plan([], [])  # base again, where nothing serves the task yet
                measured[i].append(
                    measured[0][t] if known else self.evaluator.measure(plan, self.rows[task])
                )
        loss, accuracy = (
            [[getattr(m, name) for m in row] for row in measured] for name in ("loss", "accuracy")
        )
        files = [self.folder / "work" / name / "log.jsonl" for name, _ in self.stages]
        log = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        tokens = sum(line["tokens"] for line in log)
        learned = [self.learned_after(t) for t in range(len(tasks))]
        return {
            "arm": self.arm.name,
            "seed": self.config.seed,
            "order": list(tasks),
            "config": self.config.model_dump(mode="json"),
            "digests": {
                "base": self.base.digest,
                "data": {task: split_digests(task) for task in tasks},
                "tasks": {name: self.store.task(name).digest for name, _ in self.stages},
                "backbones": [
                    self.backbone_after(i + 1).digest for i in range(T if self.arm.crma else 0)
                ],
            },
            "loss": loss,
            "accuracy": accuracy,
            **measures(loss, accuracy, learned),
            "steps": len(log),
            "norm_log": _norm_log([line["crma"] for line in log if "crma" in line])
            if self.arm.crma
            else {},
            "certificate": self._certificate() if self.arm.crma else {},
            "training": {"tokens": tokens, "wall_s": train_s, "tokens_per_s": tokens / train_s},
            "hardware": hardware(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "commit": commit(),
        }

    def _certificate(self) -> dict[str, Any]:
        """Of the last backbone, on the factors in the dtype that serves; its movement is since the first task."""
        first, last = self.backbone_after(1).load(), self.backbone_after(len(self.stages)).load()
        found = certify(last, first, self.model.dtype)
        return {key: value for key, value in found.items() if key != "layers"}


def lora_config(config: TrainConfig, injection: Injection) -> LoraConfig:
    """The LoRA of a task: its rank as the arm says, alpha / rank as the settings say."""
    settings, shapes = config.lora, injection.shapes
    targets = target_names(injection.model, settings.target_modules)
    per_rank = sum(sum(shapes[path]) for path in match_targets(targets, shapes))
    crma = sum(p.numel() for p in new_backbone(config, injection).parameters())
    rank = ARMS[config.arm].rank(settings.rank, per_rank, crma)
    return LoraConfig(rank, settings.alpha * rank / settings.rank, targets)


def new_backbone(config: TrainConfig, injection: Injection) -> Backbone:
    """The backbone before task 1, seeded by the run."""
    shape = CrmaConfig(len(injection.blocks), injection.hidden_size, **shape_of(config))
    return Backbone(shape, generator(config.seed, "backbone"))


def shape_of(config: TrainConfig) -> dict[str, Any]:
    """What a configuration says of its backbone's shape; the rest is the model's."""
    return config.crma.model_dump(include={"num_streams", "stream_rank"}) | {
        "mapping": ARMS[config.arm].mapping
    }


def _norm_log(log: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    """Over every logged step and layer: the figure the paper quotes, and beside it what that cannot show."""
    return {
        "steps": len(log),
        "max_norm_deviation": max(max(logged["c_M_minus_1"]) for logged in log),
        "median_grad_S": median_high(max(logged["grad_S"]) for logged in log),
        "max_moved_last": max(log[-1]["moved"]),
    }


def name_of(task: str) -> str:
    """The store's name of a task: the domain, or the last name of its folder."""
    return Path(task).name


def split_digests(task: str) -> dict[str, str]:
    """Digests of the three files that a task was trained and measured on."""
    return {split: file_digest(split_path(task, split)) for split in SPLITS}


def generator(seed: int, what: str) -> torch.Generator:
    """Seeded with 63 bits from a run's seed and a word, so that no two draws of a run share a stream."""
    bits = int.from_bytes(hashlib.sha256(f"{seed}/{what}".encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(bits)


def ship(run: Run, target: AdapterStore) -> BackboneEntry | None:
    """Publish a finished run: the last backbone, and every LoRA with its measures under it.

    All of it serves at once, unless another backbone does: then nothing moves, and the new one is returned, a candidate
    for `crma promote`.
    """
    T = len(run.config.tasks)
    candidate, serving = None, target.backbone()
    run.model.set_attn_implementation(
        run.serving_attention
    )  # the gate compares with these figures, as it serves

    def origin(entry: TaskEntry | BackboneEntry, measured: dict[str, Any]) -> Origin:
        trained_on = entry.manifest.trained_on
        return {
            "base": run.base,
            "trained_on": trained_on,
            "measured": measured,
            "licence": LICENCE,
        }

    if run.arm.crma and (serving is None or serving.digest != run.backbone_after(T).digest):
        last = run.backbone_after(T)
        options: Any = {
            "lineage": last.manifest.lineage,
            "serve": serving is None,
            **origin(last, {}),
        }
        published = target.publish_backbone(last.load(), **options)
        candidate = published if serving is not None else None
    for t, task in enumerate(run.config.tasks):
        run.progress("measuring what ships", t, T)
        entry, plan, ask = run.store.task(name_of(task)), run.plan_after(T, t), run.evaluator
        splits = {name: ask.encode(load_split(task, name)) for name in ("validation", "holdout")}
        measured = {name: asdict(ask.measure(plan, rows)) for name, rows in splits.items()}
        options = {"backbone": entry.manifest.backbone, "prompt_format": entry.prompt_format}
        target.publish_task(
            entry.name, entry.load(), serve=candidate is None, **options, **origin(entry, measured)
        )
    return candidate
