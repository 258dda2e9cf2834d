"""Plug-ins: Python files or packages that add templates, projectors, metrics and more by name.

    --plugin my.py --load_plugins--> the file runs --add_named--> tables of names, with the plug-in of each new one

A plug-in is code, so it is loaded only where a user names it on a command line or in Python; a checkpoint and a
configuration file only record which ones they need. What a plug-in may add is in `llava/plugins.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")

GROUP = "llava.plugins"
"""Group of the entry points of installed plug-ins: the value is a module, or a function without arguments."""

FLAG = "--plugin"
PLUGIN_HELP = "plug-in: a Python file, or the name of an installed one; repeat for several"


@dataclass(slots=True)
class Plugin:
    """Loaded plug-in.

    Attributes:
        name: name of the file, or of the entry point.
        version: SHA-256 of the file, or name and version of the package.
        place: the resolved file, or the entry point.
        added: tables with the names that it added to them.
    """

    name: str
    version: str
    place: str
    added: list[tuple[MutableMapping[str, Any], str]] = field(default_factory=list)


LOADED: dict[str, Plugin] = {}
"""Loaded plug-ins by name, in the order of loading."""

_current: list[Plugin] = []
_owners: dict[tuple[str, str], str] = {}


def add_named(table: MutableMapping[str, T], name: str, value: T, kind: str) -> None:
    """Add an entry to a table of names, and remember the plug-in that adds it.

    Args:
        table: the table.
        name: name that does not exist in it yet.
        value: what the name stands for.
        kind: what the table holds, for messages and `needed_plugins`: `projector`, `template`, ...

    Raises:
        ConfigError: the name exists already, or is not text.
    """
    if not isinstance(name, str) or not name or name != name.strip():
        raise ConfigError(f"the name of a {kind} is {name!r}; expected text without spaces around it")
    if name in table:
        raise ConfigError(f"a {kind} {name!r} already exists; choose another name")
    table[name] = value
    if _current:
        _current[-1].added.append((table, name))
        _owners[kind, name] = _current[-1].name


def load_plugins(given: Iterable[str]) -> None:
    """Load plug-ins that are not loaded yet, by path of a Python file or name of an entry point.

    Raises:
        ConfigError: one does not exist, fails, or has the name of another one; what it had added is removed.
    """
    for word in given:
        for text in word.split(","):
            _load(text.strip())


def _load(text: str) -> None:
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix != ".py":
            raise ConfigError(f"{FLAG} {text}: expected a Python file (.py) or the name of an installed plug-in")
        content = path.read_bytes()
        plugin = Plugin(path.name, hashlib.sha256(content).hexdigest(), str(path.resolve()))
        _run(plugin, lambda: _run_file(path.resolve(), content))
        return
    if path.suffix == ".py" or "/" in text:
        raise ConfigError(f"{FLAG} {text}: no such file; expected a Python file or the name of an installed plug-in")
    from importlib.metadata import entry_points

    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if text not in found:
        known = ", ".join(sorted(found)) or "none"
        raise ConfigError(
            f"{FLAG} {text}: no such file and no installed plug-in; expected a Python file, or one of those that "
            f"packages offer in {GROUP}: {known}"
        )
    entry = found[text]
    version = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value
    _run(Plugin(text, version, f"{entry.name} = {entry.value}"), lambda: _run_entry(entry))


def _run(plugin: Plugin, run: Callable[[], None]) -> None:
    """Run a plug-in once; if it fails, nothing of it stays."""
    if (earlier := LOADED.get(plugin.name)) is not None:
        if (earlier.place, earlier.version) != (plugin.place, plugin.version):
            raise ConfigError(f"{FLAG} {plugin.place}: another plug-in {plugin.name} is loaded; rename one of them")
        return
    _current.append(plugin)
    try:
        run()
    except (Exception, SystemExit) as error:
        _forget(plugin)
        raise ConfigError(f"plug-in {plugin.name}{_line_of(error, plugin.place)}: {failure_text(error)}") from error
    finally:
        _current.pop()
    LOADED[plugin.name] = plugin


def _forget(plugin: Plugin) -> None:
    for table, name in plugin.added:
        table.pop(name, None)
    for key in [key for key, owner in _owners.items() if owner == plugin.name]:
        del _owners[key]


def _run_file(path: Path, content: bytes) -> None:
    # Under a name of its own, so that it hides no installed module; the bytes are those whose hash is recorded.
    name = f"llava_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except BaseException:
        sys.modules.pop(name, None)
        raise


def _run_entry(entry: EntryPoint) -> None:
    found = entry.load()
    if callable(found):
        found()


def _line_of(error: BaseException, place: str) -> str:
    """Return ` line N`, the last line of a plug-in's file that an error passed through."""
    if isinstance(error, SyntaxError):
        return f" line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
    return f" line {lines[-1]}" if lines else ""


