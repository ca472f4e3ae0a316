"""YAML as plain data that remembers its lines, so an error can say where it is."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yaml import Node, SafeLoader

Path = tuple[Any, ...]
MAX_BYTES = 2**20
# With anchors written out; the bundled presets have about 600.
MAX_ENTRIES = 50_000
MAX_NUMBER_BITS = 1000
MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class LinedYaml:
    """A document, and the line (from 1) of everything in it by its path of keys and positions."""

    file: str
    data: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def where(self, path: Path) -> str:
        """'presets.yaml, line 12' of a path, or of the nearest thing around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return f"{self.file}, line {self.lines[path[:length]]}"
        return self.file


def read_yaml(file: str | FilePath) -> LinedYaml:
    """Read one YAML document of plain data.

    Raises:
        ValueError: the file cannot be read, is empty or too large, does not parse (with line and
            column), has a key twice, or an anchor that contains itself.
    """
    import yaml

    name = str(file)
    try:
        size = FilePath(file).stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{name} has {size} bytes; a presets file has {MAX_BYTES} at most")
        text = FilePath(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{name} cannot be read: {reason}") from error
    try:
        loader = _loader_of(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise ValueError(f"{name} is empty; it needs at least one model section")
            if _written_out(node, {}) > MAX_ENTRIES:
                raise ValueError(
                    f"{name} has more than {MAX_ENTRIES} entries with its anchors written out, "
                    "too many for a presets file"
                )
            lines: dict[Path, int] = {}
            data = _Reader(loader, name, lines).read(node, ())
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply for a presets file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {_describe(error)}") from error
    return LinedYaml(name, data, lines)


def _loader_of(text: str) -> SafeLoader:
    import yaml

    try:
        return yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:  # it knows no lines
        before = text[: error.position]
        column = len(before) - before.rfind("\n") - 1
        mark = yaml.Mark(
            error.name, error.position, before.count("\n"), column, text, error.position
        )
        problem = f"the character U+{ord(text[error.position]):04X} is not allowed"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark) from error


def _written_out(node: Node, sizes: dict[int, int]) -> int:
    """Entries of a node with its anchors written out: a few lines can stand for billions."""
    if id(node) not in sizes:
        sizes[id(node)] = 0  # one that contains itself is refused by the reader
        parts: list[Any] = [] if isinstance(node.value, str) else node.value
        nodes = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        sizes[id(node)] = 1 + sum(_written_out(part, sizes) for part in nodes)
    return sizes[id(node)]


def _describe(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    if mark is None:
        return str(problem)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Reader:
    def __init__(self, loader: SafeLoader, name: str, lines: dict[Path, int]) -> None:
        self._loader = loader
        self._name = name
        self._lines = lines
        self._open: list[Node] = []
        # Mappings whose "<<" is resolved: what was merged then stands beside their own keys.
        self._flat: set[int] = set()

    def read(self, node: Node, path: Path) -> Any:
        import yaml

        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if any(node is outer for outer in self._open):
            raise ValueError(f"{self._at(node, path)}: an anchor must not contain itself")
        self._open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.pop()

    def _mapping(self, node: Any, path: Path) -> dict[Any, Any]:
        self._flatten(node, path)
        mapping = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            key_path = (*path, key)
            self._lines[key_path] = key_node.start_mark.line + 1
            mapping[key] = self.read(value_node, key_path)
        return mapping

    def _flatten(self, node: Any, path: Path) -> None:
        """Resolve "<<": what is merged in stands before the mapping's own pairs, so these win.

        PyYAML's own way mistakes keys of one letter for each other.
        """
        import yaml

        if id(node) in self._flat:
            return
        self._flat.add(id(node))
        self._refuse_duplicates(node, path)
        own = [pair for pair in node.value if pair[0].tag != MERGE]
        known = {self._key(key_node, path) for key_node, _ in own}
        merged = []
        for key_node, value_node in node.value:
            if key_node.tag != MERGE:
                continue
            is_list = isinstance(value_node, yaml.SequenceNode)
            for source in value_node.value if is_list else [value_node]:
                if not isinstance(source, yaml.MappingNode):
                    raise ValueError(
                        f"{self._at(source, path)}: only a mapping can be merged by <<"
                    )
                if any(source is outer for outer in self._open):
                    raise ValueError(f"{self._at(source, path)}: an anchor must not contain itself")
                self._open.append(source)
                self._flatten(source, path)
                self._open.pop()
                for pair in source.value:  # of several mappings the first wins
                    key = self._key(pair[0], path)
                    if key not in known:
                        known.add(key)
                        merged.append(pair)
        node.value = merged + own

    def _key(self, node: Node, path: Path) -> Hashable:
        import yaml

        if not isinstance(node, yaml.ScalarNode):
            raise ValueError(f"{self._at(node, path)}: a list or mapping cannot be a key")
        key: Hashable = self._scalar(node, path)
        return key

    def _scalar(self, node: Any, path: Path) -> Any:
        try:
            value = self._loader.construct_object(node)
        except ValueError as error:  # a date that is none, for example
            raise ValueError(f"{self._at(node, path)}: {_cut(node.value)!r} {error}") from error
        except (AttributeError, LookupError) as error:  # PyYAML's own at "!!bool x"
            at, tag = self._at(node, path), node.tag.rpartition(":")[2]
            raise ValueError(f"{at}: {_cut(node.value)!r} is no {tag}") from error
        if isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
            # Python would not write it out in an error further on.
            at = self._at(node, path)
            raise ValueError(f"{at}: {_cut(node.value)!r} is too long for a number")
        return value

    def _refuse_duplicates(self, node: Any, path: Path) -> None:
        first: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self._key(key_node, path)
            line = key_node.start_mark.line + 1
            if key in first:
                raise ValueError(
                    f"{self._at(key_node, path)}: key {key!r} is already given in line {first[key]}"
                )
            first[key] = line

    def _at(self, node: Node, path: Path) -> str:
        names = " > ".join(" ".join(str(key).split()) for key in path)
        inside = f" (in {_cut(names)})" if path else ""
        return f"{self._name}, line {node.start_mark.line + 1}{inside}"
