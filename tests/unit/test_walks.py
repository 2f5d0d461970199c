"""Each step's walks through the model are spared without a difference to the plain trainer."""

from __future__ import annotations

import copy

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from fvae_dist.training.walks import WalkOnceMixin


class Model(torch.nn.Module):
    main_input_name = "x"

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))
        self.num_walks = self.num_counts = 0
        self.modes: list[bool] = []

    def train(self, mode: bool = True):
        self.num_walks += mode
        return super().train(mode)

    def num_parameters(self, exclude_embeddings: bool = False) -> int:
        self.num_counts += 1
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, x):
        self.modes.append(self.inner[1].training)
        return {"loss": self.inner(x).square().mean()}


class Once(WalkOnceMixin, Trainer):
    pass


class DropoutOff(TrainerCallback):
    """As a callback that generates may leave a model: a part of it no longer trains."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.inner[1].eval()


def train(tmp_path, trainer_class) -> Trainer:
    torch.manual_seed(0)
    data = [{"x": torch.randn(3)} for _ in range(11)]  # the last of six batches is a short one
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trainer_class(model=Model(), args=args, train_dataset=data, callbacks=[DropoutOff()])
    trainer.train()
    return trainer


def test_training_is_the_plain_trainers_and_walks_only_when_due(tmp_path):
    plain, once = train(tmp_path, Trainer), train(tmp_path, Once)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(once.model.state_dict()[name], value, rtol=0, atol=0)
    assert plain.state.total_flos == once.state.total_flos > 0
    assert plain.model.modes == once.model.modes == [True] * 6
    assert (plain.model.num_walks, once.model.num_walks) == (6, 1)  # after DropoutOff
    assert (plain.model.num_counts, once.model.num_counts) == (6, 1)


def test_copy_of_the_model_is_independent(tmp_path):
    model = train(tmp_path, Once).model
    other = copy.deepcopy(model)
    other.eval()
    other.train()
    assert other.inner[1].training and "train" not in vars(model)
