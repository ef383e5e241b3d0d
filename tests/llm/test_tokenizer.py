"""Tokenizers from small vocabularies worked by hand, from SentencePiece itself, and real ones."""

import functools
import io
import json
import re
import time
import unicodedata
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pykv.errors import CapacityError, DtypeError, FormatError, ParameterError, UnsupportedError
from pykv.llm import bpe, gguf, spm
from pykv.llm.token_types import Finder
from pykv.llm.tokenizer import Tokenizer
from tests.llm.test_model import MODELS

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def build(path, model, tokens, **keys):
    """The tokenizer of a file with these tokens and tokenizer.ggml.* keys, lists and scalars."""
    writer = library.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    for key, value in keys.items():
        key = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Tokenizer(gguf.read(path))


# ---- byte-level BPE

# Ids 0 to 255 are the bytes, so that every id below can be worked out by hand.
BYTES = [c for c, _ in sorted(bpe.alphabet().items(), key=lambda item: item[1])]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "Ċ Ċ"]
MERGED = ["he", "ll", "hell", "hello", "Ġhello", "12", "123", "ĊĊ"]  # ids 256 to 263
ADDED = ["<|bos|>", "<|im_end|>", "<tool>", "<tool><tool>", "  "]  # ids 264 to 268
TYPES = [1] * 264 + [3, 3, 4, 4, 4]


def byte_level(path, **keys):
    base = {"pre": "gpt-2", "merges": MERGES, "token_type": TYPES}
    ids = {"bos_token_id": 264, "eos_token_id": 265}
    return build(path, "gpt2", BYTES + MERGED + ADDED, **(base | ids | keys))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.gguf"


def test_alphabet():
    """The characters that stand for bytes: GPT-2's, as the `tokenizers` package has them."""
    ours = bpe.alphabet()
    assert set(ours) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert ours["Ġ"] == 0x20 and ours["Ċ"] == 0x0A and ours["Ā"] == 0 and ours["Ń"] == 0xAD
    assert sorted(ours.values()) == list(range(256))


def test_byte_level_ids_by_hand(path):
    t = byte_level(path)
    assert t.encode("hello") == [259]
    assert t.encode("hello hello") == [259, 260]
    assert t.encode("hel") == [256, ord("l")]
    assert t.encode("ll he") == [257, ord(" "), 256]
    assert t.encode("é") == [0xC3, 0xA9]
    assert t.encode("") == []
    assert t.encode("\n\nx") == [ord("\n"), ord("\n"), ord("x")]  # cut before the last newline
    assert t.encode("\n\n") == [263]
    assert t.encode("1234") == [262, ord("4")]


