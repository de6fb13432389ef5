"""Write a student as a folder for the Hugging Face Hub, in its own library's format, and upload it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tempering.export.card import model_card
from tempering.export.load import HUB_CONFIG, HUB_WEIGHTS, load_student, read_config
from tempering.export.quantization import quantize, save_quantized
from tempering.models.external import Logits
from tempering.training.checkpoint import save_weights
from tempering.training.pretrained import CONFIG, METADATA, TOKENIZER, timm_arguments
from tempering.utils.files import PARTIAL, read_verified, write_atomic


def hub_folder(
    run: str | Path,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    comparison: str | Path | None = None,
    quantized: Mapping[str, Any] | None = None,
) -> Path:
    """Write config.json, model.safetensors and README.md, the model card; return the folder.

    Models of transformers have the format of ``from_pretrained``, with the tokenizer of the run, and models of timm
    that of ``timm.create_model("local-dir:FOLDER", pretrained=True)``. ``tempering.load_student`` reads all.

    Args:
        run: the run's folder.
        out: the new folder; one that exists is replaced if it was written by this function.
        model: as in ``load_student``.
        comparison: folder of the comparison that the run is part of; default: the one that it lies in.
        quantized: what ``compare_quantized`` returns: the weights are saved as int8 or int4, which ``load_student``
            alone reads, and the card shows what that changes.

    Raises:
        FileExistsError: for a folder with other contents.
    """
    run, out = Path(run), Path(out)
    if out.exists() and not (out / HUB_CONFIG).is_file():
        raise FileExistsError(f"{out} exists and is not an exported student. Choose another --out.")
    to = (quantized or {}).get("to")
    net, config = load_student(run, model=model), read_config(run) | ({"quantized": to} if to else {})
    part = out.with_name(out.name + PARTIAL)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_atomic(part / HUB_CONFIG, json.dumps(config, indent=1))
    library = _save(net, config, part)
    if (run / TOKENIZER).is_dir():
        shutil.copytree(run / TOKENIZER, part, dirs_exist_ok=True)
    cost = (read_verified(run / "facts.json").get("result") or {}).get("cost") or {}
    table = _comparison(run, comparison)
    card = model_card(config, library=library, cost=cost, comparison=table, quantized=quantized)
    write_atomic(part / "README.md", card)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return out


def push_to_hub(
    folder: str | Path, repo: str, *, private: bool = False, token: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a folder of ``hub_folder`` to the Hub, and return its address.

    Args:
        folder: the folder.
        repo: "user/name"; created if it does not exist.
        private: of a new repository.
        token: default: the one of `hf auth login`.
        endpoint: of another hub.

    Raises:
        ImportError: without huggingface_hub.
        FileNotFoundError: for another folder.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError('push_to_hub needs huggingface_hub: pip install "tempering[export]"') from error
    folder = Path(folder)
    if not (folder / HUB_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not an exported student; tempering export RUN writes one.")
    api = HfApi(endpoint=endpoint, token=token)
    url = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add the distilled student")
    return str(url)


def _save(net: nn.Module, config: Mapping[str, Any], folder: Path) -> str:
    """Write weights and config in the format of the network's library, and return its name."""
    metadata = {METADATA: json.dumps(config, sort_keys=True)}
    if to := config.get("quantized"):
        save_quantized(quantize(net, to), folder / HUB_WEIGHTS, to, metadata)
        return "tempering"
    model: Any = net.model if isinstance(net, Logits) else net
    if callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained(str(folder))
        return "transformers"
    if hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf  # pyright: ignore

        normalization = {name: config[name] for name in ("mean", "std") if config.get(name)}
        inputs = config.get("inputs") or {}
        size = {"input_size": inputs["shape"]} if "shape" in inputs else {}
        own = {**dict(model.pretrained_cfg), **normalization, **size}
        arguments = {key: value for key, value in timm_arguments(model).items() if key == "img_size"}
        settings = {"num_classes": model.num_classes, "pretrained_cfg": own, "model_args": arguments}
        save_for_hf(model, folder, settings, safe_serialization=True)
        return "timm"
    write_atomic(folder / CONFIG, json.dumps(config, indent=1))
    save_weights(folder / HUB_WEIGHTS, model.state_dict(), metadata)
    return "tempering"


def _comparison(run: Path, folder: str | Path | None) -> str | None:
    """Return the table of the comparison that the run is part of; None without one."""
    run = run.resolve()
    candidates = [Path(folder)] if folder is not None else [run.parent, run.parent.parent]
    table = next((f / "table.md" for f in candidates if (f / "table.md").is_file()), None)
    if table is None and folder is not None:
        raise FileNotFoundError(f"{folder} has no table.md: tempering compare report {folder} writes one.")
    return None if table is None else table.read_text(encoding="utf-8")
