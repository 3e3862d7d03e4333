"""Tensors of torch as files store them, and back."""

import functools

import torch
from torch import Tensor

from deepthin.storage.arrays import Buffer, Raw, pieces_of

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
}  # fmt: skip
_NAMES = {kind: name for name, kind in _TYPES.items()}


def raw_of(name: str, tensor: Tensor) -> Raw:
    """A tensor as a file stores it, without a copy.

    Args:
        name: Its name, for the message.
        tensor: The tensor; on the meta device it counts as zeros.

    Returns:
        Its type, its shape, and where its bytes are.

    Raises:
        TypeError: A file cannot hold its dtype or layout.
    """
    if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} is {tensor.dtype}, {tensor.layout}: a .thin file holds dense {', '.join(_TYPES)} only."
        )
    kind, shape = _NAMES[tensor.dtype], tuple(tensor.shape)
    if tensor.is_meta:  # the size of a file can be told before there are values
        return Raw.zeros(kind, shape)
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        return Raw(kind, shape, _bytes(tensor))
    return Raw(kind, shape, functools.partial(pieces_of, tensor, tensor.element_size(), _bytes))


def _bytes(tensor: Tensor) -> Buffer:
    """The tensor's bytes: a view where it is contiguous in main memory, otherwise of a copy."""
    row_by_row = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return row_by_row.view(torch.uint8).numpy().data


def tensor_of(raw: Raw) -> Tensor:
    """A stored tensor.

    Args:
        raw: What a file has.

    Returns:
        A tensor in main memory that uses the stored bytes, without a copy where these are writable.
    """
    if not raw.bytes:
        return torch.empty(raw.shape, dtype=_TYPES[raw.dtype])
    data = raw.data  # of a large file, a copy that was made now
    return torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=_TYPES[raw.dtype]).view(
        raw.shape
    )
