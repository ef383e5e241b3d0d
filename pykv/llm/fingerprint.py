"""What tells a model from others whose caches have other contents."""

from __future__ import annotations

import hashlib

import numpy as np

from pykv.kvtc.artefact import Fingerprint
from pykv.llm.gguf import ModelFile
from pykv.llm.weights import Model

_SAMPLE = 4096  # bytes of each tensor


def fingerprint(file: ModelFile, model: Model) -> Fingerprint:
    """What keys and values of a model depend on.

    Its hash is a SHA-256 of the names, types, shapes and first 4,096 bytes of all tensors of the
    file, in the order of names: it tells fine-tuned models and quantisations apart, and reads
    little.
    """
    config, digest = model.config, hashlib.sha256()
    for name in sorted(file.tensors):
        tensor = file.tensors[name]
        digest.update(f"{name} {tensor.kind} {tensor.shape}\n".encode())
        digest.update(tensor.first_bytes(_SAMPLE).data)
    return Fingerprint(
        architecture=config.architecture,
        layers=config.num_layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        pairing=config.kind.pairing,
        inv_freq=np.stack(config.inv_freq).astype(np.float32),
        sha256=digest.hexdigest(),
    )
