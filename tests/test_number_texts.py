"""Numbers in texts: what Python takes beside ASCII digits is refused by name, everywhere."""

import pytest

from pykv import cuda, eviction
from pykv.bench import options
from pykv.cli import main
from pykv.errors import ParameterError
from pykv.eval import commands
from pykv.number_texts import number_of, whole_of
from pykv.tiers import sizes

ODD = ["1_0", " 3", "3 ", "3\n", "+3", "٣", "３", ""]  # Arabic and full-width digits
odd = pytest.mark.parametrize("text", ODD)


def test_what_numbers_are():
    assert [whole_of(x, -9) for x in ("0", "007", "-9", "9" * 18)] == [0, 7, -9, 10**18 - 1]
    for text in (*ODD, "-1", "1.0", "1e3", "9" * 19, "9" * 5000, "x"):
        assert whole_of(text) is None
    assert whole_of("8", 9) is None and whole_of("8", most=7) is None
    for text in ("0", "-2", "0.5", ".5", "5.", "1e-3", "-2.5E+2", "1e999"):
        assert number_of(text) == float(text)
    for text in (*ODD, "1_0.5", "0.5_5", " .5", "nan", "inf", "0x1", ".", "-", "1e", "9" * 5000):
        assert number_of(text) is None


@odd
def test_policies(text):
    for written in (f"streaming:{text}", f"streaming:8:sinks={text}", f"random:ratio={text}"):
        with pytest.raises(ParameterError, match=r"(?s)text .* has .*, expected a number"):
            eviction.parse(written)


@odd
def test_options(text, capsys):
    for argv, kind in (
        (["bench", "mailbox", "--samples", text], "int"),
        (["run", "--max-tokens", text, "prompt"], "int"),
        (["run", "--temperature", text, "prompt"], "float"),
        (["verify", f"--seed={text}"], "int"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        assert f"invalid {kind} value: {text!r}" in capsys.readouterr().err


@odd
def test_lists_of_options(text):
    for option in ("pages", "keep"):
        with pytest.raises(ParameterError, match=rf"bench gather: --{option} has .*, expected a "):
            options.read("gather", options.OPTIONS[option], text)
    if text.strip() == text:
        with pytest.raises(ParameterError, match="--keys has .*, expected whole numbers"):
            commands._whole("--keys", text)


@odd
def test_sizes_and_ratios(text):
    for size in (f"{text}GiB", f"1.{text}GiB") if text != "3 " else ():  # as "3 GiB" is a size
        with pytest.raises(ParameterError, match="op: size is .*, expected a size such as '4GiB'"):
            sizes.parse_bytes("op", "size", size)
    assert sizes.artefact_of(f"file:{text}") is None


@odd
def test_devices(text):
    if text:
        with pytest.raises(ParameterError, match=r"device is .*, expected auto, cpu, cuda or"):
            cuda.use_device(f"cuda:{text}")
    with pytest.raises(ParameterError, match=r"cuda.compile: arch is .*, expected sm_75"):
        cuda.compile("norm", f"sm_{text}")
