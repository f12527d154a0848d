"""`python -m trainer export`: a checkpoint becomes the next version of a model, once every file of it is proved."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from serving.bundle import ARTEFACTS
from serving.errors import ParityserveError
from trainer.commands.parts import EXAMPLES, add_data_dir, console, obtain

if TYPE_CHECKING:
    from serving.bundle import Bundle
    from trainer.data import Split

_FORMATS = ",".join(dict.fromkeys(backend for backend, _ in ARTEFACTS))
_PRECISIONS = ",".join(dict.fromkeys(precision for _, precision in ARTEFACTS))


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    export = commands.add_parser("export", help="write a checkpoint as the next version of a model, once it is proved")
    export.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="what train wrote")
    export.add_argument(
        "--repository",
        type=Path,
        default=Path("exported"),
        metavar="PATH",
        help="the model repository (default: exported)",
    )
    export.add_argument("--model", metavar="NAME", help="the model's name (default: the data set's)")
    export.add_argument(
        "--formats",
        type=_names,
        default=["onnx", "torchscript"],
        metavar="NAME,...",
        help=f"which kinds of file to write, of {_FORMATS} (default: onnx,torchscript); aoti needs a C++ compiler",
    )
    export.add_argument(
        "--precisions",
        type=_names,
        default=["fp32"],
        metavar="NAME,...",
        help=f"in which precisions, of {_PRECISIONS} (default: fp32); fp16 and int8 are of onnx alone, "
        "and int8 is calibrated with training images",
    )
    export.add_argument(
        "--calibration-images",
        type=int,
        default=1000,
        metavar="N",
        help="how many training images int8 is calibrated with, as many of each class (default: 1000)",
    )
    add_data_dir(export)
    export.set_defaults(command=_export)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _export(options: argparse.Namespace) -> int:
    from trainer import artefacts, checkpoint, data
    from trainer.export import export

    chosen = artefacts.choose(options.formats, options.precisions)
    if options.calibration_images < 1:
        raise ValueError(f"--calibration-images: got {options.calibration_images}, want 1 or more")
    trained = checkpoint.load(options.checkpoint)
    dataset = data.DATASETS[trained.dataset]
    calibrates = ("onnx", "int8") in chosen
    folder = obtain(trained.dataset, options.data_dir, test_only=not calibrates)
    test, calibration = data.load_test(dataset, folder), None
    if calibrates:
        from trainer.precisions import calibration_images

        calibration = calibration_images(data.load_train(dataset, folder), options.calibration_images)
    with console.status("exporting") as status:
        bundle, report = export(
            trained, test, options.repository, options.model, lambda step: status.update(step), chosen, calibration
        )
    worst = max(row.comparison.max_abs for row in report.rows)
    console.print(
        f"exported: {bundle.path}, proved against PyTorch on {report.images} images: largest |Δ logit| {worst:.1e}",
        soft_wrap=True,
    )
    _draw_beside(bundle, test)
    return 0


def _draw_beside(bundle: Bundle, test: Split) -> None:
    """The pictures of a version that was just published; it is complete without them."""
    try:
        from trainer import pictures
    except ParityserveError as error:
        console.print(f"no pictures were drawn: {error}", soft_wrap=True)
        return
    subject = pictures.of_bundle(bundle)
    pictures.write(subject.folder, pictures.figures(subject, test, EXAMPLES))
    console.print(f"pictures: {subject.folder}", soft_wrap=True)