CUT = "Don't  pay 12345 €!\n\n x"
PIECES = {
    "gpt-2": ["Don", "'t", " ", " pay", " 12345", " €!", "\n\n", " x"],
    "smollm": ["Don", "'t", " ", " pay", " ", *"12345", " €!", "\n\n", " x"],
    "llama-bpe": ["Don", "'t", " ", " pay", " ", "123", "45", " €!\n\n", " x"],
    "qwen2": ["Don", "'t", " ", " pay", " ", *"12345", " €!\n\n", " x"],
    "tekken": ["Don", "'t", " ", " pay", " ", *"12345", " €!\n\n", " x"],
    "gpt-4o": ["Don't", " ", " pay", " ", "123", "45", " €!\n\n", " x"],
    "default": ["Don", "'", "t", " ", " pay", " ", "123", "45", " €", "!", "\n\n", " x"],
    "midm-2.0": ["Don", "'t", " ", " pay", " ", "123", "45", " €!\n\n", " x"],
    "seed-coder": ["Don", "'t", " ", " pay", " ", *"12345", " €!", "\n\n", " x"],
    "deepseek-llm": ["Don", "'", "t", " ", " pay", " ", *"12345", " ", *"€!\n\n", " x"],
    "deepseek-coder": ["Don", "'", "t", " ", " pay", " ", *"12345", " ", *"€!\n\n", " x"],
    "deepseek-v3": ["Don", "'t", " ", " pay", " ", "123", "45", " €!\n\n", " x"],
    "viking": ["Don't", " ", " pay", " ", *"12345", " €", "!\n\n", " x"],
    "minerva-7b": ["Don", "'t", " ", " pay", " ", *"12345", " €!", "\n\n", " x"],
    "megrez": ["Don", "'t", " ", " pay", " ", *"12345", " €!\n\n", " x"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_texts_are_cut_as_the_named_model_cuts(path, pre):
    cutter = byte_level(path, pre=pre)._encoder.bpe.pre_tokenizer
    spans = [span for _, span in cutter.pre_tokenize_str(CUT)]
    assert [CUT[start:end] for start, end in spans] == PIECES[pre]


@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        # Letters are named by ranges, and each piece is cut again: marks reach from : to ~, which
        # takes the letters A to z out of words that hold others; scripts from U+0800 to U+4E00,
        # which takes the blank from what follows, be it a letter or the euro.
        ("deepseek-llm", "naïve Ärger", ["na", "ï", "ve", " Ä", "rger"]),
        ("deepseek-llm", "你好，世界。 ok", ["你好", "，", "世界", "。", " ok"]),
        ("deepseek-llm", "ⴰ ა 한국어 ²³", ["ⴰ", " ", "ა", " ", "한국어", " ", "²", "³"]),
        ("deepseek-llm", "a==b  \t", ["a", "==", "b", "  \t"]),
        ("deepseek-llm", "a\r\n  b", ["a", "\r", "\n", " ", " b"]),
        (
            "deepseek-llm",
            "x\ua640\ua66e \ufb06\ufb07",
            ["x", "\ua640", "\ua66e", " \ufb06", "\ufb07"],
        ),
        ("deepseek-llm", "\U00010400\U00010450 ", ["\U00010400", "\U00010450", " "]),
        ("deepseek-llm", "x\u1c90 y\u2126", ["x", "\u1c90", " y", "\u2126"]),
        ("deepseek-coder", "naïve Ärger", ["naïve", " Ärger"]),
        ("deepseek-coder", "你好，世界。 ok", ["你好", "，", "世界", "。", " ok"]),
        ("deepseek-coder", "a == b;  // c", ["a", " ==", " b", ";", " ", " //", " c"]),
        ("deepseek-coder", "x=1\n\ty", ["x", "=", "1", "\n", "\ty"]),
        ("seed-coder", "it's x\n\n  y;\nz", ["it", "'s", " x", "\n\n", " ", " y", ";", "\n", "z"]),
        ("seed-coder", "a²34", ["a", "²", "3", "4"]),
        ("deepseek-v3", "f(x)=_y2 ok", ["f", "(x", ")=_", "y", "2", " ok"]),
        ("deepseek-v3", "你好かな、世 \u0301a", ["你好かな", "、", "世", " \u0301a"]),
        ("viking", "a(b|c), d。e", ["a", "(", "b", "|", "c", "),", " d", "。", "e"]),
        ("viking", "x;y…2x", ["x;y", "…", "2", "x"]),
    ],
)
def test_cuts_by_hand(path, pre, text, pieces):
    cutter = byte_level(path, pre=pre)._encoder.bpe.pre_tokenizer
    spans = [span for _, span in cutter.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == pieces


@pytest.mark.parametrize(
    "pre", ["qwen2", "stablelm2", "command-r", "mpt", "olmo", "gpt-2", "smollm"]
)
def test_texts_are_composed_where_the_model_has_them_so(path, pre):
    """NFC, as the normalizers of Qwen, GPT-NeoX and Command R have it in transformers."""
    t = byte_level(path, pre=pre)
    composed, apart = [*"é".encode()], [*"e\u0301".encode()]
    ids = t.encode("e\u0301")
    assert ids == (apart if pre in ("gpt-2", "smollm") else composed)
    assert t.encode("é") == composed
    assert t.encode("e\u0301<|im_end|>", special=True) == [*ids, 265]


@pytest.mark.parametrize("pre", bpe.CUTS)
def test_many_blanks_are_cut_in_a_time_that_grows_as_they_do(path, pre):
    cutter = byte_level(path, pre=pre)._encoder.bpe.pre_tokenizer
    started = time.process_time()
    for blank in (" ", "\t", "\u2028"):
        cutter.pre_tokenize_str(blank * 40_000 + "中")
    assert time.process_time() - started < 2


def test_smollm_digits_stand_alone(path):
    assert byte_level(path, pre="smollm").encode("123") == [ord(c) for c in "123"]


def test_every_cut_compiles(path):
    for pre in bpe.CUTS:
        assert byte_level(path, pre=pre).decode(byte_level(path, pre=pre).encode(CUT)) == CUT


def test_llama_takes_whole_words_from_the_vocabulary(path):
    """Without the merge that makes "hello", only a model of this sort finds the token."""
    keys = {"merges": [m for m in MERGES if m != "hell o"]}
    assert byte_level(path, pre="llama-bpe", **keys).encode("hello", bos=False) == [259]
    assert byte_level(path, pre="qwen2", **keys).encode("hello") == [258, ord("o")]


@settings(deadline=None)
@given(UNICODE)
def test_byte_level_round_trip(byte_tokenizer, text):
    assert byte_tokenizer.decode(byte_tokenizer.encode(text)) == text
    ids = byte_tokenizer.encode(text, special=True)
    assert byte_tokenizer.decode(ids, skip_special=False) == text


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("bpe") / "file")


