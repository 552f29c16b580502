"""What is published: the wheel runs by itself, and the source archive holds what its tests read."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
pytestmark = pytest.mark.full


def run(*command: str | Path, at: Path, **env: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=at, env=kept | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """Where the build backend is; without it nothing is built, and no fault of ours is hidden by that."""
    folder = tmp_path_factory.mktemp("backend")
    command = [*PIP, "install", "--target", folder, "hatchling"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot fetch hatchling here: {done.stderr.strip().splitlines()[-1]}")
    return str(folder)


def test_the_wheel_composes_a_run_in_an_empty_folder(tmp_path, backend):
    built, empty = tmp_path / "built", tmp_path / "empty"
    empty.mkdir()
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir")
    run(*PIP, "wheel", *options, built, REPOSITORY, at=empty, PYTHONPATH=backend)
    (wheel,) = built.glob("*.whl")

    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python, door = environment / "bin" / "python", environment / "bin" / "mixlora-train"
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel, at=empty)
    # The packages of this environment, but not this checkout, which an editable install would have added.
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", at=empty).strip())
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "this_environment.pth").write_text("\n".join(sorted(here)))

    origin = Path(run(python, "-c", "import mixlora; print(mixlora.__file__)", at=empty).strip())
    assert packages in origin.parents
    assert (origin.parent / "py.typed").is_file()  # so that type checkers read its annotations
    composed = run(door, "--cfg", "job", "+method=smora", "+tasks=commonsense", at=empty)
    assert "name: smora" in composed
    assert "name: commonsense" in composed
    assert not list(empty.iterdir())


def test_the_source_archive_holds_what_is_tracked(tmp_path, backend):
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("needs the git checkout, to know what belongs to the project")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, at=REPOSITORY, PYTHONPATH=backend)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    seen = {name for name in tracked.stdout.splitlines() if not name.startswith(".") and (REPOSITORY / name).is_file()}
    assert not seen - held
