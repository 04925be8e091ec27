"""Shapes, strides and dtypes that launchers of the head's kernels accept."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tile(name: str, tensor: Tensor, *dtypes: torch.dtype, shape: torch.Size | None = None) -> None:
    """Raise unless `tensor` is a matrix with contiguous columns in one of `dtypes`, of `shape` where one is given."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}; accepted: {', '.join(map(str, dtypes))}.")
    if tensor.dim() != 2 or (shape is not None and tensor.shape != shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {tuple(shape or ('rows', 'columns'))} is needed.")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; its columns must be contiguous.")


def check_rows(rows: int, **tensors: Tensor) -> None:
    """Raise unless every tensor is contiguous (rows,): `targets` int64, the others float32."""
    for name, tensor in tensors.items():
        dtype = torch.int64 if name == "targets" else torch.float32
        if tensor.shape != (rows,) or not tensor.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()}; ({rows},) is needed.")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; {dtype} is needed.")


def check_bias(bias: Tensor | None, first_column: int, columns: int) -> None:
    """Raise unless there is no bias, or a contiguous one that covers the tile's columns."""
    if bias is not None and (bias.dim() != 1 or bias.shape[0] < first_column + columns or not bias.is_contiguous()):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, strides {bias.stride()}; contiguous (V,) is needed, with "
            f"V ≥ {first_column + columns} for this tile."
        )
