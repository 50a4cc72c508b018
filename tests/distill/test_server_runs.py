"""``rkl distill --teacher http://...``: a whole run from a server, and one that it is lost in."""

import dataclasses

import material
import pytest
from serving import Stub

from rkl import cli
from rkl.distill import evaluate_run, load_model, load_tokenizer
from rkl.distill.client import KEY, ServerError
from rkl.distill.evaluate import EvaluateSettings
from rkl.distill.plan import dry_run
from rkl.distill.run import distill
from rkl.distill.settings import DistillSettings
from rkl.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore:teacher gives the")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("rkl.distill.client.sleep", lambda seconds: None)
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("server")
    material.write(path)
    return path


@pytest.fixture
def served(folder):
    teacher = str(folder / "teacher")
    return Stub(load_model(teacher).eval(), load_tokenizer(teacher), "vllm")


def settings(folder, url, **changes) -> DistillSettings:
    how = {"divergence": "kl", "loss_top_k": 300} | changes
    return dataclasses.replace(material.settings(folder, divergence="kl"), teacher=url, **how)


def test_a_run_from_a_server_is_the_run_from_its_model(
    folder, served, tmp_path, capfd, monkeypatch
):
    key = "sk-verysecret"
    served.key = key
    monkeypatch.setenv(KEY, key)
    here = distill(material.settings(folder, divergence="kl"), tmp_path / "here")
    with served.listening() as url:
        reference = str(folder / "teacher")
        said = distill(settings(folder, url, teacher_reference=reference), tmp_path / "there")
    assert said.result["held_out_loss"] == pytest.approx(here.result["held_out_loss"], rel=1e-4)
    run = Run.open(tmp_path / "there")
    assert run.settings["teacher"] == url
    assert "teacher" not in run.record["inputs"]
    assert any("captured_mass" in row for row in run.metrics)
    told = "".join(capfd.readouterr())
    assert "log-probabilities differ from those of the model here by" in told
    written = [it.read_bytes() for it in (tmp_path / "there").rglob("*") if it.is_file()]
    assert not any(key.encode() in it for it in written)
    assert key not in told
    other = tmp_path / "other.txt"
    other.write_text("Something that nobody has read. " * 20, encoding="utf-8")
    with pytest.raises(ValueError, match="a server that gives part of each distribution"):
        evaluate_run(tmp_path / "there", EvaluateSettings(data=str(other)))


def test_a_server_lost_in_mid_run_saves_and_says_how_to_go_on(folder, served, tmp_path):
    out = tmp_path / "run"
    with served.listening() as url:
        chosen = settings(folder, url, loss_top_k=40, held_out=0.0, save_every=100)
        served.refuse = lambda number: (503, "going down") if number > 3 else None
        with pytest.raises(ServerError, match=r"of step 2 of 4 is saved; .* rkl distill --out "):
            distill(chosen, out)
        assert (out / "checkpoints" / "checkpoint-2").is_dir()
        served.refuse = lambda number: None
        assert distill(chosen, out, resume=True).result["steps"] == 4


def test_a_dry_run_asks_the_server_and_describes_it(folder, served):
    with served.listening() as url:
        lines = dry_run(settings(folder, url, loss_top_k=40)).lines
    assert lines["teacher"] == f"tiny at {url}, 40 of 300 tokens a place"


def test_the_command_line_takes_an_address(folder, served, tmp_path, capsys):
    with served.listening() as url:
        flags = ["--teacher", url, "--student", str(folder / "student"), "--max-steps", "1"]
        flags += ["--data", str(folder / "text.txt"), "--max-length", "16", "--device", "cpu"]
        flags += ["--out", str(tmp_path / "run"), "--held-out", "0", "--batch-size", "2"]
        assert cli.main(["distill", *flags, "--loss-top-k", "30"]) != 0
        assert "divergence: akl(mu=0.5) on a teacher on a server" in capsys.readouterr().err
        assert cli.main(["distill", *flags, "--loss-top-k", "64", "--divergence", "kl"]) == 0
    assert served.asked[-1][2]["prompt_logprobs"] == 64


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"divergence": "reverse-kl"}, "divergence: reverse-kl on a teacher on a server"),
        ({"student": None, "drop_layers": "1"}, "student must be given where the teacher is on"),
        ({"cache_teacher": True}, "cache_teacher keeps hidden states"),
        ({"temperature": 2.0}, "temperature must be 1 for a teacher on a server"),
        ({"loss_top_k": 0}, "loss_top_k must be at least 1"),
        ({"teacher_timeout": 0.0}, "teacher_timeout must lie in"),
    ],
)
def test_what_a_server_cannot_do_is_refused_before_it_is_asked(folder, changes, named):
    with pytest.raises(ValueError, match=named):
        settings(folder, "http://127.0.0.1:9/v1", **changes)


@pytest.mark.parametrize("name", ["loss_top_k", "teacher_reference"])
def test_settings_of_a_server_are_refused_without_one(folder, name):
    with pytest.raises(ValueError, match=f"{name} is for a teacher on a server"):
        material.settings(folder, **{name: 5})
