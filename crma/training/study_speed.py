"""How fast runs train together here: joint steps a second, by how many processes share the machine.

Processes take a GPU in turns. So more of them are faster only as long as it waits for each.
"""

import json
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from crma.core.errors import TrainingError
from crma.models.base_model import find_base
from crma.training.config import TrainConfig
from crma.training.cuda_tape import CudaTape
from crma.training.joint_trainer import JointTrainer
from crma.training.protocol import Run
from crma.training.record import silent
from crma.training.recorded_pass import Recorder
from crma.training.training_model import TrainingModel, load_training_model

ARM = "MODULAR"  # the most that a step does: a LoRA and a backbone train
EPOCHS = 1000  # it never comes to their end
WARM_UP_STEPS = 12  # until all shapes of batches occurred, and were recorded
PATIENCE_S = 240.0  # until every process is ready
NEARLY_AS_FAST = 0.95  # as the fastest


class Speed(NamedTuple):
    """What so many processes do.

    Attributes:
        workers: processes at once.
        graphs: whether passes were played from CUDA graphs.
        steps_per_s: joint steps of all of them.
    """

    workers: int
    graphs: bool
    steps_per_s: float


def speeds(
    config: TrainConfig, *, together: int, workers: Sequence[int], seconds: float
) -> list[Speed]:
    """Measure joint steps, for each number of processes and for one without graphs.

    Args:
        config: of a run; its arm, seed and epochs are replaced.
        together: so many runs train at once in a process.
        workers: numbers of processes.
        seconds: of each measurement.

    Raises:
        TrainingError: a process failed; it says why on its standard error.
    """
    configs = [
        config.model_copy(update={"arm": ARM, "seed": seed, "epochs": EPOCHS})
        for seed in range(together)
    ]
    context = get_context("spawn")  # CUDA cannot be used in a forked process
    meeting = context.Barrier(max(workers))
    with TemporaryDirectory() as folder:
        processes = []
        for number in range(max(workers)):
            own = Path(folder) / str(number)
            part = _Part(configs, tuple(workers), seconds, number, own, meeting)
            processes.append(context.Process(target=_take_part, args=(part,)))
        _to_their_end(processes)
        totals: dict[tuple[int, bool], float] = {}
        for path in Path(folder).glob("*/speed.json"):
            for number, graphs, steps_per_s in json.loads(path.read_text()):
                before = totals.get((number, graphs), 0.0)
                totals[(number, graphs)] = before + steps_per_s
    return [Speed(*kind, total) for kind, total in sorted(totals.items())]


def fastest(found: Sequence[Speed]) -> Speed:
    """The fewest processes that are nearly as fast as any."""
    most = max(speed.steps_per_s for speed in found)
    fast_enough = [speed for speed in found if speed.steps_per_s >= NEARLY_AS_FAST * most]
    return min(fast_enough, key=lambda speed: speed.workers)


class _Part(NamedTuple):
    """What one of the processes takes part in: see `speeds`."""

    configs: Sequence[TrainConfig]
    workers: Sequence[int]
    seconds: float
    number: int
    folder: Path
    meeting: Barrier


def _to_their_end(processes: Sequence[BaseProcess]) -> None:
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    if any(process.exitcode for process in processes):
        message = "a process that measured the speed of training failed; it said why"
        codes = [process.exitcode for process in processes]
        raise TrainingError(message, field="exit codes", value=codes, allowed=0)


def _take_part(part: _Part) -> None:
    """Train as one of several processes, and write how fast that was."""
    try:
        found = _measured(part)
    except BaseException:
        part.meeting.abort()  # the others need not wait
        raise
    (part.folder / "speed.json").write_text(json.dumps(found))


def _measured(part: _Part) -> list[Speed]:
    """The share of this process in each measurement that it takes part in."""
    torch.set_num_threads(max(1, torch.get_num_threads() // max(part.workers)))
    config = part.configs[0]
    loaded = load_training_model(find_base(config.model), config.dtype)
    recorder = Recorder(CudaTape() if torch.cuda.is_available() else None)
    steps = _ready(part, "recorded", loaded, recorder, WARM_UP_STEPS)
    found = []
    for workers in part.workers:
        part.meeting.wait(PATIENCE_S)
        if part.number < workers:
            graphs = recorder.tape is not None and not recorder.failed
            found.append(Speed(workers, graphs, _steps_per_s(steps, part.seconds)))
    part.meeting.wait(PATIENCE_S)
    if part.number == 0 and recorder.tape is not None:
        steps = _ready(part, "direct", loaded, Recorder(), 1)
        found.append(Speed(1, False, _steps_per_s(steps, part.seconds)))
    return found


def _ready(
    part: _Part, name: str, loaded: TrainingModel, recorder: Recorder, num_steps: int
) -> Iterator[None]:
    """The steps of a joint trainer, of which so many are done."""
    base = find_base(part.configs[0].model)
    trainers = []
    for config in part.configs:
        folder = part.folder / name / str(config.seed)
        trainers += next(Run(config, base, folder, silent, loaded).training())
    steps = JointTrainer(trainers, recorder).steps()
    for _ in range(num_steps):
        next(steps)
    return steps


def _steps_per_s(steps: Iterator[None], seconds: float) -> float:
    started = time.perf_counter()
    num_steps = 0
    while time.perf_counter() - started < seconds:
        next(steps)
        num_steps += 1
    return num_steps / (time.perf_counter() - started)
