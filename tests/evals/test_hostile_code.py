"""Generated code that tries to pass without solving anything: none does, and right code does.

Every program goes through the path of a real attempt. The step is small: a run takes a second.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.evals.grading import scripts
from halfbyte.evals.sandbox import Outcome, SandboxLimits, interpreter, isolation, run_program
from halfbyte.evals.types import Score

h5py = pytest.importorskip("h5py", reason="the interpreter of generated code needs h5py")

try:
    isolation()
except UnsupportedError as _reason:
    pytest.skip(f"no sandbox on this machine: {_reason}", allow_module_level=True)

LIMITS = SandboxLimits(wall_s=10, cpu_s=5, memory_bytes=1 << 30, disk_bytes=4 << 20, processes=16)
TOKEN = "every-test-held"
TESTS = [
    "x = 3.0\nassert np.allclose(f(x), target)",
    "assert np.allclose(f(np.arange(4.0)), target)",
    "assert (f(2.0) > 4.9 and f(2.0) < 5.1) == target",
    "from scicode.compare.cmp import cmp_tuple_or_list\n"
    "assert cmp_tuple_or_list((f(1.0), f(0.0)), target)",
]
STEP = {
    "step_number": "9.1",
    "function_header": "def f(x):\n    '''x squared, plus one'''",
    "test_cases": TESTS,
}
PROBLEM = {"required_dependencies": "import numpy as np", "sub_steps": [STEP]}
STUB = "def f(x):\n    return None\n"


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scicode") / "targets.h5"
    with h5py.File(path, "w") as file:
        file["9.1/test1/var1"] = 10.0
        file["9.1/test2/var1"] = np.arange(4.0) ** 2 + 1
        file["9.1/test3/var1"] = True
        file["9.1/test4/var1"] = 2.0
        file["9.1/test4/var2"] = 1.0
    return path


def grade(
    targets: Path, code: str, problem: dict[str, Any] = PROBLEM, limits: SandboxLimits = LIMITS
) -> tuple[Score, Outcome]:
    program = scripts.step_program(problem, 0, [code], str(targets), TOKEN)
    outcome = run_program(interpreter(sys.executable), program, limits=limits, visible=[targets])
    return scripts.grade_step(code, outcome, TOKEN), outcome


# Each tries something else; the last part of a name says what it counts on.
HOSTILE = {
    # The eight ways that once worked.
    "reads its own program for the token": STUB + (
        "import os\nprint(open('/box/program.py').read()[-400:], flush=True)\nos._exit(0)"),
    "makes allclose true": STUB + "np.allclose = lambda *a, **k: True",
    "takes the target from its caller": (
        "import sys\ndef f(x):\n    g = sys._getframe()\n    while g:\n"
        "        if 'target' in g.f_globals: return g.f_globals['target']\n        g = g.f_back\n"),
    "returns what equals everything": (
        "class E(float):\n    __eq__ = __lt__ = __gt__ = lambda s, o: True\n"
        "    __sub__ = __rsub__ = lambda s, o: 0.0\n    __array_priority__ = 1e9\n"
        "    def __array_ufunc__(s, *a, **k): return np.array(True)\n"
        "    def __array_function__(s, *a): return True\n"
        "def f(x): return E(0)\n"),
    "replaces the runtime": STUB + (
        "import sys, types\nfor n in ('scicode_runtime', 'scicode_wire', 'scicode_tester'):\n"
        "    m = types.ModuleType(n); m.__getattr__ = lambda name: (lambda *a, **k: True)\n"
        "    sys.modules[n] = m\n"),
    "prints from the exception hook": STUB + (
        f"import sys, os\nsys.excepthook = lambda *a: (print('{TOKEN}', flush=True), os._exit(0))\n"
        "raise ValueError"),
    "prints at exit": STUB + (
        "import atexit, os\n"
        f"atexit.register(lambda: (print('\\n{TOKEN}', flush=True), os._exit(0)))\n"
        "raise SystemExit"),
    "has a numpy of its own": STUB + (
        "class np:\n    allclose = staticmethod(lambda *a, **k: True)\n    arange = range"),
    # And more.
    "defines the target": STUB + "target = None\ndef f(x): return target",
    "defines the comparison": STUB + (
        "cmp_tuple_or_list = lambda *a: True\nall = any = bool = lambda *a: True"),
    "knows the token and leaves with 0": STUB + f"print('{TOKEN}')\nraise SystemExit(0)",
    "returns an empty array, which equals by stretching": "def f(x): return np.array([])",
    "returns an empty list": "def f(x): return []",
    "returns an array of width 0": "def f(x): return np.zeros((0, 4))",
    "returns nan": "def f(x): return np.nan",
    "returns infinity": "def f(x): return np.inf",
    "returns a masked array": "def f(x): return np.ma.masked_all(4)",
    "returns an array of objects": (
        "class E:\n    __eq__ = lambda s, o: True\n    __sub__ = __rsub__ = lambda s, o: 0.0\n"
        "    __abs__ = lambda s: 0.0\n    __le__ = lambda s, o: True\n"
        "def f(x): return np.array([E()] * 4, dtype=object)\n"),
    "returns an array of a class of its own": (
        "class A(np.ndarray):\n    def __array_function__(s, *a): return True\n"
        "    def __array_ufunc__(s, *a, **k): return True\n"
        "def f(x): return np.zeros(4).view(A)\n"),
    "returns itself": "def f(x): return f",
    "returns a class": "class f:\n    def __init__(self, x): self.all = lambda: True\n",
    "returns a dictionary that is a stand-in": "def f(x): return {'ref': 0}",
    "returns a text": "def f(x): return '10.0'",
    "returns true": "def f(x): return True",
    "searches all objects for the target": (
        "import gc\ndef f(x):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, dict) and 'target' in o: return o['target']\n"),
    "looks for the targets' file": (
        "import os\ndef f(x):\n    for d, _, names in os.walk('/'):\n"
        "        if any(n.endswith('.h5') for n in names): return 10.0\n    return None\n"),
    "writes its own reply to the channel": STUB + (
        "import json, os, struct, sys\n"
        "r = json.dumps({'ok': 10.0, 'luck': {}}).encode()\n"
        "w = int(sys.argv[2])\n"
        "for _ in range(40): os.write(w, struct.pack('>Q', len(r)) + r)\n"),
    "writes garbage to every descriptor": STUB + (
        "import os\nfor n in range(3, 256):\n"
        "    try: os.write(n, b'{\"status\": 0}\\n' * 9)\n    except OSError: pass\n"),
    "claims a message of a petabyte": STUB + (
        "import os, struct, sys\nos.write(int(sys.argv[2]), struct.pack('>Q', 1 << 50))\n"),
    "sends JSON that is nested a million deep": STUB + (
        "import os, struct, sys\nr = b'[' * 1000000\n"
        "os.write(int(sys.argv[2]), struct.pack('>Q', len(r)) + r)\n"),
    "asks for a pickle": STUB + (
        "import json, os, struct, sys\nr = json.dumps({'ok': {'a': ['O', [1], 'AAAA']}}).encode()\n"
        "os.write(int(sys.argv[2]), struct.pack('>Q', len(r)) + r)\n"),
    "spoils the random numbers": STUB + (
        "import json, os, struct, sys\n"
        "r = json.dumps({'ok': 1, 'luck': {'numpy': 'x', 'python': [1]}}).encode()\n"
        "os.write(int(sys.argv[2]), struct.pack('>Q', len(r)) + r)\n"),
    "kills its init": STUB + (
        "import os\nfor s in (2, 15, 9, 1, 10):\n"
        "    for p in (1, os.getppid()):\n"
        "        try: os.kill(p, s)\n        except OSError: pass\n"),
    "kills everyone": "import os\ndef f(x):\n    os.kill(-1, 9)\n",
    "never returns": "def f(x):\n    while True: pass\n",
    "holds System V memory": STUB + (
        "import ctypes\nc = ctypes.CDLL(None)\n"
        "held = [c.shmget(0, 256 << 20, 0o1600) for _ in range(8)]\n"
        "assert max(held) < 0\n"
        "def f(x): return None\n"),
    "lives on in a child that answers": STUB + (
        "import os, time\nif os.fork():\n    os._exit(0)\ntime.sleep(0.2)\n"),
    "redefines the worker": STUB + (
        "import scicode_worker as w\nw.encode = lambda *a: True\nw.Worker._do = lambda *a: True\n"),
    "redefines JSON": STUB + (
        "import json\njson.dumps = lambda *a: '{\"ok\": true, \"luck\": {}}'\n"),
}  # fmt: skip
QUICK = [
    "makes allclose true", "takes the target from its caller", "returns what equals everything",
    "prints from the exception hook", "has a numpy of its own",
    "returns an empty array, which equals by stretching", "writes its own reply to the channel",
    "kills its init", "redefines the worker",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HOSTILE]
)
def test_no_hostile_code_passes_and_each_has_a_verdict(targets: Path, name: str) -> None:
    score, outcome = grade(targets, HOSTILE[name])
    assert (score.value, score.cause) == (0.0, "wrong"), outcome
    assert score.details["stderr"] or outcome.ending != "exited"


def test_there_are_more_than_the_eight_that_once_worked() -> None:
    assert len(HOSTILE) >= 28 and set(QUICK) <= set(HOSTILE)


RIGHT = {
    "plain": "def f(x): return x ** 2 + 1",
    "rebinding np for itself only": "def f(x):\n    np = 2\n    return x ** np + 1",
    "printing a lot": "print('x' * 1000)\ndef f(x):\n    print('hm')\n    return x ** 2 + 1",
    "with a main guard": "def f(x): return x ** 2 + 1\nif __name__ == '__main__':\n    print(f(2))",
    "numpy scalars and matrices": "def f(x): return np.asarray(x, dtype=np.longdouble) ** 2 + 1",
    "complex with nothing imaginary": (
        "def f(x):\n    return x ** 2 + 1 + (0 if np.isscalar(x) and x == 2.0 else 0j)"
    ),
    "a list": "def f(x): return [v ** 2 + 1 for v in x] if np.ndim(x) else x ** 2 + 1",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_passes(targets: Path, name: str) -> None:
    score, outcome = grade(targets, RIGHT[name])
    assert score.value == 1.0, outcome


def test_tests_may_use_classes_callbacks_and_random_numbers_of_the_code(tmp_path: Path) -> None:
    """What the tests of the data set do with the code, beyond calling a function with numbers."""
    code = """
