"""config.json of an earlier release, as this one would have written it.

Every change of the schema that a default does not cover (a key renamed or removed) takes a number: SCHEMA goes up by one, and
UPGRADES says what became of the keys. A key that is new needs nothing: where it is missing it has its default.
"""

import copy
import warnings
from typing import Any

from deepstack_jax.errors import ConfigError
from deepstack_jax.printing import quote

SCHEMA = 1
# By the schema that a file is of (0: from before it had a number), old dotted key -> new one, or what to know of its removal.
RENAMED: dict[int, dict[str, str]] = {}
REMOVED: dict[int, dict[str, str]] = {}


def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config.json by their names of today, without its schema number; warns of each that is gone.

    Raises:
      ConfigError: the file is of a later release.
    """
    if not isinstance(stored, dict):
        return stored
    config = copy.deepcopy({key: value for key, value in stored.items() if key != "schema"})
    schema = stored.get("schema", 0)
    if not isinstance(schema, int) or not 0 <= schema <= SCHEMA:
        raise ConfigError(
            f"config.json has schema {quote(schema)}, this release knows 0 to {SCHEMA}; read it with the release that wrote it "
            "or a later one"
        )
    for number in range(schema, SCHEMA):
        for key, new in RENAMED.get(number, {}).items():
            if (value := _pop(config, key)) is not None:
                *sections, name = new.split(".")
                place = config
                for section in sections:
                    place = place.setdefault(section, {})
                place[name] = value
        for key, instead in REMOVED.get(number, {}).items():
            if (value := _pop(config, key)) is not None:
                warnings.warn(f"config.json has {key} {quote(value)}, which is no longer there: {instead}", stacklevel=2)
    return config


def _pop(config: dict[str, Any], key: str) -> Any:
    """The value of a dotted key, taken out; None where it is not there."""
    *sections, name = key.split(".")
    for section in sections:
        config = config.get(section, {})
        if not isinstance(config, dict):
            return None
    return config.pop(name, None)
