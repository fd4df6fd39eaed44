"""The map in CONTRIBUTING.md: every place that it names is there, and every room is on it."""

import re

from tests.docs.blocks import REPOSITORY

PACKAGE = REPOSITORY / "deepstack_jax"
MAP = (REPOSITORY / "CONTRIBUTING.md").read_text().split("## Where does what live")[1].split("\n## ")[0]
PLACES = [place for place in re.findall(r"`([\w./]+)`", MAP) if place.endswith((".py", "/"))]


def test_every_place_on_the_map_is_there():
    assert len(PLACES) > 30
    missing = [place for place in PLACES if place != "__main__.py" and not (PACKAGE / place).exists()]
    assert not missing


def test_every_room_is_on_the_map():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    named = {place.split("/")[0] for place in PLACES} | set(re.findall(r"`(\w+)`", MAP))
    assert rooms <= named
