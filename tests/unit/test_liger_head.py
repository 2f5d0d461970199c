"""Liger's head gives the losses and gradients of TRL's (its kernels in Triton's interpreter); its MLPs can be tiled."""

import inspect

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fvae_dist.training.recipe_trainer import RecipeTrainer
from tests.distributed.layouts import SEED
from tests.distributed.tiny import attach, llama_config, rows

pytest.importorskip("liger_kernel")


def train(folder, tokenizer, device="cpu", dtype=torch.float32, config=None, **arguments):
    torch.manual_seed(0)
    model = attach(LlamaForCausalLM(llama_config()).to(dtype))
    values = {
        "output_dir": str(folder),
        "use_cpu": device == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "seed": SEED,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "remove_unused_columns": False,
    }
    trainer = RecipeTrainer(
        model=model,
        args=SFTConfig(**(values | (config or {}))),
        train_dataset=Dataset.from_list(rows(12)),
        eval_dataset=Dataset.from_list(rows(4, seed=3)),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
        processing_class=tokenizer,
        **arguments,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    from tests.distributed.tiny import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def compare(folder, tokenizer, rel, **settings):
    of_trl = train(folder / "trl", tokenizer, **settings)
    of_liger = train(folder / "liger", tokenizer, liger_head=True, **settings)
    for key in ("loss", "loss/task", "loss/neg_elbo", "grad_norm"):
        assert len(logged(of_trl, key)) >= 3
        assert logged(of_liger, key) == pytest.approx(logged(of_trl, key), rel=rel), key
    assert of_liger.evaluate()["eval_loss"] == pytest.approx(of_trl.evaluate()["eval_loss"], rel=rel)
    return of_trl, of_liger


def test_trains_as_with_trls_head(tmp_path, tokenizer):
    of_trl, of_liger = compare(tmp_path, tokenizer, rel=1e-5)
    for (name, expected), found in zip(of_trl.model.named_parameters(), of_liger.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    accuracy = logged(of_liger, "mean_token_accuracy")
    assert len(accuracy) >= 3 and all(0 <= value <= 1 for value in accuracy)
    assert logged(of_trl, "entropy") and not logged(of_liger, "entropy")


def test_tiles_are_of_what_liger_put_in_place(tmp_path, tokenizer, monkeypatch):
    """transformers lets Liger set the MLPs' forward as training begins: tiles made before would be lost."""
    seen = []

    def put_in_place(model, **settings):
        for layer in model.model.layers:
            own = layer.mlp.forward
            layer.mlp.forward = lambda x, own=own: seen.append(x.numel() // 16) or own(x)

    monkeypatch.setattr("liger_kernel.transformers._apply_liger_kernel_to_instance", put_in_place)
    train(tmp_path, tokenizer, config={"use_liger_kernel": True}, tiled_mlp=True)
    assert seen and max(seen) <= 32  # two rows of a tile of 16


@pytest.mark.gpu
def test_trains_as_with_trls_head_on_a_gpu(tmp_path, tokenizer, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of several the trainer asks for a launcher
    compare(tmp_path, tokenizer, rel=2e-2, device="cuda", dtype=torch.bfloat16)


def test_generation_sees_the_models_signature(tmp_path, tokenizer):
    trainer = train(tmp_path, tokenizer, liger_head=True)
    base = trainer.model.get_base_model()
    assert inspect.signature(base.forward) == inspect.signature(type(base).forward.__get__(base))


def test_a_batch_without_labels_has_no_accuracy(tmp_path, tokenizer):
    trainer = train(tmp_path, tokenizer, liger_head=True)
    batch = {"input_ids": torch.tensor([[2, 3, 4]]), "labels": torch.full((1, 3), -100)}
    outputs = trainer.model.train()(**batch, use_cache=False, fused_lm_head=True)
    assert (float(outputs.loss.detach()), float(outputs.num_right), int(outputs.num_labels)) == (0.0, 0.0, 0)


def test_a_head_that_zero3_shards_is_trls(tmp_path, tokenizer):
    trainer = train(tmp_path, tokenizer, liger_head=True)
    batch = {"input_ids": torch.tensor([[2, 3, 4]]), "labels": torch.tensor([[2, 3, 4]])}
    assert "num_labels" in trainer.model.train()(**batch, fused_lm_head=True)
    trainer.model.get_output_embeddings().weight.ds_id = 0
    assert trainer.model(**batch, fused_lm_head=True).label_mask.sum() == 2


def test_a_head_that_is_not_the_plain_one_is_refused():
    from fvae_dist.training.liger_head import head_problem

    model = LlamaForCausalLM(llama_config())
    assert head_problem(model) == "the head is trained"
    model.requires_grad_(False)
    assert head_problem(model) is None
    model.config.logit_scale = 0.5
    assert head_problem(model) == "the model's head has a logit_scale"
    model.config.logit_scale = 1
    model.config.lm_head_multiplier = 0.5
    assert head_problem(model) == "the model's head has a lm_head_multiplier"
