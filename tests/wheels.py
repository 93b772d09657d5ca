"""The wheel of this clone, built without the network, and a command that runs it from elsewhere."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]


def tracked(*folders: str) -> list[str]:
    """Files that git tracks and that are there, by their path from the root."""
    names = subprocess.run(
        ["git", "ls-files", "-z", *folders], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True
    ).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


def build_wheel(folder: Path) -> Path:
    """The wheel, from the tracked files alone, with what is installed here."""
    source = folder / "source"
    for name in tracked("src", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [*_PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True)
    (built,) = folder.glob("halfbyte-*.whl")
    return built


def unpack(wheel: Path, target: Path) -> Path:
    """Where the wheel was unpacked, which is all that installing one of Python files is."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def command_of(installed: Path, folder: Path) -> Path:
    """A folder for PATH that holds `halfbyte`, as an installation puts it there."""
    folder.mkdir()
    script = folder / "halfbyte"
    script.write_text(
        f"#!{sys.executable}\nimport sys; sys.path.insert(0, {str(installed)!r})\n"
        "from halfbyte.cli.main import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return folder
