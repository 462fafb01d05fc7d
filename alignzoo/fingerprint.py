"""What a model is, by content: the hash of its weights and of what tells how to compute with them, never of a path."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from alignzoo.model import Location, hash_weights, snapshot_folder

_NAMES = ("_name_or_path", "base_model_name_or_path", "transformers_version", "revision", "inference_mode")
_AT_ONCE = 1 << 26  # bytes of a tensor that are hashed at once


def fingerprint_of_files(where: Location) -> str | None:
    """Of a model in files, and of the base below an adapter. None for a hub id that was not downloaded yet."""
    weights = hash_weights(where)
    if not weights:
        return None
    parts: dict[str, Any] = {"weights": sorted(weights.values())}
    link: Location | None = where
    while link is not None:
        folder = snapshot_folder(link) if link.is_hub else Path(link.path)
        if link.gguf is None and folder is not None:  # a GGUF file holds its own configuration
            parts.setdefault("files", []).append(_configuration(folder))
        link = link.base
    return _digest(parts)


def _configuration(folder: Path) -> dict[str, Any]:
    """What the files beside the weights say: configurations without names and versions, and code."""
    found: dict[str, Any] = {}
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            found[name] = {key: value for key, value in content.items() if key not in _NAMES}
    for path in sorted(folder.glob("*.py")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def fingerprint_of_model(model: Any) -> str:
    """Of a model in memory: its class, its configuration and all of its tensors."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        for start in range(0, len(flat), _AT_ONCE):
            digest.update(flat[start : start + _AT_ONCE].numpy())
    config = {key: value for key, value in json.loads(model.config.to_json_string()).items() if key not in _NAMES}
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return _digest({"class": kind, "config": config, "tensors": digest.hexdigest()})


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:40]
