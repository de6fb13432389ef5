"""Loggers: what trackers get, without secrets; a logger that fails is named, and ends no run."""

from __future__ import annotations

import json
import sqlite3
import warnings
from pathlib import Path
from typing import Any

import pytest

from tempering.training.loggers import LOGGERS, flat
from tests.runs import cut, go, points, stop_at

SECRET = "hf_abcdefghijklmnop"


def recorded(*, fails: str = "", at: int = 0) -> Any:
    """A logger that keeps what it gets, and fails where it is told to."""
    from lightning_fabric.loggers.logger import Logger  # not at collection: it imports torchmetrics

    class Recorded(Logger):
        def __init__(self) -> None:
            self.fails, self.at = fails, at
            self.metrics: list[tuple[int | None, dict[str, float]]] = []
            self.params: dict[str, Any] = {}
            self.status = ""

        name = property(lambda self: "recorded")
        version = property(lambda self: "0")

        def _fail(self, where: str, step: int = 1000) -> None:
            if where == self.fails and step >= self.at:
                raise OSError(f"no route to https://me:{SECRET}@tracker.example")

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self._fail("metrics", step or 0)
            self.metrics.append((step, metrics))

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            self._fail("params")
            self.params = params

        def finalize(self, status: str) -> None:
            self._fail("end")
            self.status = status

    return Recorded()


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


def run(tmp_path: Path, logger: Any, **more: Any) -> Any:
    settings: dict[str, Any] = {"steps": 4, "out": tmp_path / "run", "validation": cut(points(8), 8), **more}
    return go(cut(points(32), 8), loggers=[logger], **settings)


def test_a_logger_gets_scalars_and_the_description_of_the_run_without_secrets(tmp_path: Path) -> None:
    logger = recorded()
    run(
        tmp_path, logger, facts={"label": "KD", "data": {"name": "points", "api_key": SECRET}, "command": ["x", SECRET]}
    )
    assert [step for step, line in logger.metrics if "train/loss" in line] == [1, 2, 3, 4]
    assert any("validation/accuracy" in line for _, line in logger.metrics)
    assert logger.params["label"] == "KD" and logger.params["method.soft"] > 0
    assert logger.params["optimizer.0.lr"] == 0.1 and logger.params["command"] == "x ***"
    assert SECRET not in json.dumps(logger.params), "records redact it as well"
    assert logger.status == "success"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "aborted"), (RuntimeError, "failed")])
def test_logs_of_a_run_that_ends_early_are_completed(tmp_path: Path, error: type[BaseException], status: str) -> None:
    def stop(step: int, loss: Any) -> None:
        if step == 2:
            raise error

    logger = recorded()
    with pytest.raises(error):
        run(tmp_path, logger, on_step=stop)
    assert logger.status == status


@pytest.mark.parametrize(("fails", "where"), [("metrics", "at step 3"), ("end", "at the end")])
def test_a_logger_that_fails_is_named_and_the_run_goes_to_its_end(tmp_path: Path, fails: str, where: str) -> None:
    whole = recorded()
    with pytest.warns(
        UserWarning, match=rf"the logger Recorded failed {where}: OSError: .*The run continues"
    ) as caught:
        go(
            cut(points(32), 8),
            loggers=[recorded(fails=fails, at=3), whole],
            steps=4,
            out=tmp_path / "run",
            validation=cut(points(8), 8),
        )
    assert len(caught) == 1, "it is left out from then on"
    assert SECRET not in str(caught[0].message)
    written = facts(tmp_path / "run")
    assert written["status"] == "done" and where in written["loggers"]["Recorded"]
    assert SECRET not in json.dumps(written)
    assert whole.status == "success", "the others go on"


def test_a_logger_that_cannot_start_ends_the_run_before_training(tmp_path: Path) -> None:
    def trained(step: int, loss: Any) -> None:
        raise AssertionError("it was trained")

    with pytest.raises(
        ConnectionError, match=r"the logger Recorded cannot start: OSError: .* leave it out of loggers="
    ):
        run(tmp_path, recorded(fails="params"), on_step=trained)
    assert facts(tmp_path / "run")["status"] == "failed"


def test_nested_values_are_flattened() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [{"lr": 0.1}, {"lr": 0.2}], "f": ["x", 2], "g": []}
    assert flat(nested) == {"a.b": 1, "a.c.d": None, "e.0.lr": 0.1, "e.1.lr": 0.2, "f": "x 2", "g": ""}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_missing_names_its_extra(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    assert name in LOGGERS
    with pytest.raises(
        ImportError, match=rf"the logger '{name}' is not installed: pip install \"tempering\[{name}\]\""
    ):
        run(tmp_path, name)


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_has_every_step_and_how_the_run_ended(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason='needs pip install "tempering[mlflow]"')
    if store == "sqlite":
        pytest.importorskip("sqlalchemy", reason="mlflow-skinny has no database; mlflow has")
    uri = (tmp_path / "mlruns").as_uri() if store == "file" else f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        run(tmp_path, "mlflow", facts={"label": "KD", "command": ["run", f"--token={SECRET}"]})
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "2", "mlflow", on_step=stop_at(2))
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("tempering")
        ended = {r.info.status: r for r in client.search_runs([experiment.experiment_id])}
        history = client.get_metric_history(ended["FINISHED"].info.run_id, "train/loss")
    assert set(ended) == {"FINISHED", "FAILED"}
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [(m.step, m.value) for m in history] == [(line["step"], pytest.approx(line["loss"])) for line in steps]
    data = ended["FINISHED"].data
    assert data.params["label"] == "KD" and data.params["command"] == "run --token=***"
    assert "validation/accuracy" in data.metrics


def test_trackio_has_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason='needs pip install "tempering[trackio]"')
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    for module in ("trackio.sqlite_storage", "trackio.run"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        run(tmp_path, "trackio", facts={"label": "KD", "command": ["run", f"--token={SECRET}"]})
    with sqlite3.connect(tmp_path / "trackio" / "tempering.db") as base:
        lines = [(step, json.loads(metrics)) for step, metrics in base.execute("select step, metrics from metrics")]
        configs = [json.loads(row[0]) for row in base.execute("select config from configs")]
    assert sorted(step for step, line in lines if "train/loss" in line) == [1, 2, 3, 4]
    assert configs[0]["label"] == "KD" and configs[0]["command"] == "run --token=***"
