"""Single tensors of a pulled model, read from its files without building the model."""

from collections.abc import Iterator, Sequence

from safetensors import safe_open
from torch import Tensor

from crma.models.base_model import BaseModel


def weights_of_shape(base: BaseModel, shape: Sequence[int]) -> Iterator[Tensor]:
    """Every tensor of a shape in the files of a pulled model.

    Names are no help: transformers loads some files under other names, and a weight that two
    modules share is in the files once.
    """
    for path in sorted(base.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                if tensors.get_slice(name).get_shape() == list(shape):
                    yield tensors.get_tensor(name)
