"""Names and sizes of dtypes in the formats, without importing torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex32": 4, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}  # fmt: skip

SAFETENSORS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
TO_SAFETENSORS = {name: code for code, name in SAFETENSORS.items()}

TORCH_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip


def tensor_from_bytes(data: Any, dtype: str, shape: Sequence[int], stride: Sequence[int] | None = None) -> Any:
    """A torch tensor over a numpy array of bytes, without a copy.

    Args:
        data: the bytes, as a one-dimensional uint8 array.
        dtype: torch's name of the element type.
        shape: the sizes.
        stride: in elements; None for row-major order.
    """
    import torch

    wanted = getattr(torch, dtype)
    if data.size == 0 or math.prod(shape) == 0:
        return torch.empty(tuple(shape), dtype=wanted)
    flat = torch.from_numpy(data).view(wanted)
    return flat.reshape(tuple(shape)) if stride is None else flat.as_strided(tuple(shape), tuple(stride))


def row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements of ``shape`` at ``stride`` lie one after the other in row-major order."""
    step = 1
    for size, distance in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and distance != step:
            return False
        step *= size
    return True
