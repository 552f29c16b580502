"""A bare copy of the running Python: the interpreter, its standard library and what runs inside the box; no packages.

A copy (25 MB, 0.1 s, removed with the sandbox) rather than the installation itself: that may lie under /root or /home,
where the unprivileged user of the box cannot reach, and beside it lie packages, data sets and their reference answers.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from mixlora.errors import SandboxError

NEEDLESS = [
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "venv",
    "distutils",
    "pydoc_data",
    "config-*",
    "*.a",
    "*.opt-1.pyc",
    "*.opt-2.pyc",
]
# what extension modules of the standard library link to, where an installation (conda, uv) brings its own
LIBRARIES = [
    "libpython*",
    "libssl*",
    "libcrypto*",
    "libffi*",
    "libz.*",
    "liblzma*",
    "libbz2*",
    "libexpat*",
    "libmpdec*",
    "libgcc_s*",
]

PYTHON = "bin/python3"
COMMAND = ["-s", "-S", "-B", "-X", "utf8", "-c", "from boxed.inside import main; main()"]


def copy_python(folder: Path) -> None:
    """Fill `folder` with bin/python3, lib/pythonX.Y, lib/*.so and boxed/, readable by everybody.

    Raises:
        SandboxError: where the disk is full or the installation is not laid out as usual.
    """
    prefix, library = Path(sys.base_prefix), Path(sysconfig.get_path("stdlib"))
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    try:
        target = folder / library.relative_to(prefix)
        shutil.copytree(library, target, ignore=shutil.ignore_patterns(*NEEDLESS))
        (folder / "bin").mkdir()
        shutil.copy(executable, folder / PYTHON)
        if prefix != Path("/usr"):
            for pattern in LIBRARIES:
                for file in (prefix / "lib").glob(pattern):
                    if file.is_file() and file.suffix != ".a":
                        shutil.copy(file, folder / "lib" / file.name)
        shutil.copytree(Path(__file__).parent / "boxed", folder / "boxed")
    except (OSError, shutil.Error, ValueError) as error:
        raise SandboxError(
            f"cannot copy the Python of {prefix} to {folder} for the sandbox: {str(error)[:300]}. "
            "It needs 40 MB there; TMPDIR chooses another place."
        ) from error
    folder.chmod(0o755)


def environment(root: str | os.PathLike[str]) -> dict[str, str]:
    """All of the environment that boxed code sees; `root` is where it finds the copy.

    -I would ignore PYTHONHASHSEED, and with a random one a solution that lists a set passes today and fails tomorrow.
    What -I keeps out (other variables, the user's packages, the current folder) is not there.
    """
    return {"PYTHONHASHSEED": "0", "PYTHONPATH": f"{root}", "LD_LIBRARY_PATH": f"{root}/lib"}
