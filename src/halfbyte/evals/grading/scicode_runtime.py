"""What SciCode's tests need inside the sandbox: expected values from HDF5 and three comparisons.

Copied beside the tests, never imported by the package; runs under the interpreter of generated
code (NumPy below 2, SciPy 1.10 to 1.13). The names of the comparisons are those the tests import.
Source: layouts and comparison rules of scicode-bench/SciCode, stated in
docs/reference/scoring.md#scicode.
"""

# mypy: disable-error-code="import-untyped,no-untyped-call"
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import scipy.sparse


def harden() -> None:
    """Let an empty result equal only an empty target.

    NumPy stretches shapes before it compares, and of an empty array with a number nothing is left
    that could differ: `allclose([], 5)` is true.
    """
    allclose, isclose = np.allclose, np.isclose

    def both_or_none_empty(one: Any, two: Any) -> bool:
        return bool((np.size(one) == 0) == (np.size(two) == 0))

    def strict_allclose(a: Any, b: Any, *more: Any, **named: Any) -> bool:
        return both_or_none_empty(a, b) and bool(allclose(a, b, *more, **named))

    def strict_isclose(a: Any, b: Any, *more: Any, **named: Any) -> Any:
        return isclose(a, b, *more, **named) if both_or_none_empty(a, b) else np.False_

    np.allclose, np.isclose = strict_allclose, strict_isclose


def _is_symbol(value: Any) -> bool:
    # Half a second to import, and only the steps whose code has it can have symbols.
    sympy = sys.modules.get("sympy")
    return sympy is not None and isinstance(value, sympy.Symbol)


def read_targets(path: str, step: str, num_tests: int) -> list[Any]:
    """Expected values of one step, one per test; several variables of a test become a tuple."""
    with h5py.File(path, "r") as file:
        targets = []
        for number in range(1, num_tests + 1):
            values = [_read(variable) for variable in file[f"{step}/test{number}"].values()]
            targets.append(values[0] if len(values) == 1 else tuple(values))
    return targets


def _read(node: Any) -> Any:
    if isinstance(node, h5py.Dataset):
        return _plain(node)
    # Only the first member decides what a group is, as where the files come from.
    first = next(iter(node), None)
    if first == "list":
        return [member[()] for member in node["list"].values()]
    if first == "sparse_matrix":
        return _sparse(node["sparse_matrix"])
    return {_number_or_name(name): _member(member) for name, member in node.items()}


def _member(node: Any) -> Any:
    return _sparse(node["sparse_matrix"]) if isinstance(node, h5py.Group) else _plain(node)


def _plain(dataset: Any) -> Any:
    value = dataset[()]
    return value.decode() if isinstance(value, bytes) else value


def _number_or_name(name: str) -> Any:
    try:
        return float(name)
    except ValueError:
        return name


def _sparse(group: Any) -> Any:
    part = {name: member[()] for name, member in group.items()}
    shape = tuple(part["shape"])
    if "row" in part:
        return scipy.sparse.coo_matrix((part["data"], (part["row"], part["col"])), shape=shape)
    compressed = (part["data"], part["indices"], part["indptr"])
    if "blocksize" in part:
        return scipy.sparse.bsr_matrix(compressed, shape=shape, blocksize=tuple(part["blocksize"]))
    return scipy.sparse.csr_matrix(compressed, shape=shape)


def _close(one: Any, two: Any, atol: float = 1e-8, rtol: float = 1e-5) -> bool:
    """Numerically close; what is no number must be equal."""
    try:
        return bool(np.allclose(one, two, atol=atol, rtol=rtol))
    except ValueError:
        return bool(one == two)


def are_csc_matrix_close(matrix1: Any, matrix2: Any) -> bool:
    """Compare two sparse matrices entry by entry, with numpy's tolerances."""
    return bool(np.allclose(matrix1.toarray(), matrix2.toarray()))


def are_dicts_close(
    dict1: Mapping[Any, Any], dict2: Mapping[Any, Any], atol: float = 1e-8, rtol: float = 1e-5
) -> bool:
    """Two dictionaries: same keys, close values; symbols count by their names."""
    one, two = _without_symbols(dict1), _without_symbols(dict2)
    if one.keys() != two.keys():
        return False
    for key, value in one.items():
        other = two[key]
        if _is_symbol(value) or isinstance(value, str):
            same = bool(value == other)
        elif scipy.sparse.issparse(value):
            same = bool(np.allclose(value.toarray(), other.toarray(), atol=atol, rtol=rtol))
        else:
            same = _close(value, other, atol, rtol)
        if not same:
            return False
    return True


def _without_symbols(given: Mapping[Any, Any]) -> dict[Any, Any]:
    plain = {}
    for key, value in given.items():
        name = str(key) if _is_symbol(key) else key
        # A value under a symbol stays a symbol, one under any other key becomes its name.
        keep = _is_symbol(key) or not _is_symbol(value)
        plain[name] = value if keep else str(value)
    return plain


def cmp_tuple_or_list(var1: Sequence[Any], var2: Sequence[Any]) -> bool:
    """Two sequences, member by member: dictionaries, sparse matrices, truth values, numbers."""
    return len(var1) == len(var2) and all(map(_same_member, var1, var2))


def _same_member(one: Any, two: Any) -> bool:
    compare: Callable[[Any, Any], bool] = _close
    if isinstance(one, dict):
        compare = are_dicts_close
    elif scipy.sparse.isspmatrix_csr(one) or scipy.sparse.isspmatrix_csc(one):
        compare = are_csc_matrix_close
    elif isinstance(one, bool):
        return bool(one == two)
    return compare(one, two)
