"""Config files, on top of the files that they include, with an error for what a YAML parser would pass over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nslightning import configs

__all__ = ["includes", "read_config", "refuse_duplicates", "with_included"]


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a config file, on top of the files that it includes.

    Args:
        path: A YAML file.

    Returns:
        Its content.

    Raises:
        ValueError: If the file is not UTF-8, not YAML, empty or no mapping, if it names a key twice (the message has
            file and line), or if it includes itself.
        FileNotFoundError: If a file that it includes does not exist and is no packaged config.
        OSError: If the file cannot be read.
    """
    return _read(Path(path), ())


def _read(path: Path, outer: tuple[Path, ...]) -> dict[str, Any]:
    """A file's content with what it includes; ``outer`` are the files that include it."""
    content = _content(path)
    if "include" not in content:
        return content
    if not includes(content):
        raise ValueError(
            f"{path}: include: {content['include']} names no YAML files; it is a list of them, such as "
            "[configs/fragments/wandb.yaml]"
        )
    return with_included(content, path.parent, (*outer, path.resolve()))


def includes(content: Any) -> bool:
    """Return whether a config names YAML files that it includes.

    Args:
        content: The content of a YAML document.

    Returns:
        True if it does.

    Example:
        >>> includes({"include": ["fragments/wandb.yaml"]}), includes({"include": "all"})
        (True, False)
    """
    names = content.get("include") if isinstance(content, dict) else None
    return isinstance(names, list) and all(isinstance(n, str) and n.endswith((".yaml", ".yml")) for n in names)


def with_included(content: dict[str, Any], folder: Path, outer: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Put a config on top of the files that it includes, the later one of two files on top of the earlier.

    Mappings are merged, but for the arguments of another class. ``name+`` adds to the list ``name``. Whatever else is
    given twice has the value of the upper file.

    Args:
        content: The config; ``include`` is the list of files.
        folder: The folder in which their names start; a file that is not there is the packaged config of that name.
        outer: The files that are being read, which are not to be included once more.

    Returns:
        The config without ``include``.

    Raises:
        ValueError: If a file includes itself, or cannot be read as a config.
        FileNotFoundError: If a file is neither there nor a packaged config.
    """
    below: dict[str, Any] = {}
    for name in content["include"]:
        file = Path(folder, name)
        try:
            file = (file if file.exists() else configs.path(name)).resolve()
        except FileNotFoundError as error:
            includer = outer[-1] if outer else folder
            raise FileNotFoundError(f"{includer} includes {name}, and {error}") from None
        if file in outer:
            raise ValueError(f"{file} includes itself, by way of {outer[-1]}")
        below = _on_top(below, _read(file, outer))
    return _on_top(below, {key: value for key, value in content.items() if key != "include"})


def _on_top(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two configs as one.

    Example:
        >>> _on_top({"a": {"x": 1, "y": [2]}}, {"a": {"x": 3, "y+": [4]}, "b": 5})
        {'a': {'x': 3, 'y': [2, 4]}, 'b': 5}
        >>> _on_top({"o": {"class_path": "A", "init_args": {"x": 1}}}, {"o": {"class_path": "B"}})
        {'o': {'class_path': 'B'}}
    """
    both = dict(below)
    for key, value in above.items():
        lower, added_to = both.get(key), both.get(key[:-1]) if key.endswith("+") else None
        if isinstance(added_to, list) and isinstance(value, list):
            both[key[:-1]] = [*added_to, *value]
        elif key.endswith("+") and isinstance(lower, list) and isinstance(value, list):
            both[key] = [*lower, *value]
        elif isinstance(lower, dict) and isinstance(value, dict) and len({_class(lower), _class(value)} - {None}) < 2:
            both[key] = _on_top(lower, value)
        else:
            both[key] = value
            both.pop(f"{key}+", None)
    return {key: both[key] for key in sorted(both, key="class_path".__ne__)}  # a class before its arguments


def _class(described: dict[str, Any]) -> str | None:
    """The class that a mapping describes, with or without its module."""
    return str(described["class_path"]).rpartition(".")[2] if "class_path" in described else None


def _content(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is no UTF-8; save the file with the encoding UTF-8"
        ) from None
    try:
        content = yaml.safe_load(text)
        refuse_duplicates(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{path}{where}: this is not YAML: {problem}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(f"{path}: this is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    if content is None:
        raise ValueError(
            f"{path} is empty: a config is a mapping of options to values, such as configs/quickstart.yaml"
        )
    if not isinstance(content, dict):
        text = " ".join(str(content).split())
        raise ValueError(f"{path} is not a mapping of options to values, but {text[:100]}{' ...' * (len(text) > 100)}")
    return content


def refuse_duplicates(text: str) -> None:
    """Raise if a mapping names one key twice: YAML's parsers silently take the last value.

    Args:
        text: A YAML document.

    Raises:
        ValueError: With both lines.
        yaml.YAMLError: If it is not YAML.
    """
    nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                nodes.append(value)
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    continue
                line = key.start_mark.line + 1
                if key.value in seen:
                    raise ValueError(f"line {line}: {key.value} is given twice, first in line {seen[key.value]}")
                seen[key.value] = line
