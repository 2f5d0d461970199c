"""Liger's head gives the losses and gradients of TRL's; its kernels run in Triton's interpreter here."""

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


def train(folder, tokenizer, device="cpu", dtype=torch.float32, **arguments):
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
        args=SFTConfig(**values),
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


@pytest.mark.gpu
def test_trains_as_with_trls_head_on_a_gpu(tmp_path, tokenizer):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    compare(tmp_path, tokenizer, rel=2e-2, device="cuda", dtype=torch.bfloat16)


def test_a_trained_head_is_refused(tmp_path, tokenizer):
    from fvae_dist.training.liger_head import head_problem

    model = LlamaForCausalLM(llama_config())
    assert head_problem(model) == "the head is trained"
    model.requires_grad_(False)
    assert head_problem(model) is None
    model.config.logit_scale = 0.5
    assert head_problem(model) == "the model's head has a logit_scale"
