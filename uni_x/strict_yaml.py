"""YAML as people write it: a key that stands twice in a mapping is an error, where YAML's readers take the last one."""

from typing import Any

import yaml


def load_yaml(text: str) -> Any:
    """What a YAML document says. Raises `yaml.YAMLError` where it is not valid, or has a key twice."""
    return yaml.load(text, _StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)  # before merge keys (<<) add what may well be there already
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                where = f"line {line}" if line == lines[name] else f"lines {lines[name]} and {line}"
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice, in {where}; keep one of them")
            lines[name] = line
        return node
