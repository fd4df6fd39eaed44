"""`python -m benchmarks.config_reference` writes docs/config.md: every key of a configuration, from the dataclasses."""

from __future__ import annotations

from pathlib import Path

from deepstack_jax.config.reference import as_markdown

OUTPUT = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """# Keys of a configuration

`python -m benchmarks.config_reference` writes this page from `deepstack_jax/config/`. The same list comes from any verb that
takes a configuration, with the values of the file where one is given:

```sh
python -m deepstack_jax.train --config=configs/demo.py --config.help
```

A file in `configs/` changes keys of `default_config()`; a flag `--config.KEY=VALUE` changes one of the file. NAME stands for a
name of your choice. The last column says which keys may have another value when a run goes on in its workdir: those marked
*free*, which change no result; *same examples*, as far as the same examples come out of them; and *from its step on*,
which make it longer or shorter, as the run then says.

"""


def page() -> str:
    """docs/config.md."""
    return HEAD + as_markdown()


if __name__ == "__main__":
    OUTPUT.write_text(page())
