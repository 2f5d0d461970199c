"""Registers FVAE_LORA with PEFT as soon as PEFT is there.

Importing PEFT takes several seconds (it brings in torch and transformers); `import fvae_dist` alone need not pay them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_peft() -> None:
    """Register now if PEFT is imported already, else right after it will be."""
    if "peft" in sys.modules:
        importlib.import_module("fvae_dist.adapter")
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


class _PeftFinder(MetaPathFinder):
    """Steps aside for the ordinary finders, and has `fvae_dist.adapter` imported once PEFT's own module has run."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run_module(module)
            importlib.import_module("fvae_dist.adapter")

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