def failure_text(error: BaseException) -> str:
    """Return an error of a plug-in in one line."""
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def loaded_plugins() -> dict[str, str]:
    """Return the versions of the loaded plug-ins by name, for the record of a run."""
    return {plugin.name: plugin.version for plugin in LOADED.values()}


def unload_plugins() -> None:
    """Remove all plug-ins and what they added; for tests and notebooks."""
    for plugin in list(LOADED.values()):
        _forget(plugin)
    LOADED.clear()


def needed_plugins(**used: str) -> list[str]:
    """Return the plug-ins that added some names: `needed_plugins(projector="gated", template="ours")`."""
    found = (_owners.get((kind, name)) for kind, name in used.items())
    return sorted({owner for owner in found if owner is not None})


def plugin_record(**used: str) -> dict[str, list[str]]:
    """Return `{"plugins": names}` of `needed_plugins`, or an empty table without any."""
    names = needed_plugins(**used)
    return {"plugins": names} if names else {}


def check_plugin_record(settings: Any, *, subject: str) -> None:
    """Take the record of plug-ins out of saved settings, and check that they are loaded.

    Raises:
        CheckpointError: one is not; the message begins with `subject`.
    """
    record = settings.pop("plugins", None) if isinstance(settings, dict) else None
    if missing := missing_plugins(record):
        raise CheckpointError(f"{subject} {missing_text(missing)} (a checkpoint loads no code)")


def missing_plugins(record: Any) -> list[str]:
    """Return the plug-ins of a record (a list of names) that are not loaded; a damaged record names none."""
    names = record if isinstance(record, list) else []
    return [name for name in names if isinstance(name, str) and name and name not in LOADED]


def missing_text(missing: Sequence[str]) -> str:
    """Return the clause of a message about plug-ins that are not loaded."""
    plural = "s" if len(missing) > 1 else ""
    # A record may come from a stranger, and the option may be pasted into a shell.
    names = [shlex.quote(" ".join(name.split())[:100]) for name in missing[:5]]
    return f"needs the plug-in{plural} {', '.join(names)}; add {' '.join(f'{FLAG} {name}' for name in names)}"


def given_plugins(words: Sequence[str], *, several: bool = False) -> list[str]:
    """Return the plug-ins that a command line names, before it is parsed.

    Args:
        words: the command line.
        several: whether one `--plugin` takes several values, as in training.
    """
    return _split(words, several=several)[0]


def without_plugins(words: Sequence[str]) -> list[str]:
    """Return a command line without the plug-ins that it names."""
    return _split(words)[1]


def _split(words: Sequence[str], *, several: bool = False) -> tuple[list[str], list[str]]:
    """Return the values of `--plugin` and the other words."""
    found: list[str] = []
    rest: list[str] = []
    is_value = False
    for word in words:
        name, equals, value = word.partition("=")
        if is_value and not word.startswith("--"):
            found.append(word)
            is_value = several
        elif name == FLAG:
            found += [value] if equals else []
            is_value = several or not equals
        else:
            rest.append(word)
            is_value = False
    return found, rest


def recorded_names(given: Iterable[str]) -> list[str]:
    """Return the names under which a configuration file records given plug-ins, without their folders."""
    return [Path(part.strip()).name for word in given for part in word.split(",")]


def add_plugin_option(parser: argparse._ActionsContainer) -> None:
    """Add `--plugin`; `Parser` loads them before it reads the other options."""
    parser.add_argument(FLAG, action="append", default=None, metavar="FILE", help=PLUGIN_HELP)


def check_recorded(
    options: MutableMapping[str, Any], words: Sequence[str], *, source: str, several: bool = False
) -> None:
    """Remove plug-ins from a configuration file's options, and check that the command line names them.

    Args:
        options: options of the file by name.
        words: command line.
        source: the file, for messages.
        several: see `given_plugins`.

    Raises:
        ConfigError: it does not; a file of options never loads code.
    """
    record: Any = options.pop(FLAG, None) or []
    names = recorded_names(map(str, record if isinstance(record, list) else [record]))
    given = recorded_names(given_plugins(words, several=several))
    if missing := [name for name in names if name not in given]:
        raise ConfigError(f"{source} {missing_text(missing)} (a configuration file loads no code)")
