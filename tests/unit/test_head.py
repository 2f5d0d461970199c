"""The fused head gives the losses, metrics and gradients of TRL's (its kernel in Triton's interpreter, on a GPU as it
is); labels are counted where the batch arrives."""

import inspect

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from fvae_dist.kernels import head as kernel
from fvae_dist.kernels.head import IGNORED_LABEL, head_loss
from fvae_dist.training.head import HeadMixin, head_problem
from tests.distributed.tiny import llama_config
from tests.trainers import logged, train

pytest.importorskip("triton")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2}


# ---------------------------------------------------------------------------------------------------------- the kernel


def check_against_reference(num_tokens, dim, words, dtype, device="cpu", num_labelled="exact"):
    generator = torch.Generator().manual_seed(num_tokens + words)
    hidden = torch.randn(num_tokens, dim, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(words, dim, generator=generator).to(device, dtype)
    labels = torch.randint(words, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < 0.5] = IGNORED_LABEL
    labels[0] = 3
    labels = labels.to(device)
    is_counted = labels != IGNORED_LABEL
    count = {"exact": int(is_counted.sum()), "more": int(is_counted.sum()) + 2, "unknown": None}[num_labelled]
    found = head_loss(hidden, weight, labels, count)
    (0.5 * found.loss).backward()

    exact = hidden.detach().double().requires_grad_()
    logits = exact @ weight.double().t()
    loss = cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
    (0.5 * loss).backward()
    log_p = logits.log_softmax(-1)[is_counted]
    tolerance = TOLERANCE[dtype]
    assert float(found.loss.detach()) == pytest.approx(loss.item(), rel=tolerance)
    assert float(found.entropy) == pytest.approx(float(-(log_p.exp() * log_p).sum().detach()), rel=tolerance)
    assert abs(int(found.num_right) - int((logits.argmax(-1) == labels).sum())) <= (dtype is torch.bfloat16)
    assert exact.grad is not None and hidden.grad is not None
    error = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < tolerance
    assert not hidden.grad[~is_counted].any()


# Odd tokens, vocabularies that are no multiple of a block, one and several parts.
SHAPES = [(1, 8, 50), (3, 24, 5000), (125, 16, 301), (64, 16, 4096)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_labelled", ["exact", "more", "unknown"])
def test_equals_float64(shape, dtype, num_labelled, monkeypatch):
    monkeypatch.setattr(kernel, "LOGITS_BYTES", 40 * shape[2] * dtype.itemsize)
    check_against_reference(*shape, dtype, num_labelled=num_labelled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2000, 64, 128256)], ids=str)
