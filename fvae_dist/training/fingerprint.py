"""What tells one frozen base model from another, without reading all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import PretrainedConfig

from fvae_dist.training.recipe import ModelSection

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16
_PATTERNS = ("*.safetensors", "*.bin")


def base_fingerprint(section: ModelSection, config: PretrainedConfig, seed: int) -> str:
    """A digest of the base model: of its configuration, and of its weights.

    Of weights in a local folder: names, sizes and evenly spaced samples of each file, headers among them. Of a Hub
    model: its commit. Of random weights: the seed.
    """
    settings = config.to_dict()
    # What a run may change about the same weights.
    for name in ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "pad_token_id"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    folder = Path(section.name_or_path)
    if section.random_weights:
        digest.update(f"random weights {seed}".encode())
    elif folder.is_dir():
        for path in sorted(path for pattern in _PATTERNS for path in folder.glob(pattern)):
            _add_file(digest, path)
    else:
        digest.update(f"{section.name_or_path}@{getattr(config, '_commit_hash', None)}".encode())
    return digest.hexdigest()


def _add_file(digest, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with open(path, "rb") as file:
        for sample in range(_SAMPLES):
            file.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
