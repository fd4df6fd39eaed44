"""The verbs: `deepstack VERB FLAGS`, or `python -m deepstack_jax VERB FLAGS`, is `python -m deepstack_jax.VERB FLAGS`."""

import runpy
import sys

from deepstack_jax.errors import nearest
from deepstack_jax.printing import quote

VERBS = {
    "train": "train a model, or go on with a run where it stopped",
    "evaluate": "answer a held-out set and score the answers",
    "generate": "ask a model about images, once or in a conversation",
    "serve": "answer many over HTTP, by the OpenAI chat API and on a page",
    "convert": "write a run or a checkpoint as a folder that the official code, LLaVA or transformers loads",
    "prepare": "write the data of a configuration as shards with the images inside",
    "audit": "look at what the model will see, before a run",
    "plan": "tell what a configuration takes on a machine, before there is one",
}


def main() -> None:
    """Run the verb that the first argument names, with the others as its flags."""
    verb, flags = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if verb in ("--help", "-help", "-h", "help"):
        print("Usage: deepstack VERB --flag=value ...; deepstack VERB --help tells its flags.\n")
        print("\n".join(f"  {name:<10}{meaning}" for name, meaning in VERBS.items()))
        sys.exit(0)
    if verb not in VERBS:
        print(f"error: unknown verb {quote(verb)}; {nearest(verb, VERBS)}", file=sys.stderr)
        sys.exit(1)
    sys.argv = [f"deepstack {verb}", *flags]
    runpy.run_module(f"deepstack_jax.{verb}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