import random
SIZE = 3
class Wave:
    def __init__(self, alpha, *, shift=0):
        self.alpha, self.parts, self.shift = alpha, {'x': np.eye(2)}, shift
    def value(self, x):
        return self.alpha * x + self.shift
class Both:
    def __init__(self, one, two):
        self.one, self.two = one, two
    def value(self, x):
        return self.one.value(x) * self.two.value(x)
def draw(n):
    return np.random.uniform(size=n) + random.random()
def integrate(f, a, b):
    return (b - a) * f(0.5 * (a + b))
def twice(f):
    return lambda x: f(f(x))
def square(x):
    return x * x
def gather(wave, scale):
    wave.total = wave.value(1.0) * scale
def pieces():
    from scipy import sparse
    return {'m': sparse.csr_matrix(np.eye(2)), 1: (1, 2.5, None, 'a', {3}, range(2))}
def fail():
    raise ValueError('no')
"""
    tests = [
        "w = Wave(2.0, shift=1)\nassert np.allclose(w.value(np.ones(3)), target) and w.alpha == 2",
        "b = Both(w, Wave(1))\nassert np.isclose(b.value(3.0), target) and b.one.shift == 1",
        "np.random.seed(7)\nrandom.seed(7)\na = draw(SIZE)\nnp.random.seed(7)\nrandom.seed(7)\n"
        "assert np.allclose(a, np.random.uniform(size=3) + random.random()) == target",
        "def mine(x):\n    return square(x) + 1\nassert np.allclose(integrate(mine, 0, 2), target)",
        "assert np.allclose(twice(square)(3.0), target) and integrate(np.sin, 0, 0) == 0",
        "w.alpha = 5.0\ngather(w, 2)\nassert np.isclose(w.total, target)",
        "p = pieces()\nassert np.allclose(p['m'].toarray(), np.eye(2)) and p[1] == "
        "(1, 2.5, None, 'a', {3}, range(2)) and target",
        "try:\n    fail()\nexcept ValueError as e:\n    assert str(e) == 'no' and target",
    ]
    header = "".join(
        f"{kind} {name}:\n    pass\n"
        for kind, name in (("class", "Wave"), ("class", "Both"), ("def", "draw(n)"),
                           ("def", "integrate(f, a, b)"), ("def", "twice(f)"),
                           ("def", "square(x)"), ("def", "gather(w, s)"), ("def", "pieces()"),
                           ("def", "fail()"))
    )  # fmt: skip
    step = {"step_number": "2.1", "function_header": header, "test_cases": tests}
    problem = {"required_dependencies": "import numpy as np\nimport random", "sub_steps": [step]}
    wanted = [3 * [3.0], 21.0, True, 4.0, 81.0, 12.0, True, True]
    wanted[1] = 7.0 * 3.0
    path = tmp_path / "t.h5"
    with h5py.File(path, "w") as file:
        for number, value in enumerate(wanted, 1):
            file[f"2.1/test{number}/var1"] = value
    score, outcome = grade(path, code, problem)
    assert score.value == 1.0, outcome


def test_code_that_prints_without_end_is_still_measured(targets: Path) -> None:
    code = (
        "import time\nx = []\nwhile True:\n    print('.', flush=True)\n"
        "    x.append(bytearray(b'1' * (8 << 20)))\n    time.sleep(0.01)\n"
    )
    limits = SandboxLimits(wall_s=20, cpu_s=20, memory_bytes=600 << 20, output_bytes=1 << 20)
    _, outcome = grade(targets, f"import os\nos.fork()\n{code}", limits=limits)
    assert outcome.ending == "memory" or "MemoryError" in outcome.stderr, outcome


AS_OTHERS = {
    "root without the right to mount": ["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"],
    "root without any right": ["--bounding-set=-all", "--inh-caps=-all"],
}


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)
@pytest.mark.parametrize("who", AS_OTHERS)
def test_with_fewer_rights_it_works_or_says_why_not(targets: Path, who: str) -> None:
    script = (
        "import json, sys\nfrom pathlib import Path\n"
        "from halfbyte.errors import UnsupportedError\n"
        "from halfbyte.evals import sandbox\nfrom halfbyte.evals.grading import scripts\n"
        "problem, code, targets = json.loads(sys.stdin.read())\n"
        "program = scripts.step_program(problem, 0, [code], targets, 'token')\n"
        "try:\n"
        "    o = sandbox.run_program(sandbox.interpreter(sys.executable), program,\n"
        "                            limits=sandbox.SandboxLimits(wall_s=20),\n"
        "                            visible=[Path(targets)])\n"
        "    print(scripts.grade_step(code, o, 'token').value, 'user' in o.isolation)\n"
        "except UnsupportedError as reason:\n    print('refused', reason)\n"
    )
    done = subprocess.run(
        ["setpriv", *AS_OTHERS[who], sys.executable, "-c", script],
        input=json.dumps([PROBLEM, RIGHT["plain"], str(targets)]),
        capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(Path(scripts.__file__).parents[3]), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.stdout.startswith(("1.0 True", "refused")), done
    if done.stdout.startswith("refused"):
        assert "CAP_SETUID" in done.stdout or "user namespaces" in done.stdout


def test_an_interpreter_may_be_given_relative_or_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: Path
) -> None:
    (tmp_path / "code").symlink_to(Path(sys.prefix))
    monkeypatch.chdir(tmp_path)
    relative = interpreter(f"code/bin/{Path(sys.executable).name}")
    assert os.path.isabs(relative.path)
    program = scripts.step_program(PROBLEM, 0, [RIGHT["plain"]], str(targets), TOKEN)
    outcome = run_program(relative, program, limits=LIMITS, visible=[targets])
    assert outcome.exit_code == 0, outcome
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert interpreter("python").path == str(Path(sys.executable).parent / "python")


@pytest.mark.parametrize(
    "path", ["code/bin/python", "/no/such/python", "no-such-python", "/bin/true"]
)
def test_what_is_no_interpreter_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="not a Python"):
        interpreter(path)
