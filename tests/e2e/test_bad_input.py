"""Bad input through the command: exit code 2 and one line that names file, line or key, before anything heavy."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from fvae_dist.cli import main, train_command
from fvae_dist.training.control import lock_output_dir
from fvae_dist.training.process_group import free_port
from tests.recipes import make_checkpoint, make_model_folder, recipe_values, write_recipe, write_records

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 180


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def values(tmp_path, model, monkeypatch) -> dict:
    """A recipe that can be run, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    write_records(tmp_path / "data.jsonl")
    return recipe_values(tmp_path, model)


@pytest.fixture
def refused(values, capsys, monkeypatch):
    """refused(*arguments, recipe=None): the line that the command prints; it must not get as far as training."""
    monkeypatch.setattr("fvae_dist.training.run.train", lambda prepared: pytest.fail("went on to train"))

    def refused(*arguments: str, recipe: str | bytes | dict | None = None) -> str:
        recipe = values if recipe is None else recipe
        text = yaml.safe_dump(recipe, sort_keys=False) if isinstance(recipe, dict) else recipe
        Path("recipe.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        capsys.readouterr()
        assert train_command(["--config", "recipe.yaml", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("error: ")
        return captured.err.removeprefix("error: ").rstrip("\n")

    return refused


# ------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "recipe.yaml: a recipe is a mapping"),
        ("- a\n- b\n", "recipe.yaml: a recipe is a mapping"),
        ("model:\n\tname_or_path: x\n", "recipe.yaml:2: not valid YAML"),
        ("model: {}\nmodel: {}\n", "recipe.yaml:2: duplicate key model (first on line 1)"),
        ("modle: {}\n", "recipe.yaml:1: modle: unknown key; did you mean model?"),
        ('"a\\nb\\e[2J": 1\n', "recipe.yaml:1: a b"),
        ("model: !!python/object/apply:os.getcwd []\n", "recipe.yaml:1: not valid YAML"),
        (bytes(range(256)), "recipe.yaml: cannot read the recipe: not utf-8"),
        (b"\x7fELF\x02\x00\x00", "recipe.yaml:1: not valid YAML: character"),
    ],
)
def test_what_is_no_recipe(refused, text, line):
    assert refused(recipe=text).startswith(line)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("training.learning_rate=.nan", "--set training.learning_rate: "),
        ("training.per_device_train_batch_size=0", "--set training.per_device_train_batch_size: "),
        (
            "training.gradient_checkpointing_kwargs={use_reentrant: true}",
            "--set training.gradient_checkpointing_kwargs: unknown key; did you mean recompute?",
        ),
        ("evaluation.strategy=epoch", "--set evaluation.strategy: needs data.eval"),
        ("training.use_cpu=false", "training.use_cpu: false, but there is no CUDA device"),
        ("model.attention=flash_attention_2", "model.attention: flash_attention_2 cannot run here: no CUDA device"),
        ("model.name_or_path=nowhere/at/all", "model.name_or_path: there is no folder nowhere/at/all"),
        ("model.name_or_path=.", "model.name_or_path: . holds no config.json"),
        ("model.name_or_path=nobody/nothing", "model.name_or_path: cannot load nobody/nothing: "),
        ("model.tokenizer=nobody/nothing", "model.tokenizer: cannot load a tokenizer from nobody/nothing: "),
        ("data.max_length=513", "data.max_length: 513 is longer than the 512 positions"),
        ("data.train.0.path=nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ("adapter.r=0", "adapter.r: must be an integer > 0, got 0"),
        ("adapter={peft_type: LORA, r: -1}", "adapter.r: must be an integer > 0, got -1"),
        ("adapter.encoder_dropout=2", "adapter.encoder_dropout must lie in [0, 1), got 2"),
        ("adapter.peft_type=LOAR", "adapter.peft_type: unknown type 'LOAR'; did you mean LORA?"),
        ("adapter.rr=1", "adapter.rr: unknown key; did you mean r?"),
        ("adapter.target_modules=[nope]", "adapter.target_modules: 'nope' matches no module"),
        ("training.deepspeed=nowhere.json", "training.deepspeed: nowhere.json: no such file or directory"),
        ("training.deepspeed=.", "training.deepspeed: .: is a directory"),
        ("training.sequence_parallel=2", "training.sequence_parallel: 2: needs training.deepspeed"),
        ("training.output_dir=data.jsonl", "training.output_dir: data.jsonl is a file, not a folder"),
        ("training.output_dir=data.jsonl/run", "training.output_dir: "),
        ("training.output_dir=/proc/nowhere/run", "training.output_dir: cannot make /proc/nowhere/run"),
        ("training.seed", "--set training.seed: write section.key=value"),
    ],
)
def test_bad_settings(refused, setting, line):
    if torch.cuda.is_available() and ("use_cpu" in setting or "flash" in setting):
        pytest.skip("says that there is no CUDA device")
    assert refused("--set", setting).startswith(line)


