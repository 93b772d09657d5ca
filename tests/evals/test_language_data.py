"""Where the language data of instruction-following lies, and what is said where a package is not.

Apart from `test_constraints`, which is left out where the data is not found.
"""

import sys

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
    [("if_verifiable.ifbench", "needs if-verifiable"), ("nltk", "if-verifiable and nltk")],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, said: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    make = constraints._package if "ifbench" in module else constraints._nltk
    with pytest.raises(UnsupportedError, match=said) as caught:
        make.__wrapped__()
    assert "pip install 'halfbyte[eval]'" in str(caught.value)
