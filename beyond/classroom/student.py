"""Another implementation of the assignment, in a folder of its own.

Its modules have the names of ours. `Student` imports them beside ours: while they are imported, and
inside `Student.names()`, those names mean the folder's modules; everywhere else they mean ours.

A package that is not installed gets a stand-in. Names can be imported from it, and using it raises
an error, so that parts that do not need the package can still be examined.
"""

import bdb
import importlib
import importlib.metadata
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# Names that mean the folder's modules, or nothing: never ours.
OURS = {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "beyond", "data", "tests"}
LONGEST = 300  # characters of an error's message
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how such a file begins
# What PyTorch says where there is no GPU.
NO_GPU = ("Found no NVIDIA driver", "No CUDA GPUs", "not compiled with CUDA")
SIZES = re.compile(r"\d+x\d+|\b([Ss]izes?|[Ss]hapes?)\b.*\d")  # in a message about shapes


class StudentError(Exception):
    """Something of the folder cannot be used; the message is one line that says why."""


class KnownFailure(StudentError):
    """A module is needed that could not be imported; the message says where and why."""


class Student:
    """The modules of a folder, imported beside this project's modules of the same names."""

    def __init__(
        self,
        folder: Path,
        failures: Mapping[str, str] | None = None,
        on_import: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Take a folder; nothing is imported yet.

        Args:
            folder: holds `rope.py`, `llama.py` and so on.
            failures: module -> why it cannot be imported, where that is known already.
            on_import: called with a module's name before it is imported, and with "" afterwards.
        """
        self.folder = folder.resolve()
        self.absent: set[str] = set()  # packages that are not installed
        self.is_importing = False
        self._failures = dict(failures or {})
        self._on_import = on_import
        # The folder's, and stand-ins for packages that are absent.
        self._modules: dict[str, ModuleType] = {}
        self._stand_ins: dict[str, ModuleType] = {}  # for modules of the folder
        self._are_ours_hidden = False

    def module(self, name: str) -> ModuleType:
        """Return the folder's module, such as "rope"; it is imported at the first call.

        Raises:
            StudentError: if it cannot be imported.
        """
        if name in self._failures:
            raise KnownFailure(self._failures[name])
        if name in self._modules:
            return self._modules[name]
        with self.names(), _same_defaults():
            outer, self.is_importing = self.is_importing, True
            self._on_import(name)
            try:
                return self._import(name)
            except StudentError as error:
                self._failures[name] = str(error)
                raise
            finally:
                self._on_import("")
                self.is_importing = outer

    def stand_in(self, name: str, module: ModuleType) -> None:
        """Let the folder's other modules import this module instead of the folder's own."""
        if self._are_ours_hidden and name in sys.modules and name not in self._stand_ins:
            self._modules[name] = sys.modules[name]  # `module` still returns the folder's
        self._stand_ins[name] = module
        if self._are_ours_hidden:
            sys.modules[name] = module

    def _import(self, name: str) -> ModuleType:
        """Import a module of the folder; packages turn out to be absent one by one."""
        while True:
            try:
                return importlib.import_module(name)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                absent = error.name if isinstance(error, ModuleNotFoundError) else None
                if absent is None or absent in self.absent or absent.partition(".")[0] in OURS:
                    raise StudentError(self.describe(error)) from error
                self.absent.add(absent)

    @contextmanager
    def names(self) -> Iterator[None]:
        """Let imports inside the folder's functions find the folder's modules."""
        if self._are_ours_hidden:
            yield
            return
        folder_names = self._folder_names()
        hidden = _take_modules(folder_names)
        path = sys.path.copy()
        finder = _Finder(self)
        sys.modules.update(self._modules)
        sys.modules.update(self._stand_ins)
        sys.path.insert(0, str(self.folder))
        sys.meta_path.insert(0, finder)
        self._are_ours_hidden = True
        try:
            yield
        finally:
            self._are_ours_hidden = False
            sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]
            sys.path[:] = path
            sys.path_importer_cache.pop(str(self.folder), None)
            found = _take_modules(folder_names | self.absent)
            for name in self._stand_ins:
                del found[name]
            own = {name: self._modules[name] for name in self._stand_ins if name in self._modules}
            self._modules = found | own
            sys.modules.update(hidden)

    def _folder_names(self) -> set[str]:
        """List the modules that the folder holds or should hold.

        A file `torch.py` or `random.py` does not take the place of what is imported already.
        """
        files = {path.stem for path in self.folder.glob("*.py")}
        files |= {path.parent.name for path in self.folder.glob("*/__init__.py")}
        return OURS | {name for name in files if name not in sys.modules or name in self._modules}

    def describe(self, error: BaseException) -> str:
        """Describe an error in one line, with the place in the folder's files."""
        try:
            message = " ".join(str(error).split())
        except Exception:
            message = "(its message cannot be shown)"
        if isinstance(error, KnownFailure):
            place = ""
        elif isinstance(error, SyntaxError):
            place = "".join(f"{part}:" for part in (error.filename, error.lineno) if part) + " "
            message = " ".join(str(error.msg).split())
        else:
            frames = traceback.extract_tb(error.__traceback__)
            inside = [f"{f.filename}:{f.lineno}: " for f in frames if self.holds(f.filename)]
            place = inside[-1] if inside else ""
        if isinstance(error, AssertionError) and not message and frames:
            message = frames[-1].line or ""  # a bare assert says nothing else
        text = (place + _explain(error, message)).replace(f"{self.folder}/", "")
        text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
        return text + self._advise(error, message)

    def _advise(self, error: BaseException, message: str) -> str:
        """Return what else is to be said of an error, or nothing."""
        if isinstance(error, StudentError):
            return ""
        if self.is_importing and isinstance(error, OSError | EOFError | SystemExit | bdb.BdbQuit):
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f for f in frames if f.name == "<module>" and self.holds(f.filename)]
            where = f"line {lines[-1].lineno} of {Path(lines[-1].filename).name}" if lines else "it"
            return f'; {where} runs on import: put it under if __name__ == "__main__":'
        if isinstance(error, RuntimeError | ValueError | IndexError) and SIZES.search(message):
            return " (the checker's model and inputs are small: the sizes are theirs)"
        return ""

    def holds(self, path: str) -> bool:
        """Say whether a file is in the folder."""
        return Path(path).is_relative_to(self.folder)

    def find(self, fullname: str, places: Sequence[str] | None) -> ModuleSpec | None:
        """Find a module in the folder, or a stand-in for one that is absent; None if elsewhere."""
        name = fullname.partition(".")[0]
        if fullname in self._failures:
            raise KnownFailure(self._failures[fullname])
        if any(f"{fullname}.".startswith(f"{absent}.") for absent in self.absent):
            return ModuleSpec(fullname, _StandInLoader(self), is_package=True)
        for place in [str(self.folder)] if places is None else places:
            if self.holds(place):
                spec = FileFinder(place, (_Loader, [".py"])).find_spec(fullname)
                if spec is not None:
                    return spec if spec.loader else None  # a folder without __init__.py
        if name in OURS:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def _explain(error: BaseException, message: str) -> str:
    """Describe an error without its place; message: its own, in one line."""
    if isinstance(error, SystemExit):
        status = 0 if error.code is None else message
        return f"the program ends itself (exit status {status}); remove exit() or what calls it"
    if isinstance(error, bdb.BdbQuit):
        return "the program stops in the debugger; remove breakpoint()"
    if isinstance(error, EOFError) and "reading a line" in message:
        return "input() has nothing to read here; remove it"
    if any(words in message for words in NO_GPU):
        return (
            "the code asks for a GPU, and there is none; use the device of what it is given, "
            "device=query.device or device=input_ids.device"
        )
    if isinstance(error, ModuleNotFoundError) and error.name in OURS:
        return f"there is no {error.name}.py in the folder"
    if isinstance(error, StudentError):
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")


