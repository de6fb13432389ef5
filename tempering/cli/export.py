"""Convert the student of a run: the command `tempering export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


def export(
    run: Annotated[Path, Positional, arg(metavar="RUN")],
    *,
    to: Literal["onnx", "torch-export", "executorch", "hub-folder"] = "hub-folder",
    out: Annotated[Path | None, arg(metavar="PATH")] = None,
    best: bool = False,
    int8: bool = False,
    comparison: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    push: Annotated[str | None, arg(metavar="USER/NAME")] = None,
    private: bool = False,
) -> None:
    """Convert the student of a finished run, and compare the result with it.

    tempering export RUN --to onnx

    A hub-folder has config.json, model.safetensors and a model card, in the format of timm or transformers for their
    models. Load it, or the run itself, with tempering.load_student(FOLDER).

    Args:
        run: the run's folder.
        to: the format.
        out: path of the result; default: in RUN/export.
        best: use the weights of the best epoch instead of the last (not for a hub-folder).
        int8: for a hub-folder: quantize linear layers, and show scores, size and latency before and after in the card.
        comparison: for a hub-folder: the comparison whose table the card shows; default: the one that the run is in.
        push: for a hub-folder: upload it to this repository of the Hugging Face Hub.
        private: of a new repository.
    """
    from tempering.export import FORMATS, hub_folder, load_student, push_to_hub, read_config
    from tempering.export.load import example_inputs

    if to != "hub-folder":
        if int8 or push or comparison:
            raise ValueError("--int8, --push and --comparison are for --to hub-folder.")
        name, convert = FORMATS[to]
        path = out or run / "export" / name
        checked = convert(load_student(run, best=best), example_inputs(read_config(run), 3), path)
        print(f"wrote {path}: {checked}")
        return
    if best:
        raise ValueError("a hub-folder has the last weights, whose scores its card shows. Omit --best.")
    folder = hub_folder(run, out or run / "export" / "hub", comparison=comparison, int8=_int8(run) if int8 else None)
    print(f"wrote {folder}")
    if push is not None:
        print(f"uploaded to {push_to_hub(folder, push, private=private)}")


def _int8(run: Path) -> dict[str, object]:
    """Score the student before and after, on the test data of the recipe that the run was started with."""
    from tempering.export import compare_int8, load_student
    from tempering.export.load import experiment_of
    from tempering.tasks import Classification

    experiment = experiment_of(run)
    batches = next((b for name in ("test", "validation") if (b := experiment.splits[name]) is not None), None)
    if batches is None:
        raise ValueError(f"--int8 scores the student on test data, and the recipe of {run} has none.")
    return compare_int8(load_student(run), batches, experiment.task or Classification())
