"""Linears on the same input as one product, with their outputs side by side.

In bf16 on a CPU the weights are packed once, for all products, and with int8 they are rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from crma.method.frozen_linear import FrozenLinear, squared_norms
from server.engine.native.kernel import Int8Weight, Kernel

Linear = Callable[[Tensor], Tensor]  # [T, in] -> [T, out]
Product = Callable[[Tensor, Tensor | None], Tensor]  # the same, of an input and the bias to add


@dataclass(frozen=True)
class JoinedLinear:
    """Several linears as one.

    Attributes:
        linear: the product, with the biases.
        parts: each linear as an adapter needs it, which changes more than a low-rank update does.
    """

    linear: Linear
    parts: list[FrozenLinear]


def join(linears: list[nn.Linear], int8: Kernel | None = None) -> JoinedLinear:
    """Join linears on the same input.

    Unless the weights are packed or rounded, those of the linears become views of the joined ones.

    Args:
        linears: all with a bias, or all without.
        int8: computes the products with weights of 8 bits; None: the weights are not rounded.
    """
    norms = [squared_norms(one.weight) for one in linears]
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([one.bias for one in linears])
    product = _product(linears) if int8 is None else _product_in_int8(int8, linears)
    parts = []
    stop = 0
    for one, squared in zip(linears, norms, strict=True):
        columns = slice(stop, stop + one.out_features)
        stop = columns.stop
        own_bias = None if bias is None else bias[columns]
        parts.append(FrozenLinear(partial(_columns, product, columns), squared, own_bias))
    return JoinedLinear(lambda x: product(x, bias), parts)


def _columns(product: Product, columns: slice, x: Tensor) -> Tensor:
    return product(x, None)[:, columns]


def _product(linears: list[nn.Linear]) -> Product:
    if len(linears) == 1:
        weight = linears[0].weight.data
    else:
        weight = torch.cat([one.weight for one in linears])
    if _can_pack(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x, bias: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    views = torch.split(weight, [one.out_features for one in linears])
    for one, view in zip(linears, views, strict=True):
        one.weight.data = view
    return lambda x, bias: linear(x, weight, bias)


def _product_in_int8(kernel: Kernel, linears: list[nn.Linear]) -> Product:
    weight = Int8Weight.of(torch.cat([one.weight for one in linears]))

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        y = kernel.product(x, weight)
        return y if bias is None else y.add_(bias)

    return product


def _can_pack(weight: Tensor) -> bool:
    in_bf16_on_cpu = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    return in_bf16_on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported()
