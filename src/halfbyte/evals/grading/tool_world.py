"""The process that holds simulated services: it carries out calls and says what came of them.

Copied into the sandbox and run there, never imported by the package; standard library only. Calls
name functions of the services and nothing else; their arguments are plain data. The right calls are
text of the data set, and are carried out by services of their own beside the model's.
"""

# mypy: ignore-errors
import copy
import inspect
import json
import keyword
import math
import sys
import types

PACKAGE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
# It has no state, and no function that would give it one.
STATELESS = ("MathAPI",)


def load_modules(sources):
    """Run the source texts, each as the module that the others import it as; returns them."""
    made = []
    for stem, text in sources.items():
        name = f"{PACKAGE}.{stem}"
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(text, f"{stem}.py", "exec"), module.__dict__)
        made.append(module)
    return made


class World:
    """The services of one side, and their functions by name."""

    def __init__(self, task, modules):
        self.services = {}
        for name in task["classes"]:
            kind = next(m.__dict__[name] for m in modules if name in m.__dict__)
            service = kind()
            if name not in STATELESS:
                initial = copy.deepcopy(task["initial"].get(name, {}))
                service._load_scenario(initial, long_context=task["is_long"])
            self.services[name] = service
        self.functions = {
            name: method
            for service in self.services.values()
            for name, method in inspect.getmembers(service, predicate=inspect.ismethod)
            if not name.startswith("_")
        }

    def call(self, name, arguments):
        """Carry out a model's call; the result, or what went wrong, as text."""
        if name not in self.functions:
            return failed(f"name {name!r} is not defined")
        if not all(key.isidentifier() and not keyword.iskeyword(key) for key in arguments):
            return failed("invalid syntax")
        if not is_finite(arguments):
            return failed("a number is not finite")
        try:
            return as_text(self.functions[name](**arguments))
        except Exception as failure:
            return failed(failure)

    def say(self, text):
        """Carry out a right call, which is written as Python."""
        try:
            return as_text(eval(text, {"__builtins__": {}, **self.functions}))
        except Exception as failure:
            return failed(failure)


def failed(why):
    """What a model is told of a call that failed, in the leaderboard's words."""
    return f"Error during execution: {why}"


def is_finite(value):
    """Whether no number in plain data is infinite or none."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return all(map(is_finite, value)) if isinstance(value, list) else True


def as_text(result):
    """A result as the model sees it: objects as JSON where they can be, the rest as Python says."""
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError):
            return str(result)
    return str(result)


def differing(service, right):
    """The first public attribute in which a service is not as the right one; None if none is."""
    for name, value in vars(right).items():
        if not name.startswith("_") and getattr(service, name) != value:
            return name
    return None


def missing(results, wanted):
    """The first wanted result that is not among the results, each counted once; None if none."""
    left = list(results)
    for text in wanted:
        if text not in left:
            return text
        left.remove(text)
    return None


def grade(task, modules):
    """What is wrong with the turns; None if each ends in the right state with the right results."""
    model, right = World(task, modules), World(task, modules)
    seen = []
    for number, (steps, truth) in enumerate(zip(task["turns"], task["answers"], strict=True), 1):
        for step in steps:
            seen += [model.call(name, arguments) for name, arguments in step]
        wanted = [right.say(text) for text in truth]
        if not truth:
            continue  # nothing is asked of a turn that cannot be answered, but its calls count
        if not steps:
            return f"turn {number}: there is no call"
        for name, service in right.services.items():
            if attribute := differing(model.services[name], service):
                return f"turn {number}: {name}.{attribute} is not as it should be"
        if (text := missing(seen, wanted)) is not None:
            return f"turn {number}: nothing returned {text[:200]!r}"
    return None


def last_results(task, modules):
    """What the calls of the last step return."""
    model, results = World(task, modules), []
    for steps in task["turns"]:
        for step in steps:
            results = [model.call(name, arguments) for name, arguments in step]
    return results


def main():
    """Do the task beside this file, and print its outcome after the task's token."""
    with open("/box/task.json", encoding="utf-8", errors="surrogatepass") as file:
        task = json.load(file)
    modules = load_modules(task["sources"])
    if task["answers"] is None:
        said = {"results": last_results(task, modules)}
    else:
        said = {"fault": grade(task, modules)}
    sys.stdout.write(f"\n{task['token']}{json.dumps(said)}\n")


if __name__ == "__main__":
    main()
