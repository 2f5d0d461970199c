"""The comparison's file: every key typed and documented beside its default, as in a recipe."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fvae_dist.training.recipe import Section

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class SuiteSection(Section):
    """One run of launch/evaluate.py and the number that is taken from it; the keys are that command's options."""

    suite: str = Field(min_length=1, description="One suite: groups, commonsense, perplexity, ..., lm_eval:TASK.")
    data: str | None = Field(None, min_length=1, description="The suite's data, as after --data SUITE=.")
    metric: str = Field(
        description="SUITE/TASK/METRIC, e.g. groups/groups/worst_group; TASK *: the mean over the suite's tasks."
    )
    mode: Literal["generate", "loglikelihood"] | None = Field(None, description="--mode; default: the suite's.")
    template: Literal["clean", "published"] = Field("clean", description="--template.")
    batch_size: int = Field(8, ge=1, description="--batch-size.")
    num_beams: int = Field(1, ge=1, description="--num-beams.")
    max_new_tokens: int | None = Field(None, ge=1, description="--max-new-tokens; default: the suite's.")
    max_length: int | None = Field(None, ge=2, description="--max-length; default: evaluate's.")
    limit: int | None = Field(None, ge=1, description="--limit: only the first N samples of every set.")

    @field_validator("suite")
    @classmethod
    def _one_suite(cls, value: str) -> str:
        if "," in value:
            raise ValueError("one suite, not several")
        return value

    @model_validator(mode="after")
    def _metric_of_the_suite(self):
        parts = self.metric.split("/")
        name = self.suite.partition(":")[0]
        if len(parts) != 3 or not all(parts) or parts[0] != name:
            raise ValueError(f"metric: write {name}/TASK/METRIC, got {self.metric!r}")
        if (self.data is None) != (name == "lm_eval") and name != "needle":
            raise ValueError(f"data: {'goes not with lm_eval' if name == 'lm_eval' else f'{name} needs it'}")
        return self


class Comparison(Section):
    """Methods that are trained alike but for their adapter; `learning_rates` x `seeds` trials for each of them."""

    recipe: str = Field(min_length=1, description="Training recipe, relative to this file.")
    set: list[str] = Field(
        default_factory=list, description="Changes of the recipe for every trial, as after --set: section.key=value."
    )
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Name -> adapter section. Of the recipe's peft_type it changes the recipe's keys; of another it "
        "takes over only which layers are adapted.",
    )
    baseline: str | None = Field(
        None, description="Method that the others are compared with; default: the one named lora, if there is one."
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(min_length=1, description="training.seed of the trials.")
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="training.learning_rate of the trials: the same grid for every method."
    )
    validation: SuiteSection = Field(description="What a method's learning rate is chosen by (mean over seeds).")
    test: SuiteSection = Field(description="What is reported, of the chosen learning rate alone.")
    output: str = Field(min_length=1, description="Folder for trials and report.")
    launcher: str = Field("", description="Command in front of train.py and evaluate.py; default: this Python.")

    @field_validator("methods")
    @classmethod
    def _names_of_folders(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name[:100]!r} is no name: letters, digits and . _ + -, at most 100")
        if len({name.lower() for name in value}) < len(value):
            raise ValueError("two names differ in case alone")
        return value

    @field_validator("seeds", "learning_rates")
    @classmethod
    def _each_once(cls, value: list) -> list:
        if len(dict.fromkeys(value)) < len(value):
            raise ValueError("a value stands there twice")
        return value

    @field_validator("launcher")
    @classmethod
    def _readable_command(cls, value: str) -> str:
        shlex.split(value)
        return value

    @model_validator(mode="after")
    def _consistent(self):
        if self.baseline is not None and self.baseline not in self.methods:
            raise ValueError(f"baseline: {self.baseline!r} is none of the methods")
        chosen_by, reported = self.validation, self.test
        if chosen_by.suite == reported.suite and chosen_by.data == reported.data:
            raise ValueError("test: is what the learning rate is chosen by (validation); give other data")
        return self

    def baseline_name(self) -> str | None:
        """The method that the others are compared with, if any."""
        return self.baseline or next((name for name in self.methods if name.lower() == "lora"), None)
