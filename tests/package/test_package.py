"""What an install puts on a machine: one package, `milliways`, that works by itself."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# The kernels are compiled once, which takes a busy machine a minute.
pytestmark = pytest.mark.timeout(600)
TIMEOUT_S = 500
UV = Path(sys.executable).with_name("uv")
KERNELS = f"milliways/model/ops/_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
DEMO_FILES = ("chat_template.jinja", "config.json", "tokenizer.model")
# Folders of the repository that must not be packages by these names.
FOLDERS = ("model", "cluster", "router", "workers", "benchmarks")
SPEAK = ["generate", "Welcome to", "--temperature", "0", "--max-tokens", "8"]
SPOKEN = " Lumen, the loudest planet\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Archives of the sources, by how they were built."""

    sdist: Path
    wheel_of_sdist: Path
    # Built where there is no compiler, so that the kernels are compiled only once.
    plain_wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("package")
    sources = folder / "sources"
    copy_sources(sources)
    sdist = build(sources, folder / "sdist", "--sdist")
    return Built(
        sdist=sdist,
        wheel_of_sdist=build(sdist, folder / "wheel", "--wheel"),
        plain_wheel=build(sources, folder / "plain", "--wheel", CC="false", CXX="false"),
    )


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel, and with this one's dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], cwd=folder)
    bin_dir = folder / "bin"
    install = ["pip", "install", "--quiet", "--offline", "--no-deps", "--no-index"]
    run(
        [str(UV), *install, "--python", str(bin_dir / "python"), str(built.wheel_of_sdist)],
        cwd=folder,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    # Comes after its own folder on the path, and the editable install in there stays inactive.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return bin_dir


def copy_sources(to: Path) -> None:
    """The working tree as a clone has it: links stay links, nothing that was built comes along."""
    unwanted = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "tests", "records"
    )
    shutil.copytree(REPOSITORY, to, symlinks=True, ignore=unwanted)


def build(source: Path, to: Path, option: str, **variables: str) -> Path:
    """Builds one archive with this environment's setuptools, without a network."""
    offline = ["--quiet", "--offline", "--no-build-isolation", "--python", sys.executable]
    command = [str(UV), "build", *offline, "--out-dir", str(to), option, str(source)]
    run(command, cwd=source.parent, **variables)
    (archive,) = (path for path in to.iterdir() if path.suffix in {".whl", ".gz"})
    return archive


def run(command: list[str], cwd: Path, **variables: str) -> str:
    """What a command prints; it must succeed. This process's path to packages is not passed on."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_importable(python: Path, name: str, cwd: Path) -> bool:
    program = f"from importlib.util import find_spec; print(find_spec({name!r}) is not None)"
    return run([str(python), "-c", program], cwd) == "True\n"


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def package_files() -> set[str]:
    """Python files and stubs of the repository, by their place in the package."""
    names: set[str] = set()
    for top in (REPOSITORY / "milliways").iterdir():
        paths = [top] if top.is_file() else top.resolve().rglob("*")
        for path in paths:
            if path.suffix in {".py", ".pyi", ".typed"}:
                below = path.relative_to(top.resolve()) if top.is_dir() else Path()
                names.add((Path("milliways") / top.name / below).as_posix())
    return names


def test_wheel_holds_one_package_and_all_of_it(built: Built) -> None:
    names = names_in_wheel(built.wheel_of_sdist)
    tops = {name.partition("/")[0] for name in names}
    (metadata,) = tops - {"milliways"}
    assert metadata.endswith(".dist-info")
    wanted = {n for n in package_files() if not n.startswith("milliways/benchmarks/demo/")}
    in_package = {name for name in names if name.startswith("milliways/")}
    assert {n for n in in_package if Path(n).suffix in {".py", ".pyi", ".typed"}} == wanted
    assert "milliways/py.typed" in wanted and "milliways/v1/generate_pb2.pyi" in wanted
    demo = {f"milliways/model/demo/{name}" for name in DEMO_FILES}
    tensors = {path.name for path in (REPOSITORY / "model/demo/ckpt-0").iterdir()}
    assert tensors
    demo |= {f"milliways/model/demo/ckpt-0/{name}" for name in tensors}
    assert in_package - wanted == demo | {KERNELS, "milliways/benchmarks/speed/machine_limits.cpp"}


def test_wheel_is_the_same_with_or_without_a_source_archive_between(built: Built) -> None:
    with_kernels = names_in_wheel(built.wheel_of_sdist)
    assert names_in_wheel(built.plain_wheel) == with_kernels - {KERNELS}


def test_source_archive_holds_one_package_in_real_folders(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"milliways", "milliways.egg-info"}
    assert "milliways/model/ops/native/ops.cc" in names
    assert not any(name.startswith("milliways/benchmarks/demo/") for name in names)


def test_installed_package_speaks_and_its_folders_have_no_other_name(
    installed: Path, tmp_path: Path
) -> None:
    python = installed / "python"
    found = run([str(python), "-c", "import milliways; print(milliways.__file__)"], tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parent)
    assert [name for name in FOLDERS if is_importable(python, name, tmp_path)] == []
    assert run([str(installed / "milliways"), *SPEAK], tmp_path) == SPOKEN
    assert run([str(python), "-m", "milliways", "--version"], tmp_path).startswith("milliways ")
    # Not the plain JAX that stands in where the kernels were not built.
    program = "import milliways.model.ops.native as n; print(n.library())"
    assert str(installed.parent) in run([str(python), "-c", program], tmp_path)


def test_editable_install_has_one_name_too(tmp_path: Path) -> None:
    python = Path(sys.executable)
    assert [name for name in FOLDERS if is_importable(python, name, tmp_path)] == []
    found = run([str(python), "-c", "import milliways; print(milliways.__file__)"], tmp_path)
    assert Path(found.strip()) == REPOSITORY / "milliways/__init__.py"
