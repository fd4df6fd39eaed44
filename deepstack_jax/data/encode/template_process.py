"""The process in which chat templates are rendered; run by its path, and apart from the package, so that it starts fast.

A template comes with a model from anywhere. transformers runs it in a sandbox that reaches nothing, but no sandbox of Python
bounds the time and the memory of what runs in it: here the operating system does. A line of standard input is a request, a
line of standard output its reply, both JSON:

  {"template", "variables", "date", "marked", "messages", "renders": [[messages, prompt?], ...], "most"}
  {"renders": [{"text", "spans"} or {"error"}, ...]}, or {"error"} where the bounds were reached, or {"failed"}
"""

import json
import os
import resource
import signal
import sys
import time

SECONDS = 1.0  # of a processor, for a request
EACH = 0.05  # more for each rendering of it
MEMORY = 512 << 20  # bytes beyond what the process has when it starts


class OutOfTime(BaseException):
    """The time of a request is over; not an Exception, so that nothing on the way takes it for its own."""


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr
    try:
        from transformers.utils import chat_template_utils
    except Exception as error:  # an import that fails in whatever way is told to the parent, which waits for a reply
        _reply(replies, {"failed": f"transformers cannot be imported ({type(error).__name__}: {error})"})
        return
    warm = {"template": "{{ strftime_now('%c') }}{{ a.b }}", "variables": {}, "date": "", "marked": True, "messages": []}
    _render(warm | {"most": 0}, 0, False, chat_template_utils)  # what is read once, for the time and for an error, is read now
    signal.signal(signal.SIGVTALRM, _out_of_time)
    _set_limits()
    for line in sys.stdin:
        _reply(replies, _answer(json.loads(line), chat_template_utils))


def _reply(replies, reply: dict) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _out_of_time(*_: object) -> None:
    raise OutOfTime


def _set_limits() -> None:
    """No more memory than renderings need, and no file but those that are open."""
    try:
        with open("/proc/self/statm") as pages:
            most = int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except OSError:  # a system that does not bound the address space either
        pass
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _answer(request: dict, utils) -> dict:
    seconds = SECONDS + EACH * len(request["renders"])
    # A single operation, as a power of large numbers, ends only with the process: the kernel does that, in whole seconds and
    # at least one after the timer, which leaves out the system's part of the time.
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 2, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        return {"renders": [_render(request, count, prompt, utils) for count, prompt in request["renders"]]}
    except OutOfTime:
        return {"error": f"takes more than {seconds:.1f} seconds"}
    except (MemoryError, RecursionError) as error:
        return {"error": f"needs more memory than a conversation can ({type(error).__name__})"}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _render(request: dict, count: int, prompt: bool, utils) -> dict:
    utils.datetime = _clock(request["date"])
    try:
        texts, spans = utils.render_jinja_template(
            conversations=[request["messages"][:count]],
            chat_template=request["template"],
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=request["marked"],
            **request["variables"],
        )
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # a stranger's template raises what it likes; it is refused in one line, and the process goes on
        line = getattr(error, "lineno", None)
        return {"error": f"{type(error).__name__}{f' in line {line}' if line else ''}: {str(error)[:1000]}"}
    if len(texts[0]) > request["most"]:
        return {"error": f"makes {len(texts[0]):,} characters of a conversation, expected {request['most']:,} at most"}
    return {"text": texts[0], "spans": spans[0] if spans else []}


def _clock(date: str):
    """What `strftime_now` asks for the time."""
    import datetime

    if not date:
        return datetime.datetime

    class Then:
        @staticmethod
        def now() -> datetime.datetime:
            return datetime.datetime.fromisoformat(date)

    return Then


if __name__ == "__main__":
    main()
