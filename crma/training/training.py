"""Training part by part, so that parts of several runs can be trained at once."""

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from crma.training.loop import TaskTrainer

Result = TypeVar("Result")

Training = Generator[list[TaskTrainer], list[float], Result]
"""Yields what can be trained next, in any order or at once; is sent the seconds that each took."""


Train = Callable[[Sequence[TaskTrainer]], list[float]]
"""Trains all that it is given. Returns the seconds that each took."""


def go_through(training: Training[Result], train: Train) -> Result:
    """Go through a training to its end. Raises as `train`."""
    try:
        trainers = next(training)
        while True:
            trainers = training.send(train(trainers))
    except StopIteration as end:
        result: Result = end.value
        return result


def train_alone(training: Training[Result]) -> Result:
    """Go through a training, one trainer after the other. Raises as `TaskTrainer.run`."""
    return go_through(training, lambda trainers: [trainer.run() for trainer in trainers])


def side_by_side(trainings: Sequence[Training[Result]]) -> Training[list[Result]]:
    """Several trainings that do not need each other, as one.

    Returns:
        The results, in the order of the trainings.
    """
    results: dict[int, Result] = {}
    waiting: dict[int, list[TaskTrainer]] = {}

    def go_on(index: int, seconds: list[float] | None) -> None:
        try:
            waiting[index] = trainings[index].send(seconds)  # type: ignore[arg-type]
        except StopIteration as end:
            waiting.pop(index, None)
            results[index] = end.value

    for index in range(len(trainings)):
        go_on(index, None)
    while waiting:
        seconds = yield [trainer for trainers in waiting.values() for trainer in trainers]
        taken = iter(seconds)
        for index, trainers in list(waiting.items()):
            go_on(index, [next(taken) for _ in trainers])
    return [results[index] for index in range(len(trainings))]
