"""Ask a model: `python -m deepstack_jax.generate --model=DIR --image=photo.jpg --prompt="What is written on the sign?"`."""

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from absl import flags

from deepstack_jax import cli
from deepstack_jax.api import DTYPES, LMM, Chat, ConfigError, Options, RequestError, load_in_verb
from deepstack_jax.data.encode.image import ImageError
from deepstack_jax.data.example import ConversationError
from deepstack_jax.generate.prompts import CutImage, cut_image
from deepstack_jax.printing import plural

USAGE = """
Ask a model about images, once or in a conversation.

  python -m deepstack_jax.generate --model=DIR --image=photo.jpg --prompt="What is written on the sign?"
  python -m deepstack_jax.generate --model=DIR --image=a.jpg --image=b.jpg --prompt="What differs?" --json
  python -m deepstack_jax.generate --model=DIR --prompts=questions.txt --temperature=0.7 --top_p=0.9 --seed=1
  python -m deepstack_jax.generate --model=DIR --image=photo.jpg --chat

  --model=DIR           Hugging Face folder or hub id (DeepStack, LLaVA-1.5, LLaVA-NeXT), or the workdir of a training run
  --adapter=DIR         LoRA adapters over the model: the workdir of a run that trained some, or a folder of PEFT
  --image=FILE          again for several; every prompt sees all of them. Where a prompt has no <image>, they come first
  --prompt=TEXT         again for several prompts
  --prompts=FILE        one prompt per line, empty lines left out; --prompts=- or a pipe reads them from standard input
  --chat                a conversation: /image FILE adds a picture, /clear starts again, /exit or Ctrl-D ends; Ctrl-C stops an
                        answer, what was said stays part of the conversation
  --json                one JSON object per answer: prompt, images, answer, tokens, seconds
  --max_new_tokens=64   most tokens of an answer
  --temperature=0       0 = always the likeliest token; then --top_p=1, --top_k=0 (all) and --seed=0 change nothing
  --stop=TEXT           the answer ends before this text; again for several
  --exif=apply          turns images upright as EXIF says; ignore: as they are stored, which the official code does
  --template=NAME       conversation template in place of the model's own, e.g. v1, phi3_instruct, plain
  --dtype=NAME          float32 or bfloat16; float32 on a CPU and bfloat16 on accelerators if left out
  --batch_size=1        prompts answered at once; the answers do not depend on it

Answers go to standard output, all else to standard error. Exit codes: 0 done; 1 a mistake in the input, said in one line;
130 stopped by Ctrl-C.
"""

_OPTIONS = Options()
FLAGS = (
    cli.Flag(flags.DEFINE_string, "model", None, "Model folder, hub id or workdir."),
    cli.Flag(flags.DEFINE_string, "adapter", "", "LoRA adapters over the model."),
    cli.Flag(flags.DEFINE_multi_string, "image", [], "Image file."),
    cli.Flag(flags.DEFINE_multi_string, "prompt", [], "Prompt."),
    cli.Flag(flags.DEFINE_string, "prompts", None, "File with one prompt per line, - for standard input."),
    cli.Flag(flags.DEFINE_boolean, "chat", False, "A conversation in the terminal."),
    cli.Flag(flags.DEFINE_boolean, "json", False, "Answers as JSON lines."),
    cli.Flag(flags.DEFINE_integer, "max_new_tokens", _OPTIONS.max_new_tokens, "Most tokens of an answer."),
    cli.Flag(flags.DEFINE_float, "temperature", _OPTIONS.temperature, "0 = greedy."),
    cli.Flag(flags.DEFINE_float, "top_p", _OPTIONS.top_p, "Probability of the nucleus."),
    cli.Flag(flags.DEFINE_integer, "top_k", _OPTIONS.top_k, "Likeliest tokens drawn from, 0 = all."),
    cli.Flag(flags.DEFINE_multi_string, "stop", [], "Text that ends an answer."),
    cli.Flag(flags.DEFINE_integer, "seed", _OPTIONS.seed, "Seed of the noise."),
    cli.Flag(flags.DEFINE_string, "exif", _OPTIONS.exif, "apply or ignore."),
    cli.Flag(flags.DEFINE_string, "template", None, "Conversation template."),
    cli.Flag(flags.DEFINE_enum, "dtype", None, "float32 or bfloat16.", enum_values=DTYPES),
    cli.Flag(flags.DEFINE_integer, "batch_size", 1, "Prompts answered at once.", lower_bound=1),
)


