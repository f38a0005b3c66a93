"""Linears on the same input as one product, with their outputs side by side.

With the kernel, weights are packed in bfloat16, or rounded to 8 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from crma.method.frozen_linear import FrozenLinear, squared_norms
from crma.models.loading import computes_in_bfloat16
from server.engine.native.huge_pages import HugePages
from server.engine.native.kernel import Kernel
from server.engine.native.packed_weight import Int8Weight, PackedWeight, is_exact_in_bfloat16

Linear = Callable[[Tensor], Tensor]  # [T, in] -> [T, out]
Product = Callable[[Tensor, Tensor | None], Tensor]  # the same, of an input and the bias to add


@dataclass(frozen=True)
class JoinedLinear:
    """Several linears as one.

    Attributes:
        linear: the product, with the biases.
        parts: each linear as an adapter needs it, which changes more than a low-rank update does.
        packed: the weights in the kernel's layout; None: they are not in it.
        bias: the biases side by side; None: there are none.
    """

    linear: Linear
    parts: list[FrozenLinear]
    packed: PackedWeight | Int8Weight | None = None
    bias: Tensor | None = None


def join(
    linears: list[nn.Linear],
    kernel: Kernel | None = None,
    *,
    int8: bool = False,
    memory: HugePages | None = None,
) -> JoinedLinear:
    """Join linears on the same input.

    The kernel computes the product where that changes no weight, or if `int8`. Where torch does and
    does not pack the weights, those of the linears become views of the joined ones.

    Args:
        linears: all with a bias, or all without.
        kernel: None: torch computes the product.
        int8: round the weights to 8 bits; needs the kernel.
        memory: where packed weights lie, one after the other.
    """
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([one.bias for one in linears])
    packed: PackedWeight | Int8Weight | None = None
    if kernel is not None and not int8 and packs(kernel, linears):
        dtype = linears[0].weight.dtype
        packed = PackedWeight.of(_side_by_side(linears), memory)
        product: Product = partial(_product_of_packed, kernel, packed)
        norms: Callable[[], Tensor] = cache(partial(_norms_of_packed, packed, dtype))
    else:
        norms = partial(torch.cat, [squared_norms(one.weight) for one in linears])
        if kernel is not None and int8:
            packed = Int8Weight.of(_side_by_side(linears), memory)
            product = partial(_product_in_int8, kernel, packed)
        else:
            product = _product(linears)
    parts = []
    stop = 0
    for one in linears:
        columns = slice(stop, stop + one.out_features)
        stop = columns.stop
        own_bias = None if bias is None else bias[columns]
        own_product = partial(_columns, product, columns)
        parts.append(FrozenLinear(own_product, partial(_some, norms, columns), own_bias))
    return JoinedLinear(lambda x: product(x, bias), parts, packed, bias)


def _norms_of_packed(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The squared norms of a packed weight, which had this dtype. Few adapters need them."""
    return squared_norms(weight.unpacked().to(dtype))


def _some(norms: Callable[[], Tensor], columns: slice) -> Tensor:
    return norms()[columns]


def _columns(product: Product, columns: slice, x: Tensor) -> Tensor:
    return product(x, None)[:, columns]


def packs(kernel: Kernel, linears: list[nn.Linear]) -> bool:
    """Whether `join` packs the weights of these linears in bfloat16, unless in 8 bits."""
    weight = linears[0].weight
    is_torchs = weight.dtype == kernel.dtype and _can_pack(weight)
    if is_torchs and not kernel.cpu_class.multiplies_bfloat16:
        return False
    return all(is_exact_in_bfloat16(one.weight) for one in linears)


def _side_by_side(linears: list[nn.Linear]) -> Tensor:
    """The weights as one; of a single linear its own, and no copy."""
    if len(linears) == 1:
        return linears[0].weight.data
    return torch.cat([one.weight.data for one in linears])


def _product(linears: list[nn.Linear]) -> Product:
    weight = _side_by_side(linears)
    if _can_pack(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x, bias: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    views = torch.split(weight, [one.out_features for one in linears])
    for one, view in zip(linears, views, strict=True):
        one.weight.data = view
    return lambda x, bias: linear(x, weight, bias)


def _product_of_packed(
    kernel: Kernel, packed: PackedWeight, x: Tensor, bias: Tensor | None
) -> Tensor:
    return kernel.product(x.contiguous(), packed, bias)


def _product_in_int8(kernel: Kernel, weight: Int8Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    y = kernel.product_int8(x.contiguous(), weight)
    return y if bias is None else y.add_(bias)


def _can_pack(weight: Tensor) -> bool:
    """Whether torch multiplies packed weights of this dtype fast."""
    in_bf16_on_cpu = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    return in_bf16_on_cpu and computes_in_bfloat16(weight.device)