def test_unwritable_output_dir(refused, tmp_path):
    line = refused("--set", "training.output_dir=/proc/nowhere", "--set", f"data.cache_dir={tmp_path / 'cache'}")
    assert line.startswith("training.output_dir: cannot make /proc/nowhere")


@pytest.mark.parametrize(
    ("contents", "line"),
    [
        ('{"gradient_accumulation_steps": 3}', "ds.json: gradient_accumulation_steps: is 3 here and 1 in the recipe"),
        ('{"optimizer": {}}', "ds.json: optimizer: is stated in the recipe"),
        ('{"zero_optimization": {"stage": 7}}', "ds.json: zero_optimization.stage: "),
        ('{\n"a": 1,\n}', "ds.json:"),
        ('{"a": 1, "a": 1}', "ds.json: duplicate key a"),
    ],
)
def test_bad_deepspeed_file(refused, contents, line):
    Path("ds.json").write_text(contents)
    assert refused("--set", "training.deepspeed=ds.json").startswith(line)


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ('{"instruction": "a"}', 'data.jsonl:4: missing column "output"'),
        ("{", "data.jsonl:4: broken JSON"),
        ('{"instruction": "a", "output": 5}', 'data.jsonl:4: column "output" must be text'),
    ],
)
def test_bad_record(refused, record, line):
    with open("data.jsonl", "a") as file:
        file.write(record + "\n")
    assert line in refused()


def test_tokenizer_larger_than_the_vocabulary(refused, tmp_path, values):
    values["model"]["name_or_path"] = str(make_model_folder(tmp_path / "small", vocab_size=200))
    assert refused().startswith("model.tokenizer: 259 tokens do not fit the vocabulary of 200")


def test_broken_model_config(refused, tmp_path, values):
    folder = make_model_folder(tmp_path / "broken")
    values["model"]["name_or_path"] = str(folder)
    for contents in ("{", "[]", '{"model_type": "llama", "hidden_size": "x"}'):
        (folder / "config.json").write_text(contents)
        assert refused().startswith("model.name_or_path: cannot ")


