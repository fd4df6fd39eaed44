"""Which questions are asked together: those of like length, so that little is padded and few shapes are compiled."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from deepstack_jax.data.encode.encoder import try_record
from deepstack_jax.data.encode.sizes import header_layouts
from deepstack_jax.data.example import BadExample, Example, GroupedSource
from deepstack_jax.evaluate.tasks import Task
from deepstack_jax.generate.answers import Answerer
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import CutImage, find_template


class Place(NamedTuple):
    """A question by its place in the source."""

    row: int
    turn: int


class _Size(NamedTuple):
    images: int
    tokens: int  # of the prompt, with its images; 0 of one that the model cannot be asked


def batches_of(
    task: Task, answerer: Answerer, options: Options, rows: Iterable[int], batch_size: int
) -> tuple[list[list[Place]], list[BadExample]]:
    """All questions of some rows in batches, the largest first; and the rows that cannot be read.

    Of a source that reads its rows in groups it is the group with the largest question first, and within it the largest: in any
    other order a group would be read for each of its rows.

    Sizes are known by the headers of the images, of which none is decoded. What needs too much memory needs it at once, and
    the time left is rather said too long than too short. The same for any number of devices and processes.

    Raises:
      RequestError: no such template.
    """
    template, no_pixels = find_template(options.template or answerer.template, answerer.tokenizer), np.zeros(0, np.uint8)

    def sizes_of(example: Example) -> list[tuple[_Size, Place]]:
        images = [CutImage(no_pixels, layout) for layout in header_layouts(example, answerer.config.data_spec)]
        found = []
        for question in task.questions(example, images, template):
            try:
                prompt = None if question.problem else answerer.encode(question.turns, options, placed=True)
            except RequestError:  # said when it is asked
                prompt = None
            size = _Size(0, 0) if prompt is None else _Size(len(prompt.layouts), prompt.length)
            found.append((size, Place(question.row, question.turn)))
        return found

    sized, bad = list[tuple[_Size, Place]](), list[BadExample]()
    for row in rows:
        made = try_record(task.source, row, sizes_of, lost=True)
        if isinstance(made, BadExample):
            bad.append(made)
        else:
            sized += made
    group_of = task.source.group if isinstance(task.source, GroupedSource) else lambda _row: 0
    groups = {place.row: group_of(place.row) for _, place in sized}
    largest = dict[int, _Size]()
    for size, place in sized:
        largest[groups[place.row]] = max(size, largest.get(groups[place.row], size))

    def order(one: tuple[_Size, Place]) -> tuple[int, ...]:
        (images, tokens), place = one
        first = largest[groups[place.row]]
        return (-first.images, -first.tokens, groups[place.row], -images, -tokens, *place)

    places = [place for _, place in sorted(sized, key=order)]
    return [places[first : first + batch_size] for first in range(0, len(places), batch_size)], bad
