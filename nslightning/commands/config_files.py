"""Config files as they were written, with an error for what a YAML parser would pass over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["read_config", "refuse_duplicates"]


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a config file.

    Args:
        path: A YAML file.

    Returns:
        Its content.

    Raises:
        ValueError: If it is not UTF-8, not YAML, empty or no mapping, or names one thing twice; with file and line.
        OSError: If it cannot be read.
    """
    data = Path(path).read_bytes()
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
        raise ValueError(f"{path} is no mapping of options to values, but {text[:100]}{' ...' * (len(text) > 100)}")
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
