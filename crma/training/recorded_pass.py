"""Passes of joint models that are recorded once, and played again.

A pass of a small model is thousands of kernels, and launching them takes many times as long as
running them. A CUDA graph launches all of them at once. What it reads and writes lies where it lay
when it was recorded, so a batch is padded to one of a few shapes and copied there.

Shapes: as in `joint_pass`.
"""

import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crma.evaluation.evaluator import Batch
from crma.training.cuda_tape import Play, Tape
from crma.training.joint_model import JointFold, JointModel
from crma.training.joint_pass import DirectPass, Inputs, Pass, Passed, padded

MAX_DIFFERENCE = 0.1
"""Between a recorded pass and the same as it comes, relative to the norm of what they compute.

Rounding is far below, though other kernels may be chosen; a pass that reads the wrong places is far
above.
"""


class Recorder:
    """The recorded passes of a process. Models of one kind share them, one after the other.

    Args:
        tape: records; None: passes are done as they come.

    Attributes:
        failed: whether something could not be recorded. Then nothing is, from there on.
    """

    def __init__(self, tape: Tape | None = None) -> None:
        self.tape = tape
        self.failed = False
        self._known: dict[tuple[Any, ...], RecordedPasses] = {}

    def pass_of(self, model: JointModel) -> Pass:
        """What does the passes of a model, until this is called again."""
        if self.tape is None or self.failed:
            return DirectPass(model)
        key = _kind(model)
        if key not in self._known:
            self._known[key] = RecordedPasses(model, self, self.tape)
        passes = self._known[key]
        passes.take(model)
        return passes

    def give_up(self, reason: str) -> None:
        """Record nothing from now on, and say so once."""
        self.failed = True
        self.forget()
        message = f"{reason}; passes are done as they come, and take several times as long"
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def forget(self) -> None:
        """Let go of all that was recorded, once no model uses it."""
        self._known.clear()
        if self.tape is not None:
            self.tape.forget()


def _kind(model: JointModel) -> tuple[Any, ...]:
    """Joint models of one kind do the same in a pass, if their weights are where it reads them."""
    tensors = [(tuple(each.shape), each.requires_grad) for each in model.lora_parameters]
    fold = model.joint_fold()
    trained = None if fold is None else tuple(part.requires_grad for part in fold)
    rank = 0 if model.backbone is None else model.backbone.config.rank
    scalings = [pair.scaling for pair in model.lora.pairs.values()]  # constants of a recording
    kind = (id(model.injection), model.num_runs, trained, rank, model.penalty)
    return (*kind, *tensors, *scalings)


class Recorded(NamedTuple):
    """The recorded pass of a shape of batch: how to play it, and where it reads the batch."""

    play: Play
    batch: Batch


class RecordedPasses:
    """Does the passes of joint models of one kind, one model at a time.

    The first pass of each shape is done as it comes; the second one is recorded, and compared once
    with the same as it comes; all others are played. What a pass returns is overwritten by the
    next one.

    Args:
        model: the first of its kind. Its weights are not read, but for those that do not train.
        recorder: told if nothing can be recorded.
        tape: records.
    """

    def __init__(self, model: JointModel, recorder: Recorder, tape: Tape) -> None:
        self.model = model
        self.direct = DirectPass(model)
        self.recorder = recorder
        self.tape = tape
        self.places: Inputs | None = None  # of what a pass reads beside the batch
        self.passed: Passed | None = None  # where it writes
        self.seen: set[tuple[torch.Size, torch.Size]] = set()
        self.recorded: dict[tuple[torch.Size, torch.Size], Recorded] = {}

    @torch.no_grad()
    def take(self, model: JointModel) -> None:
        """Go on with another model of the same kind."""
        for place, value in zip(self.model.lora_parameters, model.lora_parameters, strict=True):
            if not place.requires_grad:
                place.copy_(value)

    def __call__(self, inputs: Inputs) -> Passed:
        """Do a pass. Nothing is added to any `grad`."""
        inputs = inputs._replace(batch=padded(inputs.batch))
        shape = (inputs.batch.input_ids.shape, inputs.batch.targets.shape)
        if self.recorder.failed:
            return self.direct(inputs)
        if shape in self.recorded:
            return self._play(self.recorded[shape], inputs)
        if shape in self.seen:
            return self._recorded_now(inputs)
        self.seen.add(shape)
        return self.tape.warm_up(partial(self.direct, inputs))

    def _recorded_now(self, inputs: Inputs) -> Passed:
        """Record a pass, and do it."""
        wanted = self.tape.warm_up(partial(self.direct, inputs))
        try:
            recorded = self._record(inputs, wanted)
        except RuntimeError as error:
            self.recorder.give_up(f"a pass could not be recorded ({error})")
            return wanted
        found = self._play(recorded, inputs)
        problem = difference(found, wanted)
        if problem:
            self.recorder.give_up(problem)
            return wanted
        self.recorded[(inputs.batch.input_ids.shape, inputs.batch.targets.shape)] = recorded
        return found

    def _record(self, inputs: Inputs, like: Passed) -> Recorded:
        """Record the pass of a shape.

        Args:
            inputs: of that shape.
            like: what such a pass computes.
        """
        places = self._places(inputs)
        if self.passed is None:
            self.passed = Passed(
                torch.empty_like(like.losses),
                torch.empty_like(like.lora),
                tuple(map(torch.empty_like, like.fold)),
                torch.empty_like(like.ratios),
                recorded=True,
            )
        into = self.passed

        def work() -> None:
            computed = self.direct(places)
            for place, value in zip(into.tensors(), computed.tensors(), strict=True):
                place.copy_(value)

        return Recorded(self.tape.record(work), places.batch)

    def _places(self, inputs: Inputs) -> Inputs:
        """Where a pass of a shape reads: the batch at a place of its own, the rest where all do."""
        if self.places is None:
            fold = None if inputs.fold is None else JointFold(*map(_place, inputs.fold))
            self.places = Inputs(inputs.batch, _place(inputs.num_tokens), _place(inputs.lora), fold)
        return self.places._replace(batch=Batch(*map(_place, inputs.batch)))

    def _play(self, recorded: Recorded, inputs: Inputs) -> Passed:
        if self.places is None or self.passed is None:
            raise RuntimeError("nothing was recorded")
        places = self.places._replace(batch=recorded.batch)
        for place, value in zip(places.tensors(), inputs.tensors(), strict=True):
            place.detach().copy_(value.detach())
        recorded.play()
        return self.passed


def _place(tensor: Tensor) -> Tensor:
    """A copy that stays where it is, with a gradient of its own if the tensor has one."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def difference(found: Passed, wanted: Passed) -> str:
    """How what was played differs from what it should compute, in words; empty: hardly."""
    for place, (one, other) in enumerate(zip(found.tensors(), wanted.tensors(), strict=True)):
        far = (one.float() - other.float()).norm().item()
        norm = other.float().norm().item()
        if not far <= MAX_DIFFERENCE * norm:  # also if it is not a number
            name = "losses" if place == 0 else f"tensor {place}"
            return f"a recorded pass is wrong: {name} differs by {far:.3g} at a norm of {norm:.3g}"
    return ""