@pytest.mark.parametrize("num_labelled", ["exact", "more", "unknown"])
def test_equals_float64_on_a_gpu(shape, dtype, num_labelled, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(kernel, "LOGITS_BYTES", 40 * shape[2] * dtype.itemsize * (10 if shape[0] > 1000 else 1))
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    check_against_reference(*shape, dtype, device="cuda", num_labelled=num_labelled)


def test_the_first_of_equal_logits_is_the_prediction():
    hidden, weight = torch.ones(2, 4), torch.ones(30, 4)
    assert int(head_loss(hidden, weight, torch.tensor([0, 7])).num_right) == 1


def test_poisoned_buffers_do_not_show(monkeypatch):
    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    check_against_reference(7, 16, 50, torch.float32)


def test_without_a_label_nothing_is_lost():
    hidden = torch.randn(3, 8, requires_grad=True)
    found = head_loss(hidden, torch.randn(20, 8), torch.full((3,), IGNORED_LABEL), 0)
    found.loss.backward()
    assert [float(value) for value in (found.loss.detach(), found.entropy, found.num_right)] == [0.0, 0.0, 0.0]
    assert hidden.grad is not None and not hidden.grad.any()


def test_a_trained_weight_is_refused():
    with pytest.raises(ValueError, match="the head's weight needs a gradient"):
        head_loss(torch.randn(3, 8), torch.randn(20, 8, requires_grad=True), torch.tensor([1, 2, 3]))


# ------------------------------------------------------------------------------------------------------------ training


def compare(folder, rel, **settings):
    of_trl = train(folder / "trl", **settings)
    of_fused = train(folder / "fused", fused_head=True, **settings)
    for key in ("loss", "loss/task", "loss/neg_elbo", "grad_norm", "entropy"):
        assert len(logged(of_trl, key)) >= 3
        assert logged(of_fused, key) == pytest.approx(logged(of_trl, key), rel=rel), key
    assert of_fused.evaluate()["eval_loss"] == pytest.approx(of_trl.evaluate()["eval_loss"], rel=rel)
    return of_trl, of_fused


def test_trains_as_with_trls_head(tmp_path):
    of_trl, of_fused = compare(tmp_path, rel=1e-5)
    for (name, expected), found in zip(of_trl.model.named_parameters(), of_fused.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert logged(of_fused, "mean_token_accuracy") == logged(of_trl, "mean_token_accuracy")


def test_trls_own_trainer_logs_the_same(tmp_path, monkeypatch):
    """Our sums of TRL's outputs are its means, where each line has one micro-batch."""
    one = {"gradient_accumulation_steps": 1, "logging_steps": 1}
    ours = train(tmp_path / "ours", config=one)
    monkeypatch.delattr(HeadMixin, "compute_loss")
    monkeypatch.setattr("fvae_dist.training.maskless.is_causal", lambda base: False)
    trls = train(tmp_path / "trl", config=one)
    for key in ("loss", "entropy", "mean_token_accuracy", "grad_norm"):
        assert len(logged(ours, key)) >= 3
        assert logged(ours, key) == pytest.approx(logged(trls, key), rel=1e-5), key


@pytest.mark.gpu
def test_trains_as_with_trls_head_on_a_gpu(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of several the trainer asks for a launcher
    compare(tmp_path, rel=2e-2, device="cuda", dtype=torch.bfloat16)


def test_logits_are_made_of_labelled_tokens_alone(tmp_path, monkeypatch):
    seen = []
    of_head = kernel._HeadLoss.apply
    monkeypatch.setattr(kernel._HeadLoss, "apply", lambda h, w, labels: seen.append(labels) or of_head(h, w, labels))
    trainer = train(tmp_path, fused_head=True)
    labels = [torch.tensor(row["labels"]) for row in trainer.train_dataset]
    assert len(seen) == 6  # an epoch
    assert sum(map(len, seen)) == sum(int((of_row != IGNORED_LABEL).sum()) for of_row in labels)
    found = sum(int((of_batch != IGNORED_LABEL).sum()) for of_batch in seen)
    assert found == sum(int((of_row[1:] != IGNORED_LABEL).sum()) for of_row in labels)


def test_generation_sees_the_models_signature(tmp_path):
    trainer = train(tmp_path, fused_head=True)
    base = trainer.model.get_base_model()
    assert inspect.signature(base.forward) == inspect.signature(type(base).forward.__get__(base))


def test_a_head_that_is_not_the_plain_one_is_refused():
    model = LlamaForCausalLM(llama_config())
    assert head_problem(model) == "the head is trained"
    model.requires_grad_(False)
    assert head_problem(model) is None
    for key in ("logit_scale", "lm_head_multiplier"):
        setattr(model.config, key, 0.5)
        assert head_problem(model) == f"the model's head has a {key}"
        setattr(model.config, key, 1)
    model.lm_head = torch.nn.Linear(16, 64, bias=True).requires_grad_(False)
    assert head_problem(model) == "the model's head is no plain matrix"


def test_another_loss_is_left_to_trl(tmp_path, monkeypatch):
    settings = {"loss_type": "dft"}
    ours = train(tmp_path / "ours", config=settings)
    with pytest.raises(ValueError, match="the fused head: the loss is not the plain likelihood"):
        train(tmp_path / "fused", config=settings, fused_head=True)
    plain = train(tmp_path / "plain")
    monkeypatch.delattr(HeadMixin, "compute_loss")
    trls = train(tmp_path / "trl", config=settings)
    assert logged(ours, "loss/task") == pytest.approx(logged(trls, "loss/task"), rel=1e-6)
    assert logged(ours, "loss/task") != pytest.approx(logged(plain, "loss/task"), rel=1e-3)


def test_an_adapted_head_is_no_plain_matrix():
    from peft import get_peft_model

    from fvae_dist.adapter import FVAELoraConfig

    base = LlamaForCausalLM(llama_config())
    model = get_peft_model(base, FVAELoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]))
    assert head_problem(model.get_base_model()) == "the model's head is no plain matrix"


def test_tiles_are_of_what_liger_put_in_place(tmp_path, monkeypatch):
    """transformers lets Liger set the MLPs' forward as training begins: tiles made before would be lost."""
    pytest.importorskip("liger_kernel")
    seen = []

    def put_in_place(model, **settings):
        for layer in model.model.layers:
            own = layer.mlp.forward
            layer.mlp.forward = lambda x, own=own: seen.append(x.numel() // 16) or own(x)

    monkeypatch.setattr("liger_kernel.transformers._apply_liger_kernel_to_instance", put_in_place)
    train(tmp_path, config={"use_liger_kernel": True}, tiled_mlp=True)
    assert seen and max(seen) <= 32  # two rows of a tile of 16


def test_metrics_are_means_since_the_line_before_whatever_is_evaluated_between(tmp_path):
    """Lines of three steps, an evaluation after each step: the same accuracy as without."""
    every = {"logging_steps": 3, "logging_first_step": False}
    plain = train(tmp_path / "plain", config=every)
    between = train(tmp_path / "between", config=every | {"eval_strategy": "steps", "eval_steps": 1})
    assert len(logged(between, "eval_loss")) == 3
    for key in ("entropy", "mean_token_accuracy"):
        assert len(logged(plain, key)) == 1 and logged(between, key) == logged(plain, key)
    steps = train(tmp_path / "steps")
    low, high = min(logged(steps, "entropy")), max(logged(steps, "entropy"))
    assert low < logged(plain, "entropy")[0] < high


def test_a_gradient_split_does_not_count_twice(tmp_path):
    every = {"logging_steps": 3, "logging_first_step": False}
    split = train(tmp_path / "split", config=every, gradient_split_every=2)
    plain = train(tmp_path / "plain", config=every)
    assert logged(split, "gradient/task/lora_B")
    assert logged(split, "entropy") == logged(plain, "entropy")
