"""Linear probes: on latents whose content is known, and on a tiny adapted model from end to end."""

import json
import re
import shutil

import pytest
import torch

from fvae_dist.evaluation.linear_probe import probe, split_rows
from fvae_dist.evaluation.loading import find_model, load_model
from fvae_dist.evaluation.probes import adapted_layers, main, pooled_latents, probe_latents, read_texts
from fvae_dist.evaluation.spurious import as_questions, make_suite
from tests.evaluating import write_adapted
from tests.recipes import write_records

NUM_TEXTS = 400


def known_latents(generator):
    """z1 holds the label and nothing of the cue, z2 the cue and nothing of the label; the input holds both."""
    label, cue = (torch.randint(2, (NUM_TEXTS,), generator=generator) for _ in range(2))
    noise = torch.randn(2, NUM_TEXTS, 3, generator=generator)
    z1, z2 = noise[0].clone(), noise[1].clone()
    z1[:, 1] = 4.0 * label
    z2[:, 2] = 4.0 * cue
    targets = {"label": [f"l{i}" for i in label.tolist()], "cue": [f"c{i}" for i in cue.tolist()]}
    return {("layer", "mean", "z1"): z1, ("layer", "mean", "z2"): z2, ("layer", "mean", "input"): z1 + z2}, targets


def test_probes_find_what_is_there_and_nothing_else():
    latents, targets = known_latents(torch.Generator().manual_seed(0))
    results = probe_latents(latents, targets)
    mean = results["mean"]["mean"]
    assert mean["z1"]["label"]["value"] == mean["z2"]["cue"]["value"] == 1.0
    assert mean["input"]["label"]["value"] > 0.9 and mean["input"]["cue"]["value"] > 0.9
    for latent, target in (("z1", "cue"), ("z2", "label")):
        found = mean[latent][target]
        assert found["low"] < 0.5 < found["high"]
    for name in ("label_z1_minus_z2", "cue_z2_minus_z1"):
        difference = results["difference"]["mean"][name]
        assert 0.2 < difference["low"] <= difference["value"] <= difference["high"]
    assert results["layers"]["layer"]["mean"] == mean  # there is but one layer


def test_probes_depend_on_the_seed_alone():
    latents, targets = known_latents(torch.Generator().manual_seed(1))
    assert probe_latents(latents, targets, seed=3) == probe_latents(latents, targets, seed=3)
    assert probe_latents(latents, targets, seed=3) != probe_latents(latents, targets, seed=4)


def test_probe_does_not_depend_on_scale_or_shift():
    latents, targets = known_latents(torch.Generator().manual_seed(2))
    classes = torch.tensor([int(name[1]) for name in targets["label"]])
    features, is_test = latents["layer", "mean", "input"], split_rows(NUM_TEXTS, 0.25, 0)
    assert int(is_test.sum()) == 100
    assert probe(features, classes, is_test).equal(probe(1000 * features.double() - 7, classes, is_test))


