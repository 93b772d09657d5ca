"""What goes to the hub, in what order, and whether it arrived; against a stand-in of the hub."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.card.publish import pack
from halfbyte.cli.main import main
from halfbyte.errors import UsageError
from halfbyte.model.tiny import write_tiny_checkpoint
from hub_stand_in import NAME, Hub, serving_hub

pytest.importorskip("huggingface_hub", reason="extra 'hub' is not installed")

# The hub's client calls httpx the old way when it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TEKKEN = Path(__file__).parents[1] / "data" / "chat" / "tekken" / "tekken.json"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # The stand-in speaks the plain way of sending large files.
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    with serving_hub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "small"
    write_tiny_checkpoint(path, layers=2)
    shutil.copy(TEKKEN, path)
    return path


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_shows_what_would_go_and_touches_nothing(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(folder)
    (folder / "notes.log").write_text("x")
    assert main(["publish", str(folder), NAME, "--endpoint", hub.url]) == 0
    said = capsys.readouterr().out
    for name in (*before, "README.md"):
        assert f"  {name}\n" in said
    assert "stays here: notes.log" in said and "nothing was sent" in said
    for word in ("base model is not named", "licence is not named", "no contact", "no evaluation"):
        assert word in said
    assert names(folder) == before | {"notes.log"} and not hub.exists


def test_what_is_sent_arrives_privately_and_is_made_public_when_told(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["publish", str(folder), NAME, "--upload", "--endpoint", hub.url]
    assert main([*command, "--licence", "apache-2.0", "--base-model", "some/base"]) == 0
    assert "hashes equal (private" in capsys.readouterr().out
    assert hub.private and set(hub.files) == names(folder) | {"README.md"}
    assert all(len(commit) == 1 for commit in hub.commits)
    assert hub.commits[0][0].endswith(".safetensors")
    for name in names(folder):
        assert hub.files[name] == (folder / name).read_bytes()
    assert b"license: apache-2.0" in hub.files["README.md"]
    sent = len(hub.commits)
    assert main([*command, "--public", "--licence", "apache-2.0", "--base-model", "some/base"]) == 0
    assert not hub.private and len(hub.commits) == sent  # everything was there
    assert main([*command, "--licence", "mit"]) == 2
    assert "is public already" in capsys.readouterr().err


def test_an_interrupted_upload_goes_on_with_what_is_missing(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fails_at = 3
    command = ["publish", str(folder), NAME, "--upload", "--public", "--endpoint", hub.url]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "error: " in said and "same command goes on" in said and "Traceback" not in said
    assert len(hub.commits) == 2 and hub.private
    assert main(command) == 0
    flat = [name for commit in hub.commits for name in commit]
    assert len(flat) == len(set(flat)) == len(names(folder)) + 1 and not hub.private


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json"])
def test_what_arrives_damaged_is_said_and_stays_private(
    folder: Path, hub: Hub, damaged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    hub.damages = shards[0] if damaged.endswith(".safetensors") else damaged
    command = ["publish", str(folder), NAME, "--upload", "--public", "--endpoint", hub.url]
    assert main(command) == 2
    assert f"{hub.damages} did not arrive as sent" in capsys.readouterr().err
    assert hub.private


def test_a_private_place_in_a_text_keeps_everything_here(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "NOTES.md").write_text("made in /home/ann/runs on gpu07.corp")
    command = ["publish", str(folder), NAME, "--endpoint", hub.url]
    assert main(command) == 1
    assert "NOTES.md holds a host: gpu07.corp" in capsys.readouterr().out
    assert main([*command, "--upload"]) == 2
    assert not hub.exists
    assert main([*command, "--upload", "--accept", "NOTES.md"]) == 0
    assert "NOTES.md" in hub.files


def test_a_damaged_checkpoint_is_not_published(folder: Path, hub: Hub) -> None:
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["publish", str(folder), NAME, "--upload", "--endpoint", hub.url]) == 1
    assert not hub.exists


def test_only_files_of_a_checkpoint_go(folder: Path) -> None:
    (folder / "README.md").write_text("card")
    for name in (
        ".git/config",
        "evaluation/a.json",
        "evaluation/a.html",
        ".env",
        "x.bin",
        "d/x.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "lost.json").symlink_to(folder / "nowhere")
    parcel = pack(folder)
    assert "evaluation/a.json" in parcel.files and "config.json" in parcel.files
    for name in (".git", "evaluation/a.html", ".env", "x.bin", "d", "lost.json"):
        assert name in parcel.left_out
    (folder / "README.md").unlink()
    with pytest.raises(UsageError, match=r"has no README\.md"):
        pack(folder)


def test_what_quantize_writes_may_be_published(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of an export's own files are no keys, and its manifest holds no place."""
    write_tiny_checkpoint(tmp_path / "fp8", layers=6, dialect="mistral-fp8")
    quantize = ["quantize", str(tmp_path / "fp8"), str(tmp_path / "mixed"), "--log-level", "error"]
    assert main([*quantize, "--recipe", "medium-3.5", "--method", "none"]) == 0
    command = ["publish", str(tmp_path / "mixed"), NAME, "--upload", "--endpoint", hub.url]
    capsys.readouterr()
    assert main([*command, "--licence", "apache-2.0"]) == 0
    assert "not to be published" not in capsys.readouterr().out
    assert "hf_quant_config.json" in hub.files
