"""launch/checkpoint.py: inspect, verify, export."""

import json

import pytest

from fvae_dist.cli import main
from tests.recipes import make_checkpoint


@pytest.fixture
def command(capsys):
    def command(*arguments, code=0):
        assert main(["checkpoint", *map(str, arguments)]) == code
        captured = capsys.readouterr()
        assert captured.err.count("\n") == (1 if code else 0)
        return captured.err if code else captured.out

    return command


def damage(folder):
    (folder / "trainer_state.json").write_text("{}")


def test_verify(command, tmp_path):
    first, second = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    assert command("verify", tmp_path) == f"{first}: whole\n{second}: whole\n"
    assert command("verify", second) == f"{second}: whole\n"
    damage(second)
    line = command("verify", tmp_path, code=2)
    assert line.startswith(f"error: {second}: trainer_state.json has ") and str(first) not in line


def test_inspect(command, tmp_path):
    make_checkpoint(tmp_path, 5)
    damage(make_checkpoint(tmp_path, 10))
    whole, damaged = json.loads(command("inspect", tmp_path))
    assert (whole["step"], whole["global_batch_size"], whole["last_log"]) == (5, 8, {"step": 5, "loss/task": 1.5})
    assert whole["bytes"] > 0 and "trainer_state.json has" in damaged["problem"]


def test_export_takes_the_newest_whole_adapter(command, tmp_path):
    first = make_checkpoint(tmp_path / "run", 5)
    damage(make_checkpoint(tmp_path / "run", 10))
    command("export", tmp_path / "run", "--out", tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (first / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["verify", "nowhere"], "error: nowhere: no such folder"),
        (["verify", "."], "error: .: holds no checkpoint-N"),
        (["export", "."], "error: --out goes with export"),
        (["verify", ".", "--out", "x"], "error: --out goes with export"),
        (["look", "."], "error: argument action: invalid choice"),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments, code=2).startswith(line)
