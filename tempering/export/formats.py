"""Convert a student to ONNX, torch.export or ExecuTorch; each file is compared with the student before it is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tempering.utils.files import PARTIAL
from tempering.utils.tensors import eval_mode, logits_of, map_tensors

TOLERANCE = 1e-5  # between the student's outputs and those of the file


class Flat(nn.Module):
    """Call a student with positional tensors, and return its logits alone.

    Args:
        net: the student.
        inputs: its inputs, a tensor or name -> tensor.
    """

    def __init__(self, net: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.net, self.names = net, list(inputs) if isinstance(inputs, Mapping) else []
        self.by_keyword = bool(self.names) and hasattr(net, "save_pretrained")  # a model of transformers

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.names, tensors, strict=True)) if self.names else {}
        if self.by_keyword:
            return logits_of(self.net(**named))
        return logits_of(self.net(named if self.names else tensors[0]))


def to_torch_export(net: nn.Module, inputs: Any, path: str | Path) -> str:
    """Write a .pt2 file, ``torch.export.load(path).module()``, with a batch of any size.

    Args:
        net: the student.
        inputs: a batch of at least 2 samples, a tensor or name -> tensor.
        path: of the file.

    Returns:
        What was checked.

    Raises:
        ValueError: if the file's outputs differ from the student's by more than 1e-5, or for another suffix.
    """

    if Path(path).suffix != ".pt2":
        raise ValueError(f"torch.export.load reads files whose names end in .pt2; got {path}.")

    def write(flat: Flat, tensors: tuple[Tensor, ...], part: Path) -> None:
        torch.export.save(_program(flat, tensors), part)

    def run(part: Path, tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.export.load(part).module()(*tensors)

    return _convert(net, inputs, Path(path), write, run)


def to_onnx(net: nn.Module, inputs: Any, path: str | Path) -> str:
    """Write an ONNX file; as ``to_torch_export``. It is compared with the student if onnxruntime is installed.

    Raises:
        ImportError: without onnxscript.
    """
    _require("onnxscript", "tempering[export]")

    def write(flat: Flat, tensors: tuple[Tensor, ...], part: Path) -> None:
        names = flat.names or ["input"]
        program = torch.onnx.export(
            _program(flat, tensors), input_names=names, output_names=["logits"], dynamo=True, verbose=False
        )
        assert program is not None
        program.save(str(part), external_data=False)

    def run(part: Path, tensors: tuple[Tensor, ...]) -> Tensor | None:
        try:
            import onnxruntime  # pyright: ignore
        except ImportError:
            return None
        session = onnxruntime.InferenceSession(part.read_bytes(), providers=["CPUExecutionProvider"])
        given = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), tensors, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return _convert(net, inputs, Path(path), write, run)


def to_executorch(net: nn.Module, inputs: Any, path: str | Path) -> str:
    """Write a .pte file for ExecuTorch, with the batch size of ``inputs``; it is compared with the student.

    Raises:
        ImportError: without executorch.
    """
    to_edge = _require("executorch.exir", "executorch").to_edge

    def write(flat: Flat, tensors: tuple[Tensor, ...], part: Path) -> None:
        part.write_bytes(to_edge(torch.export.export(flat, tensors)).to_executorch().buffer)

    def run(part: Path, tensors: tuple[Tensor, ...]) -> Tensor | None:
        from executorch.runtime import Runtime  # pyright: ignore

        method = Runtime.get().load_program(part.read_bytes()).load_method("forward")
        fits = tuple(tensors[0].shape) == tuple(method.metadata.input_tensor_meta(0).sizes())
        return method.execute(tensors)[0] if fits else None

    return _convert(net, inputs, Path(path), write, run)


FORMATS: dict[str, tuple[str, Callable[[nn.Module, Any, str | Path], str]]] = {
    "onnx": ("student.onnx", to_onnx),
    "torch-export": ("student.pt2", to_torch_export),
    "executorch": ("student.pte", to_executorch),
}


def _require(module: str, install: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        message = f'this format needs {name}, which cannot be imported ({error}): pip install "{install}"'
        raise ImportError(message) from error


def _program(flat: Flat, tensors: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Export with a batch of any size; tokens may have any length as well."""
    auto = torch.export.Dim.AUTO
    shapes = tuple({0: auto} if x.is_floating_point() else dict.fromkeys(range(x.ndim), auto) for x in tensors)
    return torch.export.export(flat, tensors, dynamic_shapes=(shapes,))


def _convert(
    net: nn.Module,
    inputs: Any,
    path: Path,
    write: Callable[[Flat, tuple[Tensor, ...], Path], None],
    run: Callable[[Path, tuple[Tensor, ...]], Tensor | None],
) -> str:
    """Write a file beside the path, compare it with the student on these inputs and all but one, and rename it."""
    flat = Flat(net, inputs).eval()
    tensors = tuple(inputs.values()) if isinstance(inputs, Mapping) else (inputs,)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{PARTIAL[1:]}-{path.name}")  # torch.export.save wants its suffix
    try:
        with eval_mode(net), torch.no_grad():
            with warnings.catch_warnings():  # the exporters warn of their own parts
                warnings.simplefilter("ignore")
                write(flat, tensors, part)
            worst = None
            for given in (tensors, map_tensors(tensors, lambda x: x[:-1])):
                result = run(part, given)
                if result is None:
                    break
                worst = max(worst or 0.0, float((result - flat(*given)).abs().max()))
        if worst is not None and not worst <= TOLERANCE:
            raise ValueError(f"{path.name} differs from the student by {worst:.1e} on these inputs; it is not kept.")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return "not compared with the student" if worst is None else f"equals the student within {worst:.1e}"
