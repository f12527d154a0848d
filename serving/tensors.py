"""Tensors as the wire and the bundle name them: datatypes of the Open Inference Protocol, shapes with named axes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Array = npt.NDArray[np.generic]

# https://github.com/kserve/open-inference-protocol: names and widths of the tensor datatypes.
DATATYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}


class TensorSpec(BaseModel):
    """Name, datatype and shape of one input or output; an axis of any length has a name instead of a number."""

    model_config = ConfigDict(frozen=True)

    name: str
    datatype: str
    shape: tuple[int | str, ...]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The numpy dtype of this tensor's elements."""
        return DATATYPES[self.datatype]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape fits: equal numbers where they are given, anything from 1 up elsewhere."""
        return len(shape) == len(self.shape) and all(
            got == want if isinstance(want, int) else got >= 1 for got, want in zip(shape, self.shape, strict=True)
        )

    def shape_text(self) -> str:
        """The shape as messages show it: `[batch,1,28,28]`."""
        return shape_text(self.shape)


def shape_text(shape: tuple[int | str, ...]) -> str:
    """A shape as messages show it: `[2,1,28,28]`."""
    return f"[{','.join(map(str, shape))}]"
