"""The student taken away: its config, loading, export to other formats, and what it costs."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tempering as kd
from tempering.cli.main import main
from tempering.experiments.compare.plan import Cell, Plan, record_of, work_of
from tempering.experiments.compare.status import damaged
from tempering.models import rebuild
from tempering.reports.compare import compare
from tempering.reports.records import load_run, pack, write_cell
from tempering.reports.table import markdown
from tempering.training.pretrained import describe
from tests.cases import each
from tests.test_cli import TINY


def train(folder: Path, student: nn.Module, **options: Any) -> kd.Run:
    """One step of a student of 8 x 8 images."""
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
    data = kd.data.Batches(images, torch.arange(64) % 4, mean=(0.5,), std=(0.25,), batch_size=32, name="tiles", seed=0)
    common = {"steps": 1, "quiet": True, "selfcheck": False, "test": data, "out": folder}
    common |= {"teacher": None, "method": kd.methods.Supervised()}
    return kd.distill(student, batches=data, **common | options)


def small() -> nn.Module:
    return kd.models.build("digits_small", classes=4, channels=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, small())
    return folder


def test_a_student_describes_itself_and_what_it_costs(run: Path) -> None:
    from safetensors import safe_open

    config = json.loads((run / "config.json").read_text())
    with safe_open(run / "student.safetensors", framework="pt") as file:
        found = json.loads(file.metadata()["tempering"])
    assert found == config | {"scores": {"last": config["scores"]["last"]}}
    assert config["network"] == {"kind": "build", "name": "digits_small", "classes": 4, "channels": 1}
    assert config["inputs"] == {"shape": [1, 8, 8], "dtype": "float32"}
    assert (config["mean"], config["std"], config["classes"]) == ([0.5], [0.25], 4)
    facts = json.loads((run / "facts.json").read_text())
    assert config["scores"]["last"] == facts["result"]["last"]
    cost, net = facts["result"]["cost"]["student"], small()
    assert cost["parameters"] == sum(p.numel() for p in net.parameters()) and cost["latency_ms"] > 0
    # two 3 x 3 convolutions, on 8 x 8 and at stride 2 on 4 x 4 pixels, and the head
    assert cost["flops"] == 2 * (64 * 9 * 4 + 16 * 9 * 4 * 8 + 8 * 4)


def test_a_report_says_what_both_models_cost(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    teacher = kd.models.build("digits_large", classes=4, channels=1)
    train(tmp_path, small(), teacher=teacher, method=kd.methods.KD())
    said = markdown(compare([load_run(tmp_path)]))
    sizes = [sum(p.numel() for p in net.parameters()) for net in (small(), teacher)]
    assert f"Cost of one sample, on the machine of the run: student {sizes[0]} parameters, " in said
    assert f"; teacher {sizes[1]:,} parameters, " in said and " MFLOP, " in said


def test_load_student_gives_the_trained_net_in_eval_mode(run: Path, tmp_path: Path) -> None:
    student = small()
    done = train(tmp_path / "a", student).student.eval()
    x = torch.randn(3, 1, 8, 8)
    for source in (tmp_path / "a", tmp_path / "a" / "student.safetensors"):
        net = kd.load_student(source)
        assert not net.training and torch.equal(net(x), done(x))
    assert torch.equal(kd.load_student(tmp_path / "a", model=small())(x), done(x))
    with pytest.raises(FileNotFoundError, match="no description of a student in"):
        kd.load_student(tmp_path)


def test_damaged_files_of_a_student_are_named(run: Path, tmp_path: Path) -> None:
    """By load_student, and by the comparison whose run they are of."""
    cell = Cell("kd-s0-1", "KD", "kd", None, 0)
    plan = Plan("tiny", {}, None, (cell,))
    work = work_of(tmp_path, cell)
    shutil.copytree(run, work)
    write_cell(record_of(tmp_path, cell), pack(work))
    assert {"student.safetensors", "config.json"} <= json.loads((work / "facts.json").read_text())["files"].keys()
    assert damaged(tmp_path, plan) == []
    config, weights = work / "config.json", work / "student.safetensors"
    config.write_text(config.read_text().replace('"classes": 4', '"classes": 5', 1))
    with pytest.raises(ValueError, match=r"config.json is not as it was written: '\w+' differs from the metadata"):
        kd.load_student(work)
    content = bytearray(weights.read_bytes())
    content[-3] ^= 8
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"student.safetensors is damaged"):
        kd.load_student(work, model=small())
    config_text, weights_text = damaged(tmp_path, plan)
    assert config_text.startswith(f"{config} is not as it was written, though its run is recorded")
    assert weights_text.startswith(f"{weights} is not as it was written") and f"remove {work} and" in weights_text
    weights.unlink()
    assert damaged(tmp_path, plan)[1].startswith(f"{weights} is missing")
    shutil.rmtree(work)  # as in a grid that was copied without it
    assert damaged(tmp_path, plan) == []


def test_a_module_of_the_users_own_is_asked_for_by_name(tmp_path: Path) -> None:
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    train(tmp_path / "run", own)
    with pytest.raises(ValueError, match=r"does not describe, .*load_student\(.*, model=net\)"):
        kd.load_student(tmp_path / "run")
    x, fresh = torch.randn(3, 1, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    assert torch.equal(kd.load_student(tmp_path / "run", model=fresh)(x), own.eval()(x))


def described_nets() -> dict[str, nn.Module]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=3, **sizes))
    return {
        "attention": kd.models.build("vam8:resnet8", classes=4),
        "normalized": kd.models.Normalized(kd.models.build("resnet8", classes=4), mean=(0.5,) * 3, std=(0.2,) * 3),
        "transformers": bert,
    }


def test_networks_are_built_again_from_their_description() -> None:
    pytest.importorskip("transformers")
    for name, net in described_nets().items():
        spec = describe(net)
        again = rebuild(json.loads(json.dumps(spec)))
        assert type(again) is type(net) and describe(again) == spec, name
        assert [x.shape for x in again.state_dict().values()] == [x.shape for x in net.state_dict().values()], name
    assert describe(nn.Linear(2, 2)) is None
    with pytest.raises(ValueError, match="has no model class 'Trainer'"):
        rebuild({"kind": "transformers", "class": "Trainer", "config": {}})


# other formats


@each("to", ["torch-export", "onnx", "executorch"])
def test_a_converted_student_gives_the_same_logits_on_a_real_batch(
    to: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in {"onnx": ("onnxscript", "onnxruntime"), "executorch": ("executorch.runtime",)}.get(to, ()):
        pytest.importorskip(name)
    assert main(["export", str(run), "--to", to, "--out", str(tmp_path / "x.pt2")]) == 0
    assert f"wrote {tmp_path / 'x.pt2'}: equals the student within " in capsys.readouterr().out
    batch = (torch.randint(0, 256, (3 if to == "executorch" else 5, 1, 8, 8)) / 255 - 0.5) / 0.25
    wanted = kd.load_student(run)(batch)
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "x.pt2"))
        found = torch.from_numpy(session.run(None, {"input": batch.numpy()})[0])
    elif to == "executorch":
        from executorch.runtime import Runtime

        found = Runtime.get().load_program(tmp_path / "x.pt2").load_method("forward").execute((batch,))[0]
    else:
        found = torch.export.load(tmp_path / "x.pt2").module()(batch)
    assert float((found - wanted).detach().abs().max()) <= 1e-5


def test_an_export_that_differs_from_the_student_is_not_kept(tmp_path: Path) -> None:
    class Drawn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(ValueError, match="differs from the student by"):
        kd.export.to_torch_export(Drawn(), torch.zeros(3, 2), tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named_with_what_to_install(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("executorch") is not None:
        pytest.skip("executorch is installed")
    assert main(["export", str(run), "--to", "executorch"]) == 1
    assert "needs executorch, which cannot be imported" in (said := capsys.readouterr().err)
    assert 'pip install "executorch"' in said


def test_named_inputs_are_exported_too(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    inputs = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), "attention_mask": torch.ones(3, 3).long()}
    net = described_nets()["transformers"].eval()
    assert kd.export.to_torch_export(net, inputs, tmp_path / "x.pt2").startswith("equals the student")
    found = torch.export.load(tmp_path / "x.pt2").module()(*(x[:2, :2] for x in inputs.values()))
    wanted = net(**{name: x[:2, :2] for name, x in inputs.items()}).logits
    assert float((found - wanted).detach().abs().max()) <= 1e-5


# int8 and int4


@each("to", ["int8", "int4"])
def test_quantized_weights_are_as_near_as_documented_and_are_read_back(to: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 33), nn.BatchNorm1d(33), nn.Linear(33, 5))

    torch.manual_seed(0)
    net, file = build().eval().requires_grad_(False), tmp_path / "q.safetensors"
    quantized = kd.export.quantize(net, to)
    for own, small in ((net[0], quantized[0]), (net[2], quantized[2])):
        groups = own.weight.view(-1, 32 if to == "int4" and own.in_features == 64 else own.in_features)
        weight, x = small.weight.dequantize(), torch.randn(7, own.in_features)
        off = (weight.view_as(groups) - groups).abs() / groups.abs().amax(1, keepdim=True)
        assert 0 < float(off.max()) <= {"int8": 1 / 254, "int4": 1 / 15}[to] + 1e-6
        torch.testing.assert_close(small(x), nn.functional.linear(x, weight, own.bias))
    kd.export.save_quantized(quantized, file, to)
    again, x = kd.export.load_quantized(build(), file, to), torch.randn(7, 64)
    assert torch.equal(again(x), quantized(x)) and not again.training
    assert file.stat().st_size < {"int8": 1.9, "int4": 1.3}[to] * (64 * 33 + 33 * 5) + 2000
    with pytest.raises(ValueError, match=f"does not hold the weights of this Linear in {to}: 0.bias differs"):
        kd.export.load_quantized(nn.Linear(64, 33), file, to)


def test_only_int8_and_int4_of_linear_layers_exist() -> None:
    with pytest.raises(ValueError, match="to int8 or int4; got 'int2'"):
        kd.export.quantize(nn.Linear(2, 2), "int2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="int8 is for linear layers, and this Conv2d has none"):
        kd.export.quantize(nn.Conv2d(3, 3, 3))


@each("to", ["int8", "int4"])
def test_a_quantized_student_is_exported_with_what_it_costs(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao")
    (tmp_path / "tiny.py").write_text(TINY)
    argv = [
        "run",
        str(tmp_path / "tiny.py"),
        "--method=kd",
        "--epochs=1",
        "--no-selfcheck",
        f"--out={tmp_path / 'run'}",
    ]
    monkeypatch.setattr("sys.argv", ["tempering", *argv])
    assert main([*argv, "--quiet"]) == 0
    own = tmp_path / "net.py"
    own.write_text("from torch import nn\n\n\ndef net():\n    return nn.Linear(6, 3)\n")
    assert main(["export", str(tmp_path / "run"), "--to", to, "--model", f"{own}:net"]) == 0
    folder = tmp_path / "run" / "export" / to
    said, card = capsys.readouterr().out, (folder / "README.md").read_text()
    for line in (
        "| before | accuracy ",
        "| after | accuracy ",
        f"% of the parameters, those of linear layers, are {to}.",
    ):
        assert line in said and line in card
    plain, x = kd.load_student(tmp_path / "run"), torch.randn(9, 6)
    wanted = kd.export.quantize(plain, to)(x)  # pyright: ignore[reportArgumentType]
    assert not torch.equal(wanted, plain(x))
    for source in (folder, folder / "model.safetensors"):
        assert torch.equal(kd.load_student(source, model=nn.Linear(6, 3))(x), wanted)
    with pytest.raises(ValueError, match="model=net"):
        kd.load_student(folder)


# modules of the user's own


def test_a_net_of_the_users_own_is_exported_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    train(tmp_path / "run", own)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\nnumber = 3\n\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))\n"
    )
    argv = ["export", str(tmp_path / "run"), "--to", "torch-export"]
    assert main(argv) == 1 and "--model net.py:Net" in capsys.readouterr().err
    assert main([*argv, "--model", f"{tmp_path / 'net.py'}:net"]) == 0
    x = torch.randn(5, 1, 8, 8)
    found = torch.export.load(tmp_path / "run/export/student.pt2").module()(x)
    assert float((found - own.eval()(x)).detach().abs().max()) <= 1e-5
    for model, said in {
        "net.py": "is given as MODULE:NAME or FILE.py:NAME",
        "nte.py:net": "there is no file nte.py",
        f"{tmp_path / 'net.py'}:nett": "Functions and classes there: net",
        f"{tmp_path / 'net.py'}:number": "gives int, and a torch.nn.Module is needed",
    }.items():
        assert main([*argv, "--model", model]) == 1
        assert said in capsys.readouterr().err


# folders for the Hub


def test_a_hub_folder_is_read_back_and_has_a_card(run: Path, tmp_path: Path) -> None:
    (run.parent / "table.md").write_text("| method | vs KD |\n")
    out = kd.export.hub_folder(run, tmp_path / "hub")
    assert {x.name for x in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "tempering.json"}
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(kd.load_student(out)(x), kd.load_student(run)(x))
    card = (out / "README.md").read_text()
    for said in ("library_name: tempering", "| method | vs KD |", "| student | 3", "test | accuracy |"):
        assert said in card
    with pytest.raises(FileExistsError, match="is not an exported student"):
        kd.export.hub_folder(run, tmp_path)


def test_a_model_of_transformers_is_saved_in_its_own_format(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=4,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    train(tmp_path / "run", transformers.ViTForImageClassification(config))
    out = kd.export.hub_folder(tmp_path / "run", tmp_path / "hub")
    net, x = transformers.ViTForImageClassification.from_pretrained(out), torch.randn(3, 1, 8, 8)
    assert torch.equal(net(x).logits, kd.load_student(tmp_path / "run")(x).logits)
    assert torch.equal(net(x).logits, kd.load_student(out)(x).logits)


def test_a_folder_is_uploaded_to_the_hub(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    out = kd.export.hub_folder(run, tmp_path / "hub")
    with fake_hub() as (endpoint, requests):
        kd.export.push_to_hub(out, "user/student", token="hf_none", endpoint=endpoint)
    committed = [json.loads(line) for line in requests["/api/models/user/student/commit/main"].splitlines()]
    files = {line["value"]["path"] for line in committed if line["key"] == "file"}
    assert files == {"README.md", "config.json", "model.safetensors", "tempering.json"}
    with pytest.raises(FileNotFoundError, match="is not an exported student"):
        kd.export.push_to_hub(run, "user/student", endpoint=endpoint)


@contextmanager
def fake_hub(most: int = 12) -> Iterator[tuple[str, dict[str, str]]]:
    """A hub on this machine that answers at most ``most`` requests; yields its address, and path -> last body."""
    requests: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"id": "user/student", "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            path = self.path.partition("?")[0]
            requests[path] = body
            answers: dict[str, Any] = {"/api/repos/create": {"url": f"{endpoint}/user/student", "name": "user/student"}}
            if path.endswith("/preupload/main"):
                files = [f["path"] for f in json.loads(body)["files"]]
                answers[path] = {"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            url = f"{endpoint}/user/student/commit/1"
            self.answer(answers.get(path, {"commitUrl": url, "commitOid": "1" * 40, "success": True}))

        def answer(self, content: object) -> None:
            nonlocal most
            most -= 1
            data = json.dumps(content).encode()
            self.send_response(200 if most >= 0 else 500)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint, requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
