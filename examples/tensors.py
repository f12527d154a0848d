"""Tensors by example: shapes, data types, views and copies, broadcasting, NumPy, random numbers, devices.

python examples/tensors.py
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

# `f"{x = }"` prints the expression beside its value, so that what is printed cannot differ from what was run.


def shapes() -> None:
    """Every axis has a length; a batch of grey images has four axes."""
    scalar = torch.tensor(3.0)
    vector = torch.tensor([1.0, 2.0, 3.0])
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    images = torch.zeros(64, 1, 28, 28)  # images, channels, height, width
    print(f"{scalar.ndim = }, {scalar.item() = }")
    print(f"{vector.ndim = }, {list(vector.shape) = }")
    print(f"{matrix.ndim = }, {list(matrix.shape) = }")
    print(f"{list(images.shape) = }, {images.numel() = }")
    print(f"{torch.arange(0, 10, 2).tolist() = }, {torch.zeros_like(vector).tolist() = }")


def dtypes() -> None:
    """A type decides which numbers there are, how exact they are, and what they cost."""
    print(f"{torch.tensor([1, 2]).dtype = }, {torch.tensor([1.0, 2]).dtype = }")
    third = torch.tensor(1 / 3, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        print(f"1/3 as {dtype}: {third.to(dtype).item():.17f}, the largest number is {torch.finfo(dtype).max:.4g}")
    pixels = torch.tensor([250, 251], dtype=torch.uint8)
    print(f"{(pixels + 10).tolist() = }: eight bits start again at 0 after 255")
    print(f"{torch.tensor([1.9, -1.9]).to(torch.int8).tolist() = }: the fraction is cut off")
    print(f"{(pixels + 0.5).dtype = }: of two types the result has the one that holds both")
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    print(f"an image takes {image.nbytes:,} bytes as uint8 and {image.float().nbytes:,} as float32")
    refused("the mean of whole numbers", lambda: torch.arange(10).mean())
    print(f"{torch.arange(10, dtype=torch.float32).mean().item() = }")


def arithmetic() -> None:
    """Number by number, or rows times columns, of which a linear layer is made."""
    a = torch.tensor([1, 2, 3])
    print(f"{(a * a).tolist() = }: number by number")
    print(f"{(a @ a).item() = }: multiplied and summed")
    left, right = torch.ones(3, 2), torch.ones(3, 2)
    refused("[3, 2] @ [3, 2]", lambda: left @ right)
    print(f"{list((left @ right.T).shape) = }: the inner lengths must agree, the outer ones remain")
    layer = torch.nn.Linear(in_features=2, out_features=6)
    by_hand = left @ layer.weight.T + layer.bias
    print(f"{list(layer(left).shape) = }, {torch.allclose(layer(left), by_hand) = }")


def aggregates() -> None:
    """Many numbers to few; `dim` is the axis that goes."""
    logits = torch.tensor([[0.1, 2.0, -1.0], [3.0, 0.0, 1.0]])  # of two images and three classes
    print(f"{logits.max().item() = }, {logits.sum(dim=0).tolist() = }")
    print(f"{logits.argmax(dim=1).tolist() = }: the class that each image is taken for")


def views_and_copies() -> None:
    """A view shows the same memory in another shape: writing to one changes the other."""
    x = torch.arange(6.0)
    view, copy = x.view(2, 3), x.clone()
    view[0, 0] = 99
    print(f"{x.tolist() = } after view[0, 0] = 99; {copy.tolist() = }")
    turned = view.permute(1, 0)  # axes in another order: a view as well
    print(f"{list(turned.shape) = }, {turned.is_contiguous() = }, {turned.data_ptr() == x.data_ptr() = }")
    refused("a view of what does not lie in that order", lambda: turned.view(6))
    flat = turned.reshape(6)  # a view where it can be, else a copy
    print(f"{flat.tolist() = }, {flat.data_ptr() == x.data_ptr() = }")
    print(f"{list(x.unsqueeze(0).shape) = }, {list(x.view(1, 6, 1).squeeze().shape) = }")
    print(f"{list(torch.stack([x, x]).shape) = }, {list(torch.cat([x, x]).shape) = }: a new axis, a longer one")
    grid = torch.arange(1, 10).reshape(3, 3)
    print(f"{grid[0].tolist() = }, {grid[:, 1].tolist() = }, {grid[grid > 6].tolist() = }")


def broadcasting() -> None:
    """Axes are matched from the last; one that is missing or of length 1 is repeated, without memory for it."""
    column, row = torch.tensor([[0], [10], [20]]), torch.tensor([1, 2, 3, 4])
    print(f"{list(column.shape) = } + {list(row.shape) = } gives {(column + row).tolist()}")
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).reshape(2, 3, 2, 2)
    centred = images - images.mean(dim=(0, 2, 3), keepdim=True)  # a mean for each of 3 channels: [1, 3, 1, 1]
    print(f"{list(centred.shape) = }, {centred.mean(dim=(0, 2, 3)).tolist() = }")
    refused("[2, 3] + [2]", lambda: torch.ones(2, 3) + torch.ones(2))


def with_numpy() -> None:
    """`from_numpy` and `numpy` share memory, `torch.tensor` copies; NumPy's usual type is float64."""
    array = np.array([1.0, 2.0, 3.0])
    shared, copied = torch.from_numpy(array), torch.tensor(array, dtype=torch.float32)
    array[0] = 99
    print(f"{shared.tolist() = }, {shared.dtype = }")
    print(f"{copied.tolist() = }, {copied.dtype = }")


def random_numbers() -> None:
    """The same seed gives the same numbers; a generator of one's own is disturbed by nobody."""
    torch.manual_seed(42)
    first = torch.rand(3)
    second = torch.rand(3)
    torch.manual_seed(42)
    again = torch.rand(3)
    print(f"{torch.equal(first, second) = }, {torch.equal(first, again) = }")
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    torch.rand(1000)
    print(f"{torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist() == order = }")


def devices() -> None:
    """A tensor lies on one device, and only tensors of the same device can be combined; NumPy wants the CPU's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = torch.tensor([1, 2, 3])
    there = here.to(device)
    print(f"{here.device = }, {there.device = }, {there.data_ptr() == here.data_ptr() = }")
    print(f"{there.cpu().numpy() = }")
    if device.type == "cuda":
        refused("a sum across devices", lambda: here + there)


def refused(what: str, attempt: Callable[[], object]) -> None:
    """Run what torch does not accept, and print what it says."""
    try:
        attempt()
    except (RuntimeError, ValueError) as error:
        print(f"{what} is refused: {str(error).splitlines()[0]}")
    else:
        raise AssertionError(f"{what} was accepted")


def main() -> None:
    """Every topic in turn."""
    topics = (
        shapes,
        dtypes,
        arithmetic,
        aggregates,
        views_and_copies,
        broadcasting,
        with_numpy,
        random_numbers,
        devices,
    )
    for topic in topics:
        print(f"\n{topic.__name__.replace('_', ' ')}: {topic.__doc__}")
        topic()


if __name__ == "__main__":
    main()
