"""Convert the student of a run: the command `tempering export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from torch import nn

    from tempering.export.quantization import Bits


def export(
    run: Annotated[Path, Positional, arg(metavar="RUN")],
    *,
    to: Literal["onnx", "torch-export", "executorch", "hub-folder", "int8", "int4"] = "hub-folder",
    out: Annotated[Path | None, arg(metavar="PATH")] = None,
    model: Annotated[str | None, arg(metavar="FILE.py:NET")] = None,
    best: bool = False,
    comparison: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    push: Annotated[str | None, arg(metavar="USER/NAME")] = None,
    private: bool = False,
) -> None:
    """Convert the student of a finished run, and compare the result with it.

    tempering export RUN --to onnx

    A hub-folder has config.json, model.safetensors and a model card, in the format of timm or transformers for their
    models. int8 and int4 are such folders too: the weights of linear layers are quantized by torchao, and the card
    shows scores on the run's test data, size and latency before and after. Load a folder, or the run itself, with
    tempering.load_student(FOLDER).

    Args:
        run: the run's folder.
        to: the format.
        out: path of the result; default: in RUN/export.
        model: the student's network, where it is a module of your own that the run's recipe does not build: a class,
            a function that returns it, or a module, as FILE.py:NAME or MODULE:NAME.
        best: use the weights of the best epoch instead of the last (not for folders).
        comparison: for a folder: the comparison whose table the card shows; default: the one that the run is in.
        push: for a folder: upload it to this repository of the Hugging Face Hub.
        private: of a new repository.
    """
    from tempering.export import FORMATS, hub_folder, load_student, push_to_hub, read_config
    from tempering.export.load import example_inputs

    net = None if model is None else _own(model)
    if to in FORMATS:
        if push or comparison:
            raise ValueError("--push and --comparison are for --to hub-folder, int8 and int4.")
        name, convert = FORMATS[to]
        path = out or run / "export" / name
        checked = convert(load_student(run, model=net, best=best), example_inputs(read_config(run), 3), path)
        print(f"wrote {path}: {checked}")
        return
    if best:
        raise ValueError("a folder has the last weights, whose scores its card shows. Omit --best.")
    quantized = _quantized(run, net, to) if to in ("int8", "int4") else None
    default = run / "export" / ("hub" if quantized is None else to)
    folder = hub_folder(run, out or default, model=net, comparison=comparison, quantized=quantized)
    print(f"wrote {folder}")
    if push is not None:
        print(f"uploaded to {push_to_hub(folder, push, private=private)}")


def _own(path: str) -> nn.Module:
    """Return the network that a class, a function or a module of the user's own is."""
    from torch import nn

    from tempering.experiments.recipe import load_object

    found = load_object(path, "a network", "net.py:Net")
    net = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(net, nn.Module):
        raise ValueError(f"{path} gives {type(net).__name__}, and a torch.nn.Module is needed.")
    return net


def _quantized(run: Path, net: nn.Module | None, to: Bits) -> dict[str, object]:
    """Score the student before and after, on the test data of the recipe that the run was started with; print both."""
    from tempering.export import compare_quantized, load_student
    from tempering.export.card import quantized_table
    from tempering.export.load import experiment_of
    from tempering.tasks import Classification

    experiment = experiment_of(run)
    batches = next((b for name in ("test", "validation") if (b := experiment.splits[name]) is not None), None)
    if batches is None:
        raise ValueError(f"{to} is scored on test data, and the recipe of {run} has none.")
    found = compare_quantized(load_student(run, model=net), batches, experiment.task or Classification(), to)
    print("\n".join(quantized_table(found)))
    return found
