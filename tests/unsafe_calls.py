"""Finds calls in Python source that can run code out of a file, or leave a file to others. Works on the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

Rule = Callable[[ast.Call], bool]


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; None if it is absent or no constant."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def given(call: ast.Call, name: str) -> bool:
    """Whether a keyword is given with anything but False; also what ``**options`` may bring."""
    return any(k.arg is None or (k.arg == name and keyword(call, name) is not False) for k in call.keywords)


# What may never be named, called or not.
FORBIDDEN = {
    "builtins.eval": "runs text as code",
    "builtins.exec": "runs text as code",
    "builtins.compile": "makes code of text",
    "builtins.__import__": "use importlib",
    **{f"{module}.{name}": "a pickle runs code of its author"
       for module in ("pickle", "_pickle", "cloudpickle", "dill", "marshal", "jsonpickle")
       for name in ("load", "loads", "Unpickler", "decode")},
    "joblib.load": "a pickle runs code of its author",
    "shelve.open": "a pickle runs code of its author",
    "pandas.read_pickle": "a pickle runs code of its author",
    "numpy.lib.format.read_array": "use the header and the bytes",
    "batchgenerators.utilities.file_and_folder_operations.load_pickle": "a pickle runs code of its author",
    **{f"yaml.{name}": "use yaml.safe_load" for name in ("load", "load_all", "unsafe_load", "full_load", "Loader")},
    "os.system": "use subprocess with a list",
    "os.popen": "use subprocess with a list",
    "subprocess.getoutput": "use subprocess with a list",
    "subprocess.getstatusoutput": "use subprocess with a list",
    "tempfile.mktemp": "somebody else may make the file first",
    "os.umask": "changes all threads of the process",
    "shutil.unpack_archive": "names in an archive choose where it writes",
    "ssl._create_unverified_context": "anybody can answer",
}  # fmt: skip
# What may be called in a safe way only: name -> whether a call is unsafe, and why.
CONDITIONAL: dict[str, tuple[Rule, str]] = {
    "torch.load": (lambda call: keyword(call, "weights_only") is not True, "needs weights_only=True"),
    "numpy.load": (lambda call: given(call, "allow_pickle"), "must not allow pickles"),
    "torch.hub.load": (lambda call: True, "runs code from the network"),
}
# Methods, by name alone.
METHODS: dict[str, tuple[Rule, str]] = {
    "extractall": (lambda call: True, "names in an archive choose where it writes"),
    "extract": (lambda call: True, "names in an archive choose where it writes"),
    "chmod": (
        lambda call: any(isinstance(a, ast.Constant) and isinstance(a.value, int) and a.value & 0o022
                         for a in (*call.args, *(k.value for k in call.keywords))),
        "makes a file that others can write",
    ),
}  # fmt: skip
LOGS = {"print", "info", "warning", "error", "debug", "print_to_log_file"}


class _Finder(ast.NodeVisitor):
    def __init__(self) -> None:
        self.names = {name: f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__")}
        self.found: list[tuple[int, str]] = []
        self.calls: set[int] = set()

    def full_name(self, node: ast.AST) -> str | None:
        """Dotted name as imported: ``np.load`` is ``numpy.load``."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute) and (base := self.full_name(node.value)):
            return f"{base}.{node.attr}"
        return None

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.names[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def report(self, node: ast.AST, what: str, why: str) -> None:
        self.found.append((node.lineno, f"{what}: {why}"))

    def visit_Call(self, node: ast.Call) -> None:
        name = self.full_name(node.func)
        self.calls.add(id(node.func))
        if name in CONDITIONAL and CONDITIONAL[name][0](node):
            self.report(node, name, CONDITIONAL[name][1])
        method = node.func.attr if isinstance(node.func, ast.Attribute) else None
        if method in METHODS and METHODS[method][0](node):
            self.report(node, method, METHODS[method][1])
        if given(node, "shell") and any(k.arg == "shell" for k in node.keywords):
            self.report(node, "shell=True", "use a list of arguments")
        called = method or getattr(node.func, "id", None)
        if called in LOGS and any(self.full_name(argument) == "os.environ" for argument in node.args):
            self.report(node, "os.environ", "the environment may hold secrets")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.visit_reference(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit_reference(node)
        self.generic_visit(node)

    def visit_reference(self, node: ast.Name | ast.Attribute) -> None:
        name = self.full_name(node)
        if name in FORBIDDEN:
            self.report(node, name, FORBIDDEN[name])
        elif name in CONDITIONAL and id(node) not in self.calls:  # handed on, with arguments nobody sees here
            self.report(node, name, CONDITIONAL[name][1])


def unsafe_calls(source: str) -> Iterator[tuple[int, str]]:
    """(line, what and why) of everything unsafe in a source text."""
    finder = _Finder()
    finder.visit(ast.parse(source))
    yield from sorted(set(finder.found))