@contextmanager
def _same_defaults() -> Iterator[None]:
    """Undo what a module changes for the whole process, so that each part is examined alone."""
    dtype, has_grad = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(has_grad)


def _take_modules(names: set[str]) -> dict[str, ModuleType]:
    """Take these modules, and what they contain, out of `sys.modules`."""
    roots = {name.partition(".")[0] for name in names}
    found = [
        fullname
        for fullname in sys.modules
        if fullname.partition(".")[0] in roots  # few are, of thousands
        and any(f"{fullname}.".startswith(f"{name}.") for name in names)
    ]
    return {fullname: sys.modules.pop(fullname) for fullname in found}


class _Finder(MetaPathFinder):
    """Asks a student's folder first."""

    def __init__(self, student: Student) -> None:
        self.student = student

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return self.student.find(fullname, path)


class _Loader(SourceFileLoader):
    """Compiles a file; neither reads nor writes `__pycache__`."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if source.startswith(UTF_16):
            raise StudentError(f"{path} is saved as UTF-16; save it as UTF-8")
        try:
            return self.source_to_code(source, path)
        except SyntaxError as error:
            error.filename = error.filename or path  # none if there is a null byte
            raise


# --------------------------------------------------------------------- packages that are absent


class _StandInLoader(Loader):
    """Makes a module in the place of one that is not installed."""

    def __init__(self, student: Student) -> None:
        self.student = student

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "importlib_metadata":  # the same under another name
            vars(module).update(vars(importlib.metadata), __name__=module.__name__)
        else:
            vars(module)["_student"] = self.student


class _StandIn(ModuleType):
    """A module that is not installed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__" or "_student" not in vars(self):
            raise AttributeError(name)
        return _Absent(vars(self)["_student"], f"{self.__name__}.{name}")


class _Absent:
    """Something of a module that is not installed.

    While modules are imported it may be called, decorate, and be derived from. Later, using it
    raises an error.
    """

    def __init__(self, student: Student, name: str) -> None:
        self._student = student
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return _Absent(self._student, f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._student.is_importing:
            package = self._name.partition(".")[0]
            raise StudentError(f"{self._name} is used, but {package} is not installed here")
        if len(args) == 1 and not kwargs and isinstance(args[0], FunctionType | type):
            return args[0]  # decorated
        return self

    def __mro_entries__(self, bases: Any) -> tuple[type]:
        def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
            return self(cls, *args, **kwargs)

        return (type(self._name, (), {"__new__": refuse}),)

    def _same(self, *_: Any) -> Any:
        return self

    def _no(self, *_: Any) -> bool:
        return False

    __getitem__ = __or__ = __ror__ = __enter__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __exit__ = __instancecheck__ = _no

    def __iter__(self) -> Iterator[Any]:
        return iter(())
