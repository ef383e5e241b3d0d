"""What a model makes of text: its tokenizer, its chat template and its context, without weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pykv import install
from pykv.llm import chat, gguf, models
from pykv.llm.config import read_config
from pykv.llm.prompts import known_ids
from pykv.llm.tokenizer import Tokenizer
from pykv.options import check_flag, check_whole


class Language:
    """The text side of an LLM, which is one; alone it needs no device.

    Args:
        model, context: as of pykv.llm.LLM.

    Raises:
        FetchError, FormatError, UnsupportedError, InstallError: as LLM.
        ParameterError: `context` exceeds the model's own.

    Attributes:
        file: metadata and tensors.
        config: hyper-parameters.
        context: tokens of prompt and answer at most.
    """

    def __init__(self, model: str | os.PathLike[str], *, context: int | None = None) -> None:
        install.require("llm", "gguf", "tokenizers")
        self.file = gguf.read_model(models.fetch(model))
        self.config = read_config(self.file)
        most = self.config.context
        context = most if context is None else context
        self.context = check_whole("LLM", "context", context, 1, most)
        self.tokenizer = Tokenizer(self.file)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works: the file carries a template."""
        return "tokenizer.chat_template" in self.file.metadata

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Args, Raises: as LLM.chat.
        """
        return chat.chat_ids(
            self.file,
            self.tokenizer,
            messages,
            template_variables=template_variables,
            limit=self.context,
        )

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, with the start token where the model wants one; `special` as in
        LLM.generate."""
        return self.tokenizer.encode(text, special=check_flag("tokenize", "special", special))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(known_ids(self, "ids", ids))
