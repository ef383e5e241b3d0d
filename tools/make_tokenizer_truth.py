"""Make tests/llm/data/tokenizer_truth.json: texts and the ids that the reference tokenizers give.

Run with transformers, sentencepiece, protobuf and gguf installed:

    python tools/make_tokenizer_truth.py SMOLLM2.gguf GEMMA3.gguf

SmolLM2: transformers' own conversion of the file, with the pre-tokenizer replaced by the one in
the model's tokenizer.json (single digits, then GPT-2's expression): the conversion ignores
tokenizer.ggml.pre. Gemma 3: SentencePiece on a model made of the file's pieces and scores, and
transformers for texts with control tokens, which SentencePiece never reads. transformers is also
asked for the rest and must agree, but for runs of more than 16 blanks, which it cuts into
sixteens where SentencePiece takes the longest token.
"""

import json
import random
import sys
from pathlib import Path
from pydoc_data import topics

import gguf
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

OUT = Path(__file__).parents[1] / "tests" / "llm" / "data" / "tokenizer_truth.json"

PLAIN = [
    *("", " ", "  ", "\n", "a", "Hello world", " leading", "trailing ", "Hello  world   !"),
    *("don't DON'T I'll we've 'tis", "1 12 123 1234 12345.678 ½ ² Ⅳ ٣٤", "x = y+1; z != 0 && !q"),
    "def f(x):\n    if x:\n        return {'a': [1, 2], \"b\": x ** 2}\n\n\n",
    '#include <stdio.h>\nint main(void) {\n\tprintf("%d\\n", 0x1F);\n\t\treturn 0;\n}\n',
    *("line\r\nline\r\n\r\nend", "tab\t\ttabs\t\t\t.", " " * 40 + "x" + " " * 17 + "y", "a\n\n\nb"),
    *("Grüße aus Köln, ça va? Ærø", "Zażółć gęślą jaźń", "Ελληνικά και ΚΕΦΑΛΑΙΑ", "Привет, мир!"),
    *("日本語のテキスト、カタカナ。", "汉字和English混排123", "한국어 문장입니다", "ไม่มีช่องว่าง"),
    *("مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "e\u0301 vs é", "\ufeffBOM", "zero\u200bwidth"),
    *(
        "👋🏽 👩‍👩‍👧‍👦 🇩🇪 ❤️",
        "😀" * 5,
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠮷",
        "€ £ ¥ ₿ ± ≠ → ∞",
        "a\u00a0b\u3000c\u2028d",
        "—–…“”‘’«»",
    ),
    *(
        "http://example.org/a?b=c&d=%20#e",
        "user@example.com",
        "C:\\dir\\file.txt",
        "\x01\x7f\x1b[0m",
    ),
    *("<h1>Title</h1> <b>x</b> </s> <table>", "> </p> > </b>", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
    *(
        "ALLCAPS CamelCase snake_case kebab-case",
        "Donaudampfschifffahrtsgesellschaft",
        "~~~~~=====-----",
    ),
]
SPECIAL = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<bos>text<eos>",
    "<|endoftext|><|endoftext|>x",
    "a <|im_end|> b <end_of_turn> c",
    "<|im_end <|im_end|",
]


def texts():
    """The fixed texts, and lines and passages of Python's own documentation."""
    rng = random.Random(0)
    prose = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    lines = [line for line in prose.split("\n") if len(line) > 30]
    starts = [rng.randrange(len(prose) - 400) for _ in range(12)]
    return PLAIN + rng.sample(lines, 60) + [prose[at : at + 400] for at in starts]


def converted(path):
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer


def ids(tokenizer, items):
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in items]


def sentencepiece_of(path):
    """SentencePiece on the pieces, types and scores of a GGUF file."""
    fields = gguf.GGUFReader(path).fields
    tokens, kinds, scores = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "scores")
    )
    unknown = fields["tokenizer.ggml.unknown_token_id"].contents()
    model = sentencepiece_model_pb2.ModelProto()
    for i, (token, kind, score) in enumerate(zip(tokens, kinds, scores, strict=True)):
        spelled = token.replace(" ", "\u2581") if kind == 4 else token
        model.pieces.add(piece=spelled, type=2 if i == unknown else kind, score=score)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id = unknown
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def main(smollm2, gemma3):
    plain = texts()
    smol = converted(smollm2)
    smol.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    gemma = converted(gemma3)
    pieces = sentencepiece_of(gemma3)
    for text in plain:
        assert " " * 17 in text or pieces.encode(text) == ids(gemma, [text])[0], text
    truth = {
        "plain": plain,
        "special": SPECIAL,
        "smollm2-135m": {"plain": ids(smol, plain), "special": ids(smol, SPECIAL)},
        "gemma3-270m": {
            "plain": [pieces.encode(text) for text in plain],
            "special": ids(gemma, SPECIAL),
        },
    }
    OUT.write_text(json.dumps(truth, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size} bytes, {len(plain) + len(SPECIAL)} texts")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
