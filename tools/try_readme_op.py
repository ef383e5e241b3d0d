"""Follow kernels_cu/README.md in a scratch copy: add its example op, then run what an op must pass.

    python tools/try_readme_op.py

The example is three fenced blocks, and the first line of each is a comment with the file's path:
kernels_cu/<stem>.cu, pykv/ops/<stem>.py and tests/ops/test_<stem>.py. Nothing else is added or
changed. Needs a C++ compiler and NVRTC, but no GPU.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "kernels_cu" / "README.md"
BLOCK = re.compile(
    r"^```\w+\n((?://|#) (\S+/\w+\.\w+)\b[^\n]*\n.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(text):
    """{path: contents} of the example's files, and its stem."""
    files = {path: contents for contents, path in BLOCK.findall(text)}
    stem = next((Path(path).stem for path in files if path.endswith(".cu")), "<stem>")
    wanted = {f"kernels_cu/{stem}.cu", f"pykv/ops/{stem}.py", f"tests/ops/test_{stem}.py"}
    if set(files) != wanted:
        raise SystemExit(f"{README}: blocks are {sorted(files)}, expected {sorted(wanted)}")
    return files, stem


def copy_tree(to):
    """The working tree, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # git lists files that were deleted but not yet committed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def run(tree, *arguments):
    """What `python -m` with these arguments prints, from a tree; ends the script if it fails."""
    print("+ python -m", *arguments, flush=True)
    env = {**os.environ, "PYTHONPATH": str(tree), "PYKV_REQUIRE_SIMT": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(f"python -m {' '.join(arguments)}: exit code {done.returncode}")
    return done.stdout


def main():
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    files, stem = blocks(README.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        for path, contents in files.items():
            if (tree / path).exists():
                raise SystemExit(f"{README}: {path} exists already, expected a new op")
            (tree / path).write_text(contents, encoding="utf-8")
        pytest = ["pytest", "-q", "-p", "no:cacheprovider"]
        run(tree, *pytest, f"tests/ops/test_{stem}.py")
        run(tree, *pytest, "tests/test_kernels_compile.py", "-k", stem)
        if stem not in run(tree, "pykv", "verify"):
            raise SystemExit(f"pykv verify does not name {stem}")
        run(tree, *pytest, "tests/test_verify.py", "-k", f"{stem} or family or public")
        run(tree, *pytest, "tests/test_docs.py")
        every_kernel = f"test_every_kernel_runs and {stem}"
        run(tree, *pytest, "tests/simt/test_machine.py", "-k", every_kernel)


if __name__ == "__main__":
    main()
