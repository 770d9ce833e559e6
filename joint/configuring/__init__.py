"""From YAML files and `key=value` to dataclasses of any kind, with every mistake and its place."""
