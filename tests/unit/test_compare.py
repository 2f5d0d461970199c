"""The comparison's file, its trials, its statistics against numbers made by hand, and its reports."""

import base64
import csv
import json
import math
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fvae_dist.cli import compare_command, main
from fvae_dist.comparison import report, running
from fvae_dist.comparison.command import listing
from fvae_dist.comparison.processes import Stopped, evaluate_command, last_error, run_logged
from fvae_dist.comparison.statistics import _T_975, best_learning_rate, paired_difference, spread
from fvae_dist.comparison.study import load_study
from fvae_dist.training.modeling import build_peft_config
from fvae_dist.training.recipe import Recipe, RecipeError
from tests.comparing import LORA, write_comparison

ROOT = Path(__file__).parents[2]
ZERO3 = f"training.deepspeed={ROOT}/ds_configs/zero3.json"
FAMILY = ROOT / "launch" / "recipes" / "compare_family.yaml"

# ------------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [0]}, r"compare.yaml:\d+: seed: unknown key; did you mean seeds\?"),
        ({"seeds": [0, 0]}, r"compare.yaml:\d+: seeds: a value stands there twice"),
        ({"seeds": []}, r"seeds: .*at least 1"),
        ({"seeds": ["a"]}, r"seeds.0: .*integer"),
        ({"learning_rates": [0.0]}, r"learning_rates.0: .*greater than 0"),
        ({"learning_rates": [float("nan")]}, r"learning_rates.0: "),
        ({"methods": {}}, r"methods: .*at least 1"),
        ({"methods": {"a/b": {}}}, r"methods: 'a/b' is no name"),
        ({"methods": {"a": {}, "A": {}}}, r"differ in case alone"),
        ({"methods": {"a": 3}}, r"methods.a: "),
        ({"methods": {"a": {"rank": 3}}}, r"methods.a: adapter.rank: unknown key; did you mean r\?"),
        ({"methods": {"a": {"peft_type": "LORRA"}}}, r"methods.a: adapter.peft_type: unknown type 'LORRA'"),
        ({"methods": {"a": {**LORA, "init_lora_weights": "corda"}}}, r"methods.a: .*plain LoRA by another name"),
        (
            {"methods": {"a": {**LORA, "init_lora_weights": "eva"}}, "set": [ZERO3]},
            r"methods.a: adapter.init_lora_weights: eva needs whole weights before training, and ZeRO-3 has none",
        ),
        (
            {"methods": {"a": {"peft_type": "ADALORA"}}, "set": [ZERO3]},
            r"methods.a: adapter.peft_type: ADALORA .* use training.deepspeed: null",
        ),
        ({"methods": {"a": {"peft_type": "ADALORA", "init_r": 8}}}, r"methods.a: adapter.target_r: must be greater"),
        ({"baseline": "dora"}, r"baseline: 'dora' is none of the methods"),
        ({"set": ["training.seed=3"]}, r"set: training.seed=3: is set by the comparison itself"),
        ({"set": ["training.sed=3"]}, r"compare.yaml: set: training.sed: unknown key; did you mean seed\?"),
        ({"set": ["model.random_weights=true"]}, r"model.random_weights: .*needs saved weights"),
        ({"set": ["model.revision=main"]}, r"model.revision: "),
        ({"recipe": "none.yaml"}, r"none.yaml: cannot read the recipe"),
        ({"launcher": "deepspeed '"}, r"launcher: No closing quotation"),
        ({"test": {"suite": "groups", "data": "x", "metric": "accuracy"}}, r"test: metric: write groups/TASK/METRIC"),
        ({"test": {"suite": "groups", "metric": "groups/groups/gap"}}, r"test: data: groups needs it"),
        ({"test": {"suite": "lm_eval:a", "data": "x", "metric": "lm_eval/a/acc"}}, r"data: goes not with lm_eval"),
        ({"test": {"suite": "group", "data": "x", "metric": "group/a/b"}}, r"test.suite: unknown suite 'group'"),
        (
            {"test": {"suite": "groups", "date": "x", "metric": "groups/a/b"}},
            r"test.date: unknown key; did you mean data",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capfd, changes, message):
    path = write_comparison(tmp_path, **changes)
    assert compare_command(["--config", str(path), "--list"]) == 2
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and lines[-1].startswith("error: ")
    assert re.search(message, lines[-1]), lines[-1]
    assert not (tmp_path / "out").exists()