def main() -> int:
    given: Any = {flag.name: flag.value for flag in FLAGS}
    options = Options(**{option.name: given[option.name] for option in dataclasses.fields(Options)})
    name, dtype, images = given["model"], given["dtype"], [os.path.expanduser(image) for image in given["image"]]
    if not name:
        raise ConfigError("--model is missing; e.g. --model=DIR with a Hugging Face folder or the workdir of a training run")
    if given["chat"] and (given["json"] or given["prompt"] or given["prompts"]):
        raise ConfigError("--chat asks for prompts itself; leave out --prompt, --prompts and --json")
    prompts = [] if given["chat"] else read_prompts(given["prompt"], given["prompts"])
    start = time.perf_counter()
    lmm = load_in_verb(name, dtype, given["adapter"])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(lmm.params))
    note(f"{name}: {parameters:,} parameters in {lmm.config.train.compute_dtype}, read in {time.perf_counter() - start:.1f} s")
    cut = [cut_image(image, lmm.config, options.exif) for image in images]
    for remark, count in Counter(remark for image in cut for remark in image.remarks).items():
        note(f"{remark}: {count}")
    if given["chat"]:
        return chat(lmm, cut, options)
    answer_all(lmm, prompts, list(zip(images, cut, strict=True)), options, given["batch_size"], as_json=given["json"])
    return cli.EXIT_DONE


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """The prompts of the command line, then those of the file or pipe.

    Raises:
      ConfigError: there is none, or the file cannot be read.
    """
    if file is None and (given or sys.stdin.isatty()):
        text = ""
    elif file in (None, "-"):
        text = sys.stdin.read()
    else:
        try:
            text = Path(os.path.expanduser(file)).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--prompts={file} cannot be read: {error}; give a text file with one prompt per line, as UTF-8"
            ) from error
    # Not splitlines: it breaks a prompt at U+2028, a form feed and others that end no line of a file.
    prompts = given + [line.strip() for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    if not prompts:
        raise ConfigError('no prompt; give --prompt="...", --prompts=FILE, a pipe, or --chat')
    return prompts


def answer_all(
    lmm: LMM, prompts: list[str], images: list[tuple[str, CutImage]], options: Options, batch_size: int, *, as_json: bool
) -> None:
    """Answer the prompts about all images (by name), in order, some at once, and print each as soon as it is there."""
    names, cut = [name for name, _ in images], [image for _, image in images]
    total, began = 0, time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        batch, start = prompts[first : first + batch_size], time.perf_counter()
        answers = lmm.answers([(cut, prompt) for prompt in batch], options, batch_size=batch_size)
        seconds = time.perf_counter() - start
        for prompt, (answer, tokens) in zip(batch, answers, strict=True):
            record = {"prompt": prompt, "images": names, "answer": answer, "tokens": tokens, "seconds": round(seconds, 4)}
            print(json.dumps(record, ensure_ascii=False) if as_json else answer, flush=True)
        made = sum(answer.tokens for answer in answers)
        total += made
        rate = "compiling included" if first == 0 else f"{made / seconds:.1f} tokens/s"
        note(f"{first + len(batch)}/{len(prompts)} answered, {seconds:.2f} s, {rate}")
    if len(prompts) > 1:
        note(f"{plural(len(prompts), 'answer')}, {plural(total, 'token')} in {time.perf_counter() - began:.2f} s")


def chat(lmm: LMM, images: list[CutImage], options: Options) -> int:
    """A conversation on the terminal; a mistake is said in one line and the conversation goes on as it was."""
    talk, waiting = lmm.chat(**vars(options)), images
    note("ask away; /image FILE adds a picture, /clear starts again, /exit or Ctrl-D ends, Ctrl-C stops an answer")
    for line in typed_lines():
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/exit":
                break
            case "/clear":
                talk.clear()
                waiting = []
                note("forgotten: all turns and images")
            case "/image" if rest.strip():
                try:
                    waiting.append(cut_image(os.path.expanduser(rest.strip()), lmm.config, options.exif))
                    note(f"{rest.strip()} comes with the next question")
                except ImageError as error:
                    note(f"error: {error}")
            case _ if command.startswith("/"):
                note(f"{command} is not a command; use /image FILE, /clear or /exit")
            case _:
                if answer_turn(talk, line, waiting):
                    waiting = []
    return cli.EXIT_DONE


def typed_lines() -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D; Ctrl-C empties the line."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives `input` its history and line editing)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\nto end type /exit or Ctrl-D")


def answer_turn(talk: Chat, line: str, images: list[CutImage]) -> bool:
    """Stream one answer; False if the question could not be asked, and was not remembered."""
    start, said = time.perf_counter(), False
    try:
        with closing(talk.stream(line, images)) as pieces:  # closed early, it remembers what was said until then
            for piece in pieces:
                print(piece, end="", flush=True)
                said = True
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        note("stopped")
    except (RequestError, ImageError, ConversationError) as error:
        note(f"error: {error}")
        return False
    if not said:
        note("(the model said nothing)")
    note(f"{time.perf_counter() - start:.1f} s")
    return True


def note(text: str) -> None:
    """To the user, beside the answers."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    less = "lower --batch_size or --max_new_tokens, or choose --dtype=bfloat16"
    cli.run(main, USAGE, FLAGS, less)