# ---- tokens found whole


def test_control_tokens_are_letters_unless_asked_for(path):
    t = byte_level(path)
    letters = [*b"<|im_end|>"]
    assert t.encode("hello<|im_end|>") == [259, *letters]
    assert t.encode("hello<|im_end|>", special=True) == [259, 265]
    assert t.encode("<|bos|><|im_end|>he", special=True) == [264, 265, 256]
    assert t.encode("<|im_end", special=True) == letters[:-2]


def test_user_defined_tokens_are_always_found_longest_first(path):
    t = byte_level(path)
    assert t.encode("<tool>") == [266]
    assert t.encode("he<tool><tool><tool>he") == [256, 267, 266, 256]
    assert t.encode("<<tool>") == [ord("<"), 266]
    assert t.encode("     ") == [268, 268, ord(" ")]


def test_finder():
    def split(text, *tokens):
        return list(Finder({token: i for i, token in enumerate(tokens)}).split(text))

    assert split("xaaab", "aab", "aaaa") == ["xa", 0]  # starts that come to nothing
    assert split("aaaa", "aa", "aaa") == [1, "a"]
    assert split("ab b", "b", "ab", "b b") == [1, " ", 0]
    assert split("", "a") == [] and split("a") == ["a"] and split("abc", "") == ["abc"]


def test_bos(path, tmp_path):
    t = byte_level(path)
    assert t.bos_id == 264 and not t.add_bos
    assert t.encode("he") == [256] and t.encode("he", bos=True) == [264, 256]
    t = byte_level(tmp_path / "a", add_bos_token=True)
    assert t.encode("he") == [264, 256] and t.encode("he", bos=False) == [256]
    assert t.encode("") == [264]
    assert t.encode("<|bos|>he", special=True) == [264, 256], "the text brings its own"
    assert t.encode("<|bos|>he", special=True, bos=True) == [264, 264, 256], "unless told"
    assert byte_level(tmp_path / "b", pre="llama-bpe").encode("he") == [264, 256]
    t = build(tmp_path / "c", "gpt2", [*BYTES, "ab"], merges=["a b"])
    assert t.bos_id is None and t.eos_id is None and t.encode("a") == [ord("a")]
    with pytest.raises(ParameterError, match="bos has True, but this model has no BOS token"):
        t.encode("a", bos=True)


def test_stop_ids(path, tmp_path):
    assert byte_level(path).stop_ids == {265}
    t = byte_level(tmp_path / "a", eos_token_id=0, eot_token_id=1, eom_token_id=2)
    assert t.eos_id == 0 and t.stop_ids == {0, 1, 2, 265}
    t = byte_level(tmp_path / "b", fim_pad_token_id=3, fim_rep_token_id=4, fim_sep_token_id=5)
    assert t.stop_ids == {3, 4, 5, 265}
    assert byte_level(tmp_path / "c", eos_token_ids=[7, 9]).stop_ids == {7, 9, 265}, "as Ollama"
    for n, ids in enumerate(([-1], [269], [0.5])):
        with pytest.raises(FormatError, match="eos_token_ids holds .*expected ids from 0 to 268"):
            byte_level(tmp_path / f"d{n}", eos_token_ids=ids)


def test_keys_of_tokens_that_change_answers(path, tmp_path):
    """Tokens that must not be said are known, texts that must be changed first are refused."""
    assert byte_level(path).suppressed_ids == []
    assert byte_level(tmp_path / "a", suppress_tokens=[3, 7]).suppressed_ids == [3, 7]
    with pytest.raises(FormatError, match="suppress_tokens holds .*expected ids from 0 to 268"):
        byte_level(tmp_path / "b", suppress_tokens=[269])
    for key in ("normalizer.lowercase", "normalizer.strip_accents"):
        byte_level(tmp_path / f"{key}0", **{key: False})
        with pytest.raises(UnsupportedError, match=f"{key} is true"):
            byte_level(tmp_path / f"{key}1", **{key: True})