def test_selecting_on_the_test_data_is_refused(tmp_path):
    section = {"suite": "groups", "data": "x.json", "metric": "groups/groups/worst_group"}
    with pytest.raises(RecipeError, match="test: is what the learning rate is chosen by"):
        load_study(write_comparison(tmp_path, validation=section, test=section))


def test_command_is_known_to_the_installed_program(capfd):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    assert ended.value.code == 0 and "--trial N" in capfd.readouterr().out


def test_shipped_comparison_loads_and_each_method_is_its_own():
    study = load_study(FAMILY)
    assert FAMILY.read_text().startswith("# python launch/compare.py --config launch/recipes/compare_family.yaml\n")
    assert (FAMILY.parent / study.comparison.recipe).is_file()
    configs = [json.dumps(build_peft_config(a).to_dict(), default=str, sort_keys=True) for a in study.adapters.values()]
    assert len(set(configs)) == len(configs) == 17
    objectives = {a["objective"] for a in study.adapters.values() if a["peft_type"] == "FVAE_LORA"}
    assert objectives == {"official", "paper", "vae2lat", "beta_vae2lat"}
    assert all(a["target_modules"] == ["q_proj", "v_proj"] for a in study.adapters.values())
    assert len(study.trials()) == 17 * 9


@pytest.mark.parametrize("path", sorted(FAMILY.parent.glob("compare_*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_comparison_is_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # its DeepSpeed configuration lies there
    study = load_study(path)
    assert study.comparison.methods.keys() == study.adapters.keys()


# -------------------------------------------------------------------------------------------------------------- trials


def test_every_method_gets_the_same_budget(tmp_path):
    study = load_study(write_comparison(tmp_path, seeds=[0, 7], learning_rates=[1e-3, 1e-2]))
    trials = study.trials()
    assert [trial.index for trial in trials] == list(range(12))
    assert [test.index for test in study.tests()] == list(range(12, 18))
    recipes = {}
    for trial in trials:
        values = study.recipe_of(trial)
        Recipe.model_validate(values)
        assert values["training"].pop("output_dir") == str(tmp_path / "out" / "trials" / trial.name / "train")
        assert values["training"].pop("seed") == trial.seed
        assert values["training"].pop("learning_rate") == trial.learning_rate
        assert values.pop("adapter") == study.adapters[trial.method]
        recipes.setdefault(json.dumps(values), set()).add((trial.method, trial.learning_rate, trial.seed))
    (common,) = recipes  # all the rest, steps among it, is the same
    assert len(recipes[common]) == 12
    assert listing(study).splitlines()[1] == "1\ttrain fvae learning_rate=0.001 seed=7\topen"
    assert listing(study).splitlines()[-1] == "17\ttest pissa seed=7\topen"


def test_another_method_takes_over_only_where_layers_are_adapted(tmp_path):
    methods = {"same": {"r": 2, "decoder_hidden": None}, "other": {"peft_type": "LORA"}}
    adapters = load_study(write_comparison(tmp_path, methods=methods)).adapters
    assert adapters["same"] == {"peft_type": "FVAE_LORA", "target_modules": ["q_proj", "v_proj"], "r": 2}
    assert adapters["other"] == {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}


def test_suite_goes_to_evaluate_as_it_stands(tmp_path):
    section = {"suite": "groups", "data": "a=b.json", "metric": "groups/groups/gap", "limit": 3, "mode": "generate"}
    study = load_study(write_comparison(tmp_path, test=section, launcher="deepspeed --num_gpus 2"))
    command = evaluate_command(study, study.comparison.test, tmp_path / "adapter", tmp_path / "test")
    assert command[:3] == ["deepspeed", "--num_gpus", "2"] and Path(command[3]).is_file()
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options["--data"] == "groups=a=b.json" and options["--limit"] == "3" and options["--mode"] == "generate"
    assert options["--dtype"] == "float32" and "--max-length" not in options


def test_a_signal_is_passed_on_and_stops(tmp_path):
    program = (
        "import signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    log = tmp_path / "log"

    def stop_it() -> None:
        while not log.exists() or "\nready" not in log.read_text():
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    threading.Thread(target=stop_it, daemon=True).start()
    with pytest.raises(Stopped):
        run_logged([sys.executable, "-c", program], log)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_last_error_is_found_among_a_launchers_lines(tmp_path):
    log = tmp_path / "log"
    code = run_logged([sys.executable, "-c", "import sys; print('x'); print('end', file=sys.stderr); 1 / 0"], log)
    with open(log, "a") as file:
        file.write("[launcher] killing everything\n")
    assert code == 1 and last_error(log, code) == "exit code 1: ZeroDivisionError: division by zero"
    code = run_logged([sys.executable, "-c", "import sys; print('no reason given'); sys.exit(3)"], log)
    assert last_error(log, code) == "exit code 3: no reason given"
    with pytest.raises(RecipeError, match="launcher: cannot run no-such-launcher"):
        run_logged(["no-such-launcher"], log)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_spread_is_the_sample_deviation():
    values = [0.2, 0.5, 0.9, 0.4]
    mean = sum(values) / 4
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
    assert spread(values) == pytest.approx((mean, deviation, 4))
    assert spread([0.5]) == (0.5, None, 1)
    with pytest.raises(ValueError, match="no value"):
        spread([])


def test_paired_difference_by_hand():
    ours, theirs = {0: 0.5, 1: 0.7, 2: 0.6, 9: 1.0}, {2: 0.5, 0: 0.45, 1: 0.6, 8: 0.0}
    differences = np.array([0.05, 0.1, 0.1])  # seeds 0, 1, 2: those that both have
    half = 4.303 * differences.std(ddof=1) / math.sqrt(3)
    expected = (differences.mean(), differences.mean() - half, differences.mean() + half, 3)
    assert paired_difference(ours, theirs) == pytest.approx(expected)
    assert paired_difference({0: 2.0}, {0: 1.5}) == (0.5, None, None, 1)
    assert paired_difference({0: 2.0}, {1: 1.5}) is None


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 30])
def test_t_quantiles_cut_off_a_fortieth(freedom):
    """The density integrated from 0 to the quantile is 0.475."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    x = np.linspace(0, _T_975[freedom - 1], 200_001)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(x * x / freedom))
    assert np.trapezoid(density, x) == pytest.approx(0.475, abs=2e-5)


def test_best_learning_rate_is_of_the_mean_over_all_seeds():
    values = {
        (1.0, 0): 0.5,
        (1.0, 1): 0.5,
        (2.0, 0): 0.9,
        (2.0, 1): 0.2,
        (3.0, 0): 1.0,
        (4.0, 0): 1.0,
        (4.0, 1): math.nan,
    }
    rates, seeds = [1.0, 2.0, 3.0, 4.0], [0, 1]
    assert best_learning_rate(values, rates, seeds, smaller_is_better=False) == 2.0  # 0.55; 3 and 4 lack a seed
    assert best_learning_rate(values, rates, seeds, smaller_is_better=True) == 1.0
    assert best_learning_rate(values, [3.0, 4.0], seeds, smaller_is_better=False) is None
    assert best_learning_rate({(1.0, 0): 1.0, (2.0, 0): 1.0}, [2.0, 1.0], [0], smaller_is_better=False) == 2.0


def test_metric_over_tasks_is_their_mean():
    tasks = [{"commonsense/boolq/accuracy": 0.5, "commonsense/boolq/ece": 1.0}, {"commonsense/piqa/accuracy": 0.7}]
    assert running.metric_value("commonsense/*/accuracy", tasks) == pytest.approx(0.6)
    assert running.metric_value("commonsense/piqa/accuracy", tasks) == 0.7
    assert running.metric_value("commonsense/*/ece", tasks) is None  # a mean over some of the tasks is none
    assert running.metric_value("groups/groups/worst_group", tasks) is None


@pytest.mark.parametrize(
    ("metric", "smaller"),
    [("a/b/loss", True), ("a/b/accuracy", False), ("lm_eval/w/word_perplexity,none", True), ("g/g/worst_group", False)],
)
def test_direction_of_a_metric(metric, smaller):
    assert running.smaller_is_better(metric) is smaller


# --------------------------------------------------------------------------------------------------- results and report


@pytest.fixture
def study(tmp_path):
    """Two learning rates, three seeds: written results as trials leave them; pissa's larger learning rate failed."""
    study = load_study(write_comparison(tmp_path, seeds=[0, 1, 2], learning_rates=[0.001, 0.01]))
    for trial in study.trials():
        folder = study.folder(trial)
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps(running._settings(study, trial)))
        if trial.method == "pissa" and trial.learning_rate == 0.01 and trial.seed == 1:
            (folder / "error.json").write_text(json.dumps({"error": "training: exit code 1: NaN"}))
            continue
        better = trial.learning_rate == 0.01  # validation is a loss
        result = {"value": 1.0 if better else 2.0, "worst_group": None, "trainable_parameters": 1000}
        cost = {"inference_parameters": 400, "tokens_per_s_per_gpu": 50.0 + trial.seed, "step_s": 0.25, "peak_gib": 1.5}
        (folder / "result.json").write_text(json.dumps({**result, **cost}))
    return study


def finish_tests(study, skip: str | None = None) -> None:
    for test in study.tests():
        if test.method != skip:
            value = {"fvae": 0.8, "lora": 0.6, "pissa": 0.5}[test.method] + 0.01 * test.seed ** (test.method == "fvae")
            result = {"settings": running._test_settings(study), "value": value, "worst_group": value / 2}
            (study.folder(running.chosen_trial(study, test)) / "test.json").write_text(json.dumps(result))


def test_report_says_what_was_found(study, capfd):
    finish_tests(study)
    markdown = report.write_report(study)
    rows = {row["method"]: row for row in csv.DictReader((study.output / "comparison.csv").read_text().splitlines())}
    assert [float(rows["fvae"][f"test_seed_{seed}"]) for seed in (0, 1, 2)] == pytest.approx([0.8, 0.81, 0.82])
    assert float(rows["fvae"]["test_mean"]) == pytest.approx(0.81)
    assert float(rows["fvae"]["test_sd"]) == pytest.approx(0.01)
    assert float(rows["fvae"]["difference"]) == pytest.approx(0.2)
    half = 4.303 * 0.01 / math.sqrt(3)
    assert float(rows["fvae"]["difference_high"]) == pytest.approx(0.2 + half)
    assert rows["lora"]["difference"] == "" and float(rows["fvae"]["worst_group_mean"]) == pytest.approx(0.405)
    assert rows["fvae"]["learning_rate"] == "0.01" and rows["pissa"]["learning_rate"] == "0.001"
    assert rows["pissa"]["num_failed"] == "1" and rows["fvae"]["tokens_per_s_per_gpu"] == "51.0"
    shown = (
        "| fvae | 0.01 | 3 | 0.8100 ± 0.0100 | +0.2000 [+0.1752, +0.2248] | 0.4050 ± 0.0050 | 1,000 | 400 | 250 ms |"
    )
    assert shown in markdown and "2 learning rates (0.001, 0.01) x 3 seeds, 3 steps each" in markdown
    page = (study.output / "comparison.html").read_text()
    (encoded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(encoded) == (study.output / "comparison.png").read_bytes()
    assert encoded.startswith("iVBOR") and page.count("<tr>") == 4 and "http" not in page
    assert "+0.2000 [+0.1752, +0.2248]" in page


def test_report_of_an_unfinished_comparison(study):
    (study.folder(study.trials()[0]) / "result.json").unlink()
    assert running.chosen_learning_rate(study, "fvae") is None  # the open trial could be the best
    markdown = report.write_report(study)
    assert "| fvae |  | 0 |  |  |  | 1,000 |" in markdown and "Not finished yet: fvae (1)." in markdown
    lines = listing(study).splitlines()
    assert lines[0].endswith("\tbegun") and lines[1].endswith("\tfinished") and lines[-1].endswith("\topen")
    assert sum(line.endswith("\tfailed") for line in lines) == 1


def test_test_before_its_trials_is_refused(study, tmp_path, capfd):
    (study.folder(study.trials()[0]) / "result.json").unlink()
    config = ["--config", str(tmp_path / "compare.yaml")]
    assert compare_command([*config, "--trial", "18"]) == 2
    assert "--trial 18: tests what is chosen by fvae's trials" in capfd.readouterr().err
    assert compare_command([*config, "--trial", "27"]) == 2
    assert "--trial 27: the last is 26" in capfd.readouterr().err


def test_results_of_other_settings_are_refused(study, tmp_path):
    changed = load_study(
        write_comparison(tmp_path, seeds=[0, 1, 2], learning_rates=[0.001, 0.01], set=["training.max_steps=4"])
    )
    with pytest.raises(RecipeError, match=r"another recipe.training.max_steps \(3, now 4\); choose another output"):
        running.run_trial(changed, changed.trials()[0])
    finish_tests(study)
    section = {**study.comparison.test.model_dump(), "limit": 2}
    changed = load_study(write_comparison(tmp_path, seeds=[0, 1, 2], learning_rates=[0.001, 0.01], test=section))
    with pytest.raises(RecipeError, match=r"another test.limit \(None, now 2\)"):
        report.write_report(changed)
