"""Fields that have no effect here, and those that are refused as they would change answers."""

from __future__ import annotations

from typing import Any

from pykv.serve.fields import Fields, wrong

_FORMAT = "response_format"
# Fields that OpenAI's clients may send and that have no effect here.
IGNORED = """
    user store metadata service_tier safety_identifier prompt_cache_key reasoning_effort verbosity
""".split()
# Fields that ask for an answer of another sort than is given here: the value of each that asks for
# nothing, and the field that does what it asks for. An answer without that would not look wrong.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    # OpenAI's
    "functions": ([], "tools"),
    "function_call": (None, "tool_choice"),
    "web_search_options": (None, ""),
    # vLLM's and SGLang's
    **dict.fromkeys(("guided_json", "structured_outputs", "json_schema"), (None, _FORMAT)),
    **dict.fromkeys("guided_choice guided_regex guided_grammar".split(), (None, _FORMAT)),
    **dict.fromkeys("structural_tag regex ebnf".split(), (None, _FORMAT)),
    "bad_words": ([], "logit_bias"),
    "allowed_token_ids": (None, "logit_bias"),
    "use_beam_search": (False, ""),
    "length_penalty": (1, ""),
    "include_stop_str_in_output": (False, ""),
    "skip_special_tokens": (True, ""),
    **dict.fromkeys(("return_token_strs", "return_token_ids"), (False, "")),
    "return_tokens_as_token_ids": (False, ""),
    "max_new_tokens": (None, "max_tokens"),
    "min_new_tokens": (None, "min_tokens"),
    "prompt_logprobs": (None, ""),
    "truncate_prompt_tokens": (None, ""),
    "add_generation_prompt": (True, "chat_template_kwargs"),
    "continue_final_message": (False, ""),
    "chat_template": (None, ""),
    "documents": (None, "chat_template_kwargs"),
    "cache_salt": (None, ""),
    **dict.fromkeys("enable_thinking thinking".split(), (None, "chat_template_kwargs")),
    **dict.fromkeys("thinking_budget thinking_token_budget prompt_embeds".split(), (None, "")),
    **dict.fromkeys("logits_processors custom_logit_processor lora_path".split(), (None, "")),
    "logprob_token_ids": (None, "top_logprobs"),
    "stop_regex": (None, "stop"),
    "no_stop_trim": (False, ""),
    # llama.cpp's
    "grammar": (None, _FORMAT),
    "n_predict": (None, "max_tokens"),
    "samplers": (None, ""),
    "n_probs": (0, "logprobs"),
    "lora": ([], ""),
    "repeat_penalty": (1, "repetition_penalty"),
    **dict.fromkeys("mirostat dry_multiplier xtc_probability dynatemp_range".split(), (0, "")),
    "typical_p": (1, ""),
    "top_n_sigma": (-1, ""),
}
# The same of fields that some endpoints read, for the others.
OF_OTHERS: dict[str, tuple[Any, str]] = {
    "messages": (None, ""),
    "tools": ([], ""),
    "tool_choice": ("none", ""),
    "chat_template_kwargs": ({}, ""),
    "max_completion_tokens": (None, "max_tokens"),
    "top_logprobs": (0, "logprobs"),
    "prompt": (None, "messages"),
    "echo": (False, ""),
    "suffix": ("", ""),
    "special": (False, ""),
    "logprobs": (False, ""),
    _FORMAT: ({"type": "text"}, ""),
}


def refuse_unsupported(fields: Fields, *, table: dict[str, tuple[Any, str]] = UNSUPPORTED) -> None:
    """Raise the error of the first field that asks for what does not run; fields that were read run
    here."""
    for name, (nothing, instead) in table.items():
        if fields.was_read(name):
            continue
        value = fields.take(name, enum=[nothing, None])
        if value is not None and value != nothing:
            expected = "none" if nothing is None else f"{nothing!r}, or none"
            why = f"{instead} does what runs here" if instead else "it does not run here"
            raise wrong(name, value, f"{expected}: {why}")