# ---------------------------------------------------------------------------------------------- arguments, checkpoints


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "error: --config is required"),
        (["--config"], "error: argument --config: expected one argument"),
        (["--confg", "x"], "error: unrecognized arguments: --confg x"),
        (["--config", "nowhere.yaml"], "error: nowhere.yaml: cannot read the recipe: no such file"),
        (["--config", "."], "error: .: cannot read the recipe: is a directory"),
        (["--config", "x", "--devices", "0", "--dry-run"], "error: --devices is a number > 0"),
        (["--config", "x", "--devices", "two"], "error: argument --devices: invalid int value: 'two'"),
        (["--config", "x", "--devices", "2"], "error: --devices is a number > 0 and goes with --dry-run"),
    ],
)
def test_bad_arguments_are_one_line(capsys, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    if line.startswith("error: unrecog"):
        arguments = ["--config", "x", *arguments]
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_earlier_run_is_refused_and_kept(refused, values):
    output = Path(values["training"]["output_dir"])
    make_checkpoint(output, 5)
    before = sorted(output.rglob("*"))
    assert "holds checkpoint-5 of an earlier run; go on with --resume auto" in refused()
    assert sorted(output.rglob("*")) == before


def test_resume_from_a_damaged_checkpoint_is_refused(refused, values):
    folder = make_checkpoint(Path(values["training"]["output_dir"]), 5)
    (folder / "trainer_state.json").unlink()
    assert refused("--resume", str(folder)).endswith("not a whole checkpoint: trainer_state.json is missing")
    assert refused("--resume", "nowhere") == "--resume nowhere: not a whole checkpoint: no such folder"


def test_folder_in_use_by_another_run_is_refused(refused, values):
    output = Path(values["training"]["output_dir"])
    with lock_output_dir(output):
        line = refused()
    assert line.startswith(f"training.output_dir: {output} is in use by process {os.getpid()} on ")


def test_resume_auto_takes_the_newest_complete_checkpoint(values, monkeypatch):
    output = Path(values["training"]["output_dir"])
    for step in (5, 10, 15):
        make_checkpoint(output, step)
    (output / "checkpoint-15" / "adapter_model.safetensors").unlink()
    seen = []
    monkeypatch.setattr("fvae_dist.training.run.train", lambda prepared, stop: seen.append(prepared.checkpoint) or {})
    assert train_command(["--config", str(write_recipe(Path.cwd(), values)), "--resume", "auto"]) == 0
    assert seen == [str(output / "checkpoint-10")]
    # What this process starts now would inherit an ignored signal, and live on when it is to end.
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN


# -------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(("rank", "local_rank", "waited_s"), [("0", "0", []), ("1", "1", [10.0]), ("8", "0", [5.0])])
def test_other_ranks_wait_for_rank_0_to_speak_first(refused, monkeypatch, rank, local_rank, waited_s):
    """The launcher ends all ranks when one exits: if another one did before rank 0 has printed, nobody would."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    handlers = []
    monkeypatch.setattr("signal.signal", lambda *handler: handlers.append(handler))
    refused(recipe="")
    assert waits == waited_s
    # slurm/node.sh starts its ranks with SIGTERM ignored: who waits to be ended takes it back.
    assert handlers == [(signal.SIGTERM, signal.SIG_DFL)] * len(waited_s)


def run(command: list[str], folder: Path, **options) -> subprocess.CompletedProcess:
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, timeout=TIMEOUT_S, check=False, **options
    )


def test_script_prints_one_line_and_exits_with_2(values, tmp_path):
    values["adapter"]["target_modules"] = ["nope"]
    recipe = write_recipe(tmp_path, values)
    result = run([sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(recipe)], tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: adapter.target_modules: 'nope' matches no module")
    assert result.stderr.count("\n") == 1


@pytest.mark.distributed
def test_launcher_exits_with_2_and_one_rank_speaks(values, tmp_path):
    if shutil.which("deepspeed", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs the deepspeed launcher")
    values["training"]["lerning_rate"] = 1e-4
    line = "training.lerning_rate: unknown key; did you mean learning_rate?"
    recipe = write_recipe(tmp_path, values)
    port = str(free_port())
    launch = ["deepspeed", "--master_port", port, "--num_accelerators", "2", str(ROOT / "launch" / "train.py")]
    # Whatever started the tests: ranks that inherit SIGTERM ignored cannot be ended before they have taken it back.
    take_back = partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
    result = run([*launch, "--config", str(recipe)], tmp_path, preexec_fn=take_back)
    output = result.stdout + result.stderr
    assert result.returncode == 2, output
    assert output.count(line) == 1, output
    assert [text.startswith("error: ") for text in output.splitlines() if line in text] == [True]
    assert "Traceback" not in output and "Warning" not in output
