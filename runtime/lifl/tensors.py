"""Tensors of a safetensors data section as numpy arrays and torch tensors, and back.

Reading makes views where it can. Two dtypes cannot be viewed: numpy has no bfloat16, so BF16 becomes a float32
copy (exact), and BOOL is copied because a sender may have written bytes other than 0 and 1, which neither numpy
nor torch can bear. Nothing here imports torch unless a torch tensor is asked for or handed in.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from lifl.errors import InvalidModel
from lifl.model_layout import MAX_HEADER_BYTES, ModelLayout, TensorSpec, encode_header, parse_header

if TYPE_CHECKING:
    import torch

Tensor = Any
"""A numpy array or a torch tensor; torch may not be installed, so type checkers cannot be told."""

Buffer = bytes | bytearray | memoryview | mmap.mmap | NDArray[Any]

LENGTH: Final = struct.Struct("<Q")
"""The first 8 bytes of a safetensors file: the length of its JSON header."""

NUMPY_DTYPES: Final[Mapping[str, type[Any]]] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}
"""The numpy type of each safetensors dtype; BF16 has none."""

_DTYPE_OF_NUMPY: Final = {np.dtype(numpy_dtype): dtype for dtype, numpy_dtype in NUMPY_DTYPES.items()}
_TORCH_NAMES: Final[Mapping[str, str]] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_DTYPE_OF_TORCH: Final = {f"torch.{name}": dtype for dtype, name in _TORCH_NAMES.items()}


def byte_view(payload: Buffer) -> NDArray[np.uint8]:
    """A buffer as a read-only 1-D array of its bytes, without a copy."""
    view = np.frombuffer(payload, np.uint8) if len(payload) else np.empty(0, np.uint8)
    view.flags.writeable = False
    return view


# --- reading -------------------------------------------------------------------------------------------------


def split(data: Buffer) -> tuple[ModelLayout, memoryview]:
    """Check safetensors bytes; return their layout and a read-only view of the data section.

    Raises InvalidModel for a file that is cut short or whose header is not right.
    """
    view = byte_view(data).data
    if len(view) < LENGTH.size:
        raise InvalidModel(f"safetensors data of {len(view)} bytes is too short to hold a header")
    (length,) = LENGTH.unpack_from(view)
    start = LENGTH.size + length
    if length > MAX_HEADER_BYTES or start > len(view):
        raise InvalidModel(
            f"the safetensors header claims {length} bytes, but only {len(view) - LENGTH.size} follow"
        )
    return parse_header(view[LENGTH.size : start], len(view) - start), view[start:]


def bfloat16_to_float32(bits: NDArray[np.uint16], out: NDArray[np.floating[Any]] | None = None) -> NDArray[Any]:
    """The exact float values of bfloat16 bits; `out` may be float32 or float64 of the same shape."""
    if out is not None and out.dtype == np.float32:
        # Widened straight into the result: a shift of the bits is the whole conversion.
        np.left_shift(bits, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
        return out
    wide = np.left_shift(bits, np.uint32(16), dtype=np.uint32).view(np.float32)
    if out is None:
        return wide
    out[...] = wide
    return out


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of float32 values rounded to bfloat16, to nearest even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    quiet = (bits >> 16) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def as_array(payload: NDArray[np.uint8], spec: TensorSpec) -> NDArray[Any]:
    """One tensor of a data section as a read-only array of its shape; a view except for BF16 and BOOL."""
    items = payload[spec.offset : spec.offset + spec.nbytes]
    if spec.dtype == "BF16":
        array: NDArray[Any] = bfloat16_to_float32(items.view(np.uint16))
    elif spec.dtype == "BOOL":
        array = items != 0
    else:
        array = items.view(NUMPY_DTYPES[spec.dtype])
    array = array.reshape(spec.shape)
    array.flags.writeable = False
    return array


def as_torch(payload: NDArray[np.uint8], spec: TensorSpec) -> torch.Tensor:
    """One tensor of a data section as a torch tensor; a view except for BOOL and for misaligned tensors.

    torch knows no read-only tensors: writing to the view of a read-only mapping kills the process.
    """
    import torch

    dtype = getattr(torch, _TORCH_NAMES[spec.dtype])
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    items = payload[spec.offset : spec.offset + spec.nbytes]
    address = int(items.__array_interface__["data"][0])
    if spec.dtype == "BOOL" or address % torch.empty(0, dtype=dtype).element_size():
        copy = bytearray(items)
        whole = torch.frombuffer(copy, dtype=torch.uint8)
        return (whole != 0 if spec.dtype == "BOOL" else whole.clone().view(dtype)).view(spec.shape)
    # torch warns about every read-only buffer, for the reason above; an alias by address does not tell it.
    alias = (ctypes.c_char * spec.nbytes).from_address(address)
    alias.owner = items  # type: ignore[attr-defined]  # keeps the memory as long as the tensor
    return torch.frombuffer(alias, dtype=dtype).view(spec.shape)


# --- writing -------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes models as safetensors in a buffer that is kept from one call to the next.

    Not to be used by several threads; a result is valid until the next call.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._signature: tuple[Any, ...] = ()
        self._layout: ModelLayout | None = None

    def encode(self, tensors: Mapping[str, Tensor]) -> memoryview:
        """Copy the tensors once, behind a header, and return the safetensors bytes as a view of the buffer.

        `tensors` are numpy arrays or torch tensors (on any device, of any strides). Raises InvalidModel for a
        dtype that cannot be averaged, for no tensors at all, and for a name that is not valid Unicode.
        """
        entries = {name: (_dtype_of(name, tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
        signature = tuple(entries.items())
        if self._layout is None or signature != self._signature:
            header = encode_header(entries)
            self._layout = parse_header(header)
            self._signature = signature
            # A fresh bytearray: the old one cannot be resized while a caller still holds the last result.
            self._buffer = bytearray(LENGTH.size + len(header) + self._layout.payload_bytes)
            LENGTH.pack_into(self._buffer, 0, len(header))
            self._buffer[LENGTH.size : LENGTH.size + len(header)] = header
        start = len(self._buffer) - self._layout.payload_bytes
        payload = np.frombuffer(self._buffer, np.uint8)[start:]
        for spec in self._layout.tensors:
            _copy(payload[spec.offset : spec.offset + spec.nbytes], tensors[spec.name], spec)
        return memoryview(self._buffer).toreadonly()


def _is_torch(tensor: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever holds a torch tensor has imported torch
    return torch is not None and isinstance(tensor, torch.Tensor)


def _dtype_of(name: str, tensor: Tensor) -> str:
    if isinstance(tensor, (np.ndarray, np.generic)):
        dtype = _DTYPE_OF_NUMPY.get(tensor.dtype.newbyteorder("="))
    elif _is_torch(tensor):
        dtype = _DTYPE_OF_TORCH.get(str(tensor.dtype))
    else:
        raise InvalidModel(f"tensor {name!r} is a {type(tensor).__name__}; give a numpy array or a torch tensor")
    if dtype is None:
        raise InvalidModel(f"tensor {name!r} is {tensor.dtype}, which cannot be averaged; convert it to float32")
    return dtype


def _copy(target: NDArray[np.uint8], tensor: Tensor, spec: TensorSpec) -> None:
    """Copy one tensor to its place, whatever its strides, byte order or device."""
    if spec.nbytes == 0:
        return
    if isinstance(tensor, (np.ndarray, np.generic)):
        np.copyto(target.view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape), tensor)
        return
    import torch

    place = torch.frombuffer(target.data, dtype=getattr(torch, _TORCH_NAMES[spec.dtype]))
    place.view(spec.shape).copy_(tensor.detach())