def test_an_end_behind_prompts_is_warned_of(path, tmp_path):
    """Mistral's and others' converters may ask for it; an answer would begin a new text."""
    with pytest.warns(UserWarning, match="add_eos_token is true, expected false"):
        t = byte_level(path, add_eos_token=True)
    assert t.encode("he") == [256]
    byte_level(tmp_path / "a", add_eos_token=False)
    with pytest.raises(FormatError, match="add_eos_token has 1 .*expected bool"):
        byte_level(tmp_path / "b", add_eos_token=1)


@pytest.mark.parametrize("kind", [1, 3, 4, 5])
@pytest.mark.parametrize(
    "names, ends",
    [
        (["<end_of_turn>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>"], 5),
        (["<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<|eom_id|>", "</s>"], 7),
        (["<end_of_utterance>", "<turn|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["], 4),
        (["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>", "<|user|>"], 3),
        (["<|return|>", "<|call|>", "<|end|>"], 2),  # Harmony: <|end|> ends a message of several
        (["<|flush|>", "<|calls|>", "<|end|>"], 2),
        (["<eos>", "<|tool_response>", "</s>"], 2),  # Gemma: </s> is HTML
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_ends_are_known_by_their_text(path, kind, names, ends):
    """Whatever their types: files have typed <end_of_turn> as an ordinary token."""
    tokens, types = [*BYTES, *MERGED, *names], [1] * 264 + [kind] * len(names)
    t = build(path, "gpt2", tokens, merges=MERGES, token_type=types)
    assert t.stop_ids == set(range(264, 264 + ends))
    first = names[0]
    assert t.encode(first) == [*first.encode()] and t.encode(first, special=True) == [264]
    assert t.decode([264]) == "" and t.decode([264], skip_special=False) == first


@pytest.mark.parametrize("kind", [1, 3, 4, 5])
@pytest.mark.parametrize("name", ["<|fim_prefix|>", "<fim_suffix>", "<MID>", "<|code_middle|>"])
def test_marks_of_gaps_are_control_tokens(path, kind, name):
    """Whatever their types: Qwen's are typed as user-defined, which any message could hold."""
    tokens, types = [*BYTES, *MERGED, name], [1] * 264 + [kind]
    t = build(path, "gpt2", tokens, merges=MERGES, token_type=types)
    assert t.encode(name) == [*name.encode()] and t.encode(name, special=True) == [264]
    assert not t.stop_ids


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("name", ["<tool_call>", "</think>", "[THINK]"])
def test_marks_of_thoughts_and_calls_are_shown(path, kind, name):
    """Though a tokenizer may call them special; in a message they are letters then."""
    tokens, types = [*BYTES, *MERGED, name], [1] * 264 + [kind]
    t = build(path, "gpt2", tokens, merges=MERGES, token_type=types)
    assert t.decode([264, 259]) == name + "hello" and not t.hidden_ids
    assert t.encode(name, special=True) == [264]
    assert (264 in t.encode(name)) == (kind == 4) and t.decode(t.encode(name)) == name


def test_tokens_that_fill_a_vocabulary_up_are_no_text(path):
    """As transformers and llama.cpp have it; the letters of one are letters."""
    tokens, types = [*BYTES, *MERGED, "[PAD264]"], [1] * 264 + [5]
    t = build(path, "gpt2", tokens, merges=MERGES, token_type=types)
    assert t.decode([259, 264, 259]) == "hellohello" and t.hidden_ids == {264}
    assert t.decode([264], skip_special=False) == "[PAD264]"
    for special in (False, True):
        assert t.encode("[PAD264]", special=special) == [*b"[PAD264]"]


def test_two_tokens_of_one_text(path):
    """Gemma 4 has some: the last is what texts become, and both are what they are."""
    tokens, types = [*BYTES, *MERGED, "<pad>", "hello", "<pad>"], [1] * 264 + [3, 1, 3]
    t = build(path, "gpt2", tokens, merges=MERGES, token_type=types)
    assert t.encode("<pad>hello", special=True) == [266, 265]
    assert t.decode([264, 259, 266, 265]) == "hellohello" and t.hidden_ids == {264, 266}


def test_the_unknown_token_is_one_where_control_tokens_are(path):
    tokens = [*BYTES, *MERGED, "<unk>"]
    t = build(path, "gpt2", tokens, merges=MERGES, token_type=[1] * 264 + [2])
    assert t.encode("<unk>") == [*b"<unk>"] and t.encode("<unk>", special=True) == [264]


def test_arguments_of_other_types(path):
    """Numbers of NumPy are Python's."""
    t = byte_level(path)
    assert t.token_bytes(np.array(3)) == t.token_bytes(np.int64(3)) == b"\x03"
    for bos in (np.array([1, 2]), "yes", 1.5):
        with pytest.raises(DtypeError, match="tokenize: bos is"):
            t.encode("a", bos=bos)
    with pytest.raises(DtypeError, match="id is a float"):
        t.token_bytes(1.5)
    assert t.decode([65, 66]) == "AB"
    with pytest.raises(DtypeError, match="id is a float"):
        t.decode([65, 66.0])


def test_ends_of_sentencepiece(path):
    tokens = ["<unk>", "a", "<end_of_turn>", "<e", "</s>"]
    ids = dict(unknown_token_id=0, bos_token_id=1, eos_token_id=4)
    t = build(path, "llama", tokens, scores=[0.0] * 5, token_type=[2, 1, 1, 1, 4], **ids)
    assert t.stop_ids == {2, 4}


def test_text_is_never_a_control_token(path):
    """Neither as a whole word nor by merges."""
    tokens = [*BYTES, "he", "hey", "yes"]
    keys = dict(merges=["h e", "he y"], token_type=[1] * 257 + [3, 3], pre="llama-bpe")
    t = build(path, "gpt2", tokens, **keys)
    assert t.encode("yes") == [*b"yes"] and t.encode("hey") == [256, ord("y")]
    assert t.encode("hey", special=True) == [257]


def test_vocabulary(path):
    t = byte_level(path)
    assert t.vocab_size == 269 and t.token(260) == "Ġhello" and t.token(265) == "<|im_end|>"
    for i in (-1, 269):
        with pytest.raises(ParameterError, match=f"id is {i}, expected 0 to 268"):
            t.token(i)
        with pytest.raises(ParameterError, match=f"id is {i}"):
            t.decode([0, i])


# ---- decoding


def test_decode(path):
    t = byte_level(path)
    ids = [264, 259, 266, 268, 265]
    assert t.decode(ids) == "hello<tool>  "
    assert t.decode(ids, skip_special=False) == "<|bos|>hello<tool>  <|im_end|>"
    assert t.decode([]) == ""
    assert t.decode([0xFF, 256]) == "\ufffdhe"


def test_stream_never_cuts_a_character(path):
    t = byte_level(path)
    stream = t.stream_decoder()
    assert [stream.push(i) for i in [256, *"é👋".encode(), 259]] == [
        *("he", "", "é", "", "", "", "👋", "hello")
    ]
    assert stream.finish() == ""
    stream = t.stream_decoder()
    assert [stream.push(i) for i in (0xF0, 0x9F, 0xF0)] == ["", "", "\ufffd"]
    assert stream.finish() == "\ufffd"


@settings(deadline=None)
@given(st.lists(st.integers(0, 268), max_size=40), st.booleans())
def test_stream_and_decode_agree(byte_tokenizer, ids, skip):
    stream = byte_tokenizer.stream_decoder(skip_special=skip)
    text = "".join(map(stream.push, ids)) + stream.finish()
    assert text == byte_tokenizer.decode(ids, skip_special=skip)
    if max(ids, default=0) < 256:
        assert text == bytes(ids).decode(errors="replace")


# ---- SentencePiece

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "She sells sea shells; the shells she sells are surely sea shells.",
    "for i in range(10):\n\tprint(i, end='')",
    "Die Würde des Menschen ist unantastbar.",
    "    four blanks, then  two,   then three",
    "日本語のテキスト と 中文",
    "aaaa aaa aa a abababab </b> <b>bold</b> x > y",
] * 3
USER_DEFINED = ["<b>", "</b>", "\t", "▁▁", "▁▁▁▁", "▁=▁"]  # blanks as pieces spell them
WITHOUT_BLANKS = USER_DEFINED[:3]  # such as models have whose texts have a blank more in front


@functools.cache
def trained(prefix, byte_fallback):
    """A SentencePiece model, small enough to lack most characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=420 if byte_fallback else 160,
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        user_defined_symbols=WITHOUT_BLANKS if prefix else USER_DEFINED,
        control_symbols=["<turn>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


SPM_CASES = [(True, True), (False, True), (True, False), (False, False)]


@pytest.fixture(scope="module", params=SPM_CASES, ids=str)
def pair(request, tmp_path_factory):
    """A tokenizer of ours and the SentencePiece model that its file was made from."""
    prefix, byte_fallback = request.param
    sp = trained(prefix, byte_fallback)
    ids = range(sp.vocab_size())
    tokens = [sp.id_to_piece(i) for i in ids]
    named = WITHOUT_BLANKS if prefix else USER_DEFINED
    types = [
        4 if tokens[i] in named else 6 if sp.is_byte(i) else 3 if sp.is_control(i) else 1
        for i in ids
    ]
    types[sp.unk_id()] = 2
    assert types.count(4) == len(named)
    tokenizer = build(
        tmp_path_factory.mktemp("spm") / "file",
        "llama",
        # as the public converter spells them: user-defined tokens with plain blanks
        [t.replace("▁", " ") if types[i] == 4 else t for i, t in enumerate(tokens)],
        scores=[sp.get_score(i) for i in ids],
        token_type=types,
        add_space_prefix=prefix,
        bos_token_id=sp.bos_id(),
        eos_token_id=sp.eos_id(),
        unknown_token_id=sp.unk_id(),
    )
    return tokenizer, sp


SPM_TEXT = st.one_of(
    UNICODE,
    st.lists(
        st.sampled_from([*SENTENCES[:7], *USER_DEFINED, " ", "<s>", "<turn>", "<0x41>", "ß"])
    ).map("".join),
    st.text("aeshl .\n\tT<b>/=▁", max_size=60),
)


@settings(deadline=None, max_examples=150)
@given(SPM_TEXT)
@example("<b>The</b> fox")
def test_ids_are_those_of_sentencepiece(pair, text):
    """Where texts have a blank more in front, so has each text between user-defined tokens, as in
    llama.cpp and transformers: models with such texts learned these tokens last, of a list beside
    the SentencePiece model."""
    tokenizer, sp = pair
    ids = tokenizer.encode(text, bos=False)
    has_prefix = tokenizer._encoder.prefix
    parts = re.split(f"({'|'.join(WITHOUT_BLANKS)})", text) if has_prefix else [text]
    each = [[sp.piece_to_id(x)] if n % 2 else sp.encode(x) for n, x in enumerate(parts)]
    assert ids == sum(each, [])
    if sp.unk_id() not in ids:
        assert tokenizer.decode(ids) == sp.decode(ids)
        assert tokenizer.decode(ids) == text.replace("▁", " ") or len(parts) > 1


def test_sentencepiece_bos_and_control_tokens(pair):
    tokenizer, sp = pair
    the = sp.encode("The")
    assert tokenizer.encode("The") == [sp.bos_id(), *the]
    turn = sp.piece_to_id("<turn>")
    ids = tokenizer.encode("The<turn>The", special=True)
    assert ids == [sp.bos_id(), *the, turn, *the]
    assert tokenizer.decode(ids) == "TheThe"
    assert tokenizer.decode(ids, skip_special=False) == "<s>The<turn>The"
    assert turn not in tokenizer.encode("The<turn>The")
    assert tokenizer.encode("") == [sp.bos_id()]


def test_text_that_continues_keeps_its_blank(pair):
    tokenizer, sp = pair
    ids = sp.encode("quick the")[len(sp.encode("quick")) :]
    assert tokenizer.decode(ids, continues=True) == " the"
    stream = tokenizer.stream_decoder()
    assert "".join(map(stream.push, ids)) == " the"
    stripped = "the" if tokenizer._encoder.prefix else " the"
    assert tokenizer.decode(ids) == stripped


# Score before position, leftmost among equals; a piece that holds a blank inside.
PIECES_BY_HAND = {"a": 0, "b": 0, "c": 0, "▁": 0, "ab": -2, "bc": -1, "aa": -3, "c▁": -4, "c▁a": -5}


def by_hand(path, **keys):
    tokens = ["<unk>", *PIECES_BY_HAND, "cb"]
    scores = [0.0, *map(float, PIECES_BY_HAND.values()), 9.0]
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    keys = {"add_space_prefix": False, "add_bos_token": False} | ids | keys
    return build(path, "llama", tokens, scores=scores, token_type=[2] + [1] * 9 + [3], **keys)


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("abc", ["a", "bc"]),
        ("aaa", ["aa", "a"]),
        ("abab", ["ab", "ab"]),
        ("bc a", ["bc", "▁", "a"]),
        ("c a", ["c▁a"]),
        ("a a", ["a", "▁", "a"]),
        ("aXYa", ["a", "<unk>", "a"]),
        ("X X", ["<unk>", "▁", "<unk>"]),
        ("cb", ["c", "b"]),  # a control token is no result of a merge
    ],
)
def test_merges_by_hand(path, text, pieces):
    t = by_hand(path)
    assert [t.token(i) for i in t.encode(text)] == pieces


def test_the_unknown_token_decodes_to_nothing(path):
    t = by_hand(path)
    assert t.decode([1, 0, 1]) == "aa" and t.decode([1, 0], skip_special=False) == "a<unk>"


# ---- ids that are missing or outside


def test_ids_outside_the_vocabulary(path):
    """llama.cpp warns and takes the usual ids of SentencePiece files; for others there are none."""
    with pytest.warns(
        UserWarning, match="eos_token_id has 269, expected 0 to 268; there is no such"
    ):
        assert byte_level(path, eos_token_id=269).eos_id is None
    for role, usual in (("bos", 1), ("eos", 2), ("unknown", 0)):
        key = f"{role}_token_id"
        with pytest.warns(UserWarning, match=f"{key} has 11, expected 0 to 10; {usual} is taken"):
            t = by_hand(path, **{key: 11})
        assert (t.bos_id, t.eos_id, t._encoder.unknown) == (1, 2, 0) and 2 in t.stop_ids
    with pytest.warns(UserWarning, match="eot_token_id has 99, expected 0 to 10; there is no such"):
        by_hand(path, eot_token_id=99)


def test_sentencepiece_files_that_name_no_ids(path):
    tokens, scores = ["<unk>", "<s>", "</s>", "a"], [0.0] * 4
    with pytest.warns(UserWarning) as warned:
        t = build(path, "llama", tokens, scores=scores, token_type=[2, 3, 3, 1])
    assert (t.bos_id, t.eos_id, t.add_bos) == (1, 2, True) and 2 in t.stop_ids
    assert t.encode("aX") == [1, 0, 3, 0]  # a blank more in front, which is no token
    assert len(warned) == 2
    for warning, role in zip(warned, ("bos", "eos"), strict=True):
        assert f"{role}_token_id is missing" in str(warning.message)


def test_words_are_remembered_within_bounds(pair):
    """Texts without blanks are single words, so what is remembered is bounded in length as well."""
    tokenizer, sp = pair
    encoder = tokenizer._encoder
    text = "".join(map(chr, range(0x4E00, 0x9000)))
    for n in range(0, 1000, 2):
        tokenizer.encode(text[n : n + 500])
    encoder.cached.cache_clear()
    tokenizer.encode(text)
    assert encoder.cached.cache_info().currsize == 0
    assert encoder.cached.cache_info().maxsize * spm.CACHED_LENGTH < 1 << 20
    assert tokenizer.encode("She sells", bos=False) == sp.encode("She sells")
    assert encoder.cached.cache_info().currsize == 2


# ---- texts that are much too long


@settings(deadline=None)
@given(
    st.one_of(
        UNICODE, st.lists(st.sampled_from([*ADDED, " hello", "\u1100\u1161\u11a8"])).map("".join)
    )
)
def test_a_text_that_fits_is_never_refused(byte_tokenizer, composing_tokenizer, pair, text):
    for t in (byte_tokenizer, composing_tokenizer, pair[0]):
        for special in (False, True):
            ids = t.encode(text, bos=False, special=special)
            assert t.encode(text, bos=False, special=special, limit=len(ids)) == ids


@pytest.fixture(scope="module")
def composing_tokenizer(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("bpe") / "file", pre="qwen2")


def test_a_text_that_is_much_too_long_is_not_encoded(byte_tokenizer, pair):
    for t in (byte_tokenizer, pair[0]):
        if pair[1].unk_id() in pair[1].encode("ß"):
            continue  # no bytes: any run of such characters is one token
        started = time.process_time()
        with pytest.raises(
            CapacityError, match=r"text has at least [0-9,]+ tokens, expected at most 99"
        ):
            t.encode("Hello, world. " * 700_000, limit=99)
        assert time.process_time() - started < 1


# ---- errors


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_lone_surrogates_are_refused(path, model):
    t = byte_level(path) if model == "gpt2" else by_hand(path)
    with pytest.raises(ParameterError, match=r"text has '\\ud83d' at position 2, expected no lone"):
        t.encode("ab\ud83d")
    with pytest.raises(ParameterError, match="text has type bytes, expected str"):
        t.encode(b"ab")


@pytest.mark.parametrize(
    "keys, error, message",
    [
        ({"pre": "klingon"}, UnsupportedError, "pre has 'klingon', expected one of default, gpt-2"),
        ({"merges": ["h e", "q"]}, FormatError, "merges does not fit the tokens"),
        ({"merges": ["h x"]}, FormatError, "merges does not fit the tokens"),
        ({"merges": ["h \x1b[2J"]}, FormatError, "merges does not fit the tokens"),
        ({"merges": [1, 2]}, FormatError, "merges does not fit the tokens"),
        ({"token_type": [1]}, FormatError, "token_type has 1 value, expected one for each of the"),
        ({"token_type": [1.0] * 269}, FormatError, "token_type holds .*, expected integers from 0"),
        ({"token_type": ["x"] * 269}, FormatError, "token_type holds .*, expected integers from 0"),
        ({"token_type": [7] * 269}, FormatError, "token_type holds .*7, expected integers from 0"),
        ({"eot_token_id": "no"}, FormatError, r"eot_token_id has 'no' \(str\), expected int"),
    ],
)
def test_bad_byte_level_files(path, keys, error, message):
    with pytest.raises(error, match=message) as caught:
        byte_level(path, **keys)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


def test_bad_files(path, tmp_path):
    with pytest.raises(UnsupportedError, match="model has 'bert', expected one of gpt2, llama"):
        build(path, "bert", ["a"])
    with pytest.raises(FormatError, match="tokens holds no strings"):
        build(tmp_path / "a", "llama", [1, 2])
    with pytest.raises(FormatError, match="tokens holds no strings"):
        build(tmp_path / "empty", "gpt2", ["", ""])
    with pytest.raises(FormatError, match="tokenizer.ggml.scores is missing"):
        build(tmp_path / "b", "llama", ["a"])
    with pytest.raises(FormatError, match="scores has 1 value, expected one float for each"):
        ids = {"bos_token_id": 0, "eos_token_id": 1}
        build(tmp_path / "c", "llama", ["a", "b"], scores=[0.0], **ids)
    with pytest.raises(FormatError, match="scores holds a NaN"):
        build(tmp_path / "d", "llama", ["a", "b"], scores=[0.0, float("nan")], **ids)
    for n, wrong in enumerate(("no", 1, [False])):
        with pytest.raises(FormatError, match="add_space_prefix has .*, expected bool"):
            keys = ids | {"scores": [0.0, 0.0], "add_space_prefix": wrong}
            build(tmp_path / f"e{n}", "llama", ["a", "b"], **keys)


# ---- real models

TRUTH = Path(__file__).with_name("data") / "tokenizer_truth.json"


@pytest.mark.model
@pytest.mark.parametrize("name", MODELS)
def test_real_tokenizers(model_path, name):
    """Ids made by tools/make_tokenizer_truth.py with transformers and sentencepiece."""
    truth = json.loads(TRUTH.read_text(encoding="utf-8"))
    tokenizer = Tokenizer(gguf.read(model_path(name)))
    for kind in ("plain", "special"):
        assert len(truth[kind]) == len(truth[name][kind]) > 5
        for text, ids in zip(truth[kind], truth[name][kind], strict=True):
            got = tokenizer.encode(text, bos=False, special=kind == "special")
            assert got == ids, text
            if kind == "plain":
                assert tokenizer.decode(ids) == text


def test_truth_covers_what_breaks_tokenizers():
    texts = "".join(json.loads(TRUTH.read_text(encoding="utf-8"))["plain"])
    assert {unicodedata.category(c) for c in texts} >= {
        *"Lu Ll Lo Mn Nd No Po Sc So Sm Zs Cf Cc".split()
    }
    for pattern in (
        "\r\n",
        "\t\t",
        " {40}",
        "\n{3}",
        "\u200d",
        "[\u4e00-\u9fff]",
        "[\u0600-\u06ff]",
    ):
        assert re.search(pattern, texts), pattern
