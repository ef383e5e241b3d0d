"""What tells a model from others whose caches have other contents."""

from __future__ import annotations

import hashlib

import numpy as np

from pykv.kvtc.artefact import Fingerprint
from pykv.llm import tensors
from pykv.llm.gguf import ModelFile
from pykv.llm.weights import Model

_SAMPLE = 4096  # bytes of each tensor
_PIECE = 1 << 20  # bytes of the embeddings that are read at once


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


def contents(file: ModelFile) -> str:
    """A SHA-256 of what tells apart models that `fingerprint` does not: bytes of the middle and the
    end of each tensor, and a sum of each row of the embeddings. Training changes matrices as a
    whole, but of embeddings perhaps the rows of tokens that were added."""
    digest = hashlib.sha256()
    for name in sorted(file.tensors):
        tensor = file.tensors[name]
        data = np.empty(min(_SAMPLE, tensor.nbytes), np.uint8)
        for first in ((tensor.nbytes - data.nbytes) // 2, tensor.nbytes - data.nbytes):
            tensor.read(data, first)
            digest.update(data.data)
    embedding = file.tensor(*tensors.NAMES["embedding"])
    step = max(1, _PIECE // embedding.row_bytes)
    for row in range(0, embedding.rows, step):
        rows = np.empty((min(step, embedding.rows - row), embedding.row_bytes), np.uint8)
        embedding.read(rows, row * embedding.row_bytes)
        size = next(size for size in (8, 4, 2, 1) if embedding.row_bytes % size == 0)
        digest.update(rows.view(f"<u{size}").sum(axis=1, dtype="<u8").data)
    return digest.hexdigest()