def test_constant_features_tell_the_largest_class():
    classes, is_test = torch.tensor([0, 1, 1, 1, 0, 1]), torch.tensor([0, 0, 0, 0, 1, 1]).bool()
    assert probe(torch.zeros(6, 4), classes, is_test).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("features", "classes", "message"),
    [
        ([[1.0], [float("nan")], [2.0]], [0, 1, 1], "not finite"),
        ([[1.0], [2.0], [2.0]], [0, 0, 1], "1 classes: too few"),
    ],
)
def test_what_cannot_be_probed_is_refused(features, classes, message):
    with pytest.raises(ValueError, match=message):
        probe(torch.tensor(features), torch.tensor(classes), torch.tensor([False, False, True]))


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Folder with a tiny base and adapter, and the test of a suite in both forms."""
    folder = tmp_path_factory.mktemp("probes")
    write_adapted(folder)
    examples = [(f"{'a' if i % 2 else 'b'} {i}", "odd" if i % 2 else "even") for i in range(60)]
    rows = make_suite(examples, "word", shares=(0.1, 0.1, 0.8))["test"]
    write_records(folder / "texts.jsonl", rows)
    write_records(folder / "questions.jsonl", as_questions(rows))
    return folder


def arguments(folder, *more, data="texts.jsonl"):
    return ["--model", str(folder / "base"), "--adapter", str(folder / "adapter"), "--data", str(folder / data), *more]


@pytest.mark.parametrize("data", ["texts.jsonl", "questions.jsonl"])
def test_command_probes_every_layer(adapted, capsys, data, tmp_path):
    out = tmp_path / "probes.json"
    assert main(arguments(adapted, "--out", str(out), data=data)) == 0
    report = json.loads(out.read_text())
    assert len(report["layers"]) == 4  # q and v of two layers
    assert report["settings"]["num_texts"] == 48 and report["settings"]["untrained"] is False
    for layer in report["layers"].values():
        assert layer.keys() == {"mean", "last"} and layer["last"].keys() == {"z1", "z2", "input"}
    values = [layer["mean"]["z1"]["cue"]["value"] for layer in report["layers"].values()]
    assert report["mean"]["mean"]["z1"]["cue"]["value"] == pytest.approx(sum(values) / 4)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| | chance |")


def test_latents_of_an_untrained_adapter_hold_nothing(adapted, tmp_path):
    out = tmp_path / "before.json"
    assert main(arguments(adapted, "--untrained", "--out", str(out))) == 0
    report = json.loads(out.read_text())
    for latent in ("z1", "z2"):
        for target in ("label", "cue"):  # at most the largest class's share: the fit's largest may be the test's other
            assert report["mean"]["mean"][latent][target]["value"] <= report["chance"][target]
    assert report["mean"]["mean"]["input"]["cue"]["value"] > report["chance"]["cue"]


def test_pooled_latents_are_the_encoders_means_whatever_the_padding(adapted):
    source = find_model(str(adapted / "base"), str(adapted / "adapter"), deepspeed="none")
    model = load_model(source, torch.device("cpu"))
    all_ids, _ = read_texts(adapted / "texts.jsonl", source.tokenizer, 64)
    alone = pooled_latents(model, all_ids[:3], 0, torch.device("cpu"), batch_size=1)
    together = pooled_latents(model, all_ids[:3], 0, torch.device("cpu"), batch_size=3)
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-5, atol=1e-6)  # products of other shapes

    name, layer = next(iter(adapted_layers(model).items()))
    inputs = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([all_ids[0]]))
        handle.remove()
        for latent, encoder in (("z1", "encoder1"), ("z2", "encoder2")):
            mean_TR = getattr(layer.fvae_vae["default"], encoder)(inputs[0][0])[0]
            torch.testing.assert_close(alone[name, "last", latent][0], mean_TR[-1], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(alone[name, "mean", latent][0], mean_TR.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a", "label": "x"}], r'texts.jsonl:1: missing column "cue"'),
        ([{"text": "a", "label": "x", "cue": "c"}], r"texts.jsonl: every record has the label 'x'"),
        ([{"text": "a", "label": x, "cue": x} for x in "xy"], r"too few"),
    ],
)
def test_bad_data_is_one_line_and_exit_2(adapted, tmp_path, capsys, records, message):
    data = write_records(tmp_path / "texts.jsonl", records)
    command = arguments(adapted)
    command[5] = str(data)
    assert main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert re.search(message, lines[-1]), lines[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"peft_type": "LORA"}, "has no z1 and z2"), ({"inference_only": True}, "without encoder 2")],
)
def test_adapters_without_latents_are_refused(adapted, tmp_path, capsys, changes, message):
    folder = shutil.copytree(adapted / "adapter", tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    command = arguments(adapted)
    command[3] = str(folder)
    assert main(command) == 2
    assert message in capsys.readouterr().err
