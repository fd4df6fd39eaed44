"""Chat templates of models: ids as transformers gives them, what is trained of them, and templates that mean harm."""

import json
import re
from functools import cache
from pathlib import Path

import jinja2
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepstack_jax.config.chat_template import own_template
from deepstack_jax.data.encode.chat_template import open_template
from deepstack_jax.data.encode.labels import IMAGE_TOKEN, encode_conversation
from deepstack_jax.data.encode.rendering import TemplateError
from deepstack_jax.data.encode.templates import get_template, render
from deepstack_jax.data.encode.tokenizer import load_tokenizer, template_problem
from deepstack_jax.data.example import ConversationError, Message
from deepstack_jax.errors import ConfigError

PUBLISHED = Path(__file__).parent / "chat_templates"
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
PHI_4 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"]
GRANITE = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"]
MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
# Name of the template's file -> special tokens of such a tokenizer, what its tokenizer_config.json says, end of an answer.
MODELS = {
    "smollm2": (CHATML, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, "<|im_end|>"),
    "qwen2_5": (CHATML, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, "<|im_end|>"),
    "qwen3": ([*CHATML, "<think>", "</think>"], {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, "<|im_end|>"),
    "llama_3": (LLAMA, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, "<|eot_id|>"),
    "llama_3_2": (LLAMA, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, "<|eot_id|>"),
    "phi_3": (PHI, {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}, "<|end|>"),
    "phi_4": (PHI_4, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, "<|im_end|>"),
    "phi_4_first": (PHI_4, {"eos_token": "<|endoftext|>"}, "<|im_end|>"),
    "granite_3": (GRANITE, {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}, "<|end_of_text|>"),
    "mistral": (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "</s>"),
}
NO_SYSTEM = ("mistral",)
ROWS = {
    "one exchange": ["What is the total?", "It is 12.50."],
    "a system text": ["system", "Be brief.", "What is the total?", "It is 12.50."],
    "three exchanges": ["Hi", "Hello!", "How much?", "Three  euros", "Sure?", "Yes.\nQuite."],
    "white space around": ["system", " Be kind. ", "  What?\n", " That. ", "\nAgain?", "So:\n\n  x = 1\n"],
    "other letters": ["Où est 北京?", "Ici: é 😀", "▁<", ">"],
    "no answer": ["Say nothing.", "", "And now?", "Now."],
    "the template's own words": ["user", "assistant", "system\n", "user"],
}


PAIRS = [(name, row) for name in MODELS for row in ROWS if name not in NO_SYSTEM or ROWS[row][0] != "system"]


def messages_of(row):
    """Turns of a row: a system text where it begins so, then questions and answers."""
    front = [Message("system", row[1])] if row[0] == "system" else []
    said = row[2:] if front else row
    return front + [Message(("human", "gpt")[number % 2], text) for number, text in enumerate(said)]


def as_dicts(messages):
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return [{"role": roles[message.role], "content": message.text} for message in messages]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a small tokenizer with the special tokens and the chat template of a published model."""

    @cache
    def make(name):
        special, settings, _ = MODELS[name]
        return write_model(tmp_path_factory.mktemp(name), special, settings, (PUBLISHED / f"{name}.jinja").read_text())

    return make


def write_model(folder, special, settings, template):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(
        models.BPE({letter: at for at, letter in enumerate([*letters, "on", "at"])}, [("o", "n"), ("a", "t")])
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = ("<think>", "</think>")  # which Qwen has as tokens that are not special
    swallowing = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")  # of Phi-3
    bpe.add_special_tokens([AddedToken(token, rstrip=token in swallowing) for token in special if token not in words])
    bpe.add_tokens([AddedToken(token) for token in special if token in words])
    bpe.save(str(folder / "tokenizer.json"))
    said = settings | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@cache
def opened(folder):
    tokenizer = load_tokenizer(str(folder))
    return open_template(own_template(folder), tokenizer), tokenizer, PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_ids_equal_those_of_transformers(name, row, folders):
    template, tokenizer, theirs = opened(folders(name))
    messages = messages_of(ROWS[row])
    encoded = encode_conversation(template.render(messages), tokenizer, has_image=False, plain_words=True)
    assert encoded.ids.tolist() == theirs.apply_chat_template(as_dicts(messages), return_dict=False)
    asked = template.render(messages[:-1], complete=False)
    ids = theirs.apply_chat_template(as_dicts(messages[:-1]), add_generation_prompt=True, return_dict=False)
    assert theirs(asked.text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_a_published_template_without_system_texts_refuses_them_here_as_there(name, folders):
    template, _, theirs = opened(folders(name))
    row = messages_of(ROWS["a system text"])
    with pytest.raises(ConversationError, match="turn 0 is a system prompt, which this chat template does not take"):
        template.render(row)
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        theirs.apply_chat_template(as_dicts(row))


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_what_is_trained_is_every_answer_with_its_end_of_turn(name, row, folders):
    template, tokenizer, theirs = opened(folders(name))
    messages = messages_of(ROWS[row])
    rendered = template.render(messages)
    trimmed = name.startswith("llama")  # their templates do
    answers = [message.text.strip() if trimmed else message.text for message in messages if message.role == "gpt"]
    if name == "qwen3":  # which shows the thoughts of the last answer, be there none
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1].lstrip("\n")
    end = MODELS[name][2]
    spoken = [rendered.text[start:stop] for start, stop in rendered.spans]
    assert spoken == [answer + end for answer in answers]
    encoded = encode_conversation(rendered, tokenizer, has_image=False, plain_words=True)
    trained = theirs.decode(encoded.ids[encoded.supervised])
    assert "".join(trained.split()) == "".join("".join(spoken).split())  # Phi-3's tokens swallow white space after them
    assert encoded.ids[encoded.supervised][-1] == theirs.convert_tokens_to_ids(end)
    said = [rendered.text[start:stop].strip() for start, stop in rendered.words]
    assert said == [message.text.strip() for message in messages]


IMAGE_ROW = messages_of(["<image>\nWhat is\non it?", "A cat.", "And <image> here?", "on a mat"])


@pytest.mark.parametrize("name", MODELS)
def test_chunks_around_images_are_read_one_by_one(name, folders):
    template, tokenizer, theirs = opened(folders(name))
    rendered = template.render(IMAGE_ROW)
    encoded = encode_conversation(rendered, tokenizer, plain_words=True)
    chunks = [theirs(chunk, add_special_tokens=False)["input_ids"] for chunk in rendered.text.split("<image>")]
    assert encoded.ids.tolist() == [*chunks[0], IMAGE_TOKEN, *chunks[1], IMAGE_TOKEN, *chunks[2]]
    assert not encoded.supervised[encoded.ids == IMAGE_TOKEN].any()


@pytest.mark.parametrize("name", MODELS)
def test_control_tokens_in_words_are_letters(name, folders):
    """What a user writes cannot end a turn, though the template's own tokens stay tokens."""
    template, tokenizer, theirs = opened(folders(name))
    end = MODELS[name][2]
    front = [] if name in NO_SYSTEM else ["system", f"a{end}"]
    row = messages_of([*front, f"{end}b", f"c{end}d", end, f"{end}"])
    encoded = encode_conversation(template.render(row), tokenizer, has_image=False, plain_words=True)
    others = messages_of([*("system", "a")[: len(front)], "b", "cd", "x", "y"])
    plain = encode_conversation(template.render(others), tokenizer, has_image=False)
    id = theirs.convert_tokens_to_ids(end)
    assert (encoded.ids == id).sum() == (plain.ids == id).sum()
    read = encode_conversation(template.render(row), tokenizer, has_image=False)
    assert read.ids.tolist() == theirs.apply_chat_template(as_dicts(row), return_dict=False)


def chatml(answer):
    """ChatML with another text for an answer."""
    turn = "{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}" + answer
    turn += "{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}"
    asking = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return f"{{% for message in messages %}}{turn}{{% endfor %}}{asking}"


MARKED = chatml("{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}")
LONG = messages_of(["Name a bird.", "A blackbird.", "Another one.", "A wren."])


@pytest.mark.parametrize("name", ["", "smollm3"])
def test_generation_blocks_are_what_is_trained(name, tmp_path):
    """Those of SmolLM3 hold the beginning of an answer's turn too; its parts about tools, which no turn has, are left out."""
    text = (PUBLISHED / f"{name}.jinja").read_text() if name else MARKED
    folder = write_model(tmp_path, [*CHATML, "<think>", "</think>"], {"eos_token": "<|im_end|>"}, text)
    template, tokenizer, theirs = opened(folder)
    for row in map(messages_of, ROWS.values()):
        encoded = encode_conversation(template.render(row), tokenizer, has_image=False, plain_words=True)
        expected = theirs.apply_chat_template(as_dicts(row), return_assistant_tokens_mask=True, return_dict=True)
        assert encoded.ids.tolist() == expected["input_ids"]
        np.testing.assert_array_equal(encoded.supervised, np.array(expected["assistant_masks"], bool))


def test_a_template_that_writes_earlier_turns_anew_is_refused_unless_it_marks_answers():
    """As one that shows thoughts in the last answer only, and in a prompt writes what was said before in another way."""
    changing = "{{ '!' if messages|length > 2 else '' }}" + chatml("{{ message.content + '<|im_end|>' }}")
    with pytest.raises(ConversationError, match=r"turn 1: the chat template prompts .* where the whole conversation has '!"):
        open_template(f"jinja:{changing}").render(LONG)
    assert len(open_template("jinja:{{ '!' if messages|length > 2 else '' }}" + MARKED).render(LONG).spans) == 2
    cut = "jinja:" + chatml("{{ (message.content if loop.last else '') + '<|im_end|>' }}")
    with pytest.raises(TemplateError, match="does not write what is said, turn after turn; choose another"):
        open_template(cut).render(LONG)


def test_words_that_spell_a_control_token_need_a_template_that_tells_them_apart(folders):
    tokenizer = load_tokenizer(str(folders("smollm2")))
    template = open_template("jinja:{{ '!' if messages|length > 2 else '' }}" + MARKED, tokenizer)
    with pytest.raises(ConversationError, match="turn 1: the chat template prompts"):
        template.render([*LONG[:3], Message("gpt", "A <|im_end|>.")])


HOSTILE = {
    "no end": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 1"),
    "one long operation": ("{{ (7 ** (10 ** 9)) % 3 }}", "takes more"),
    "a long text": ("{{ 'a' * 10 ** 10 }}", "needs more memory"),
    "a text that grows": (
        "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "needs more memory",
    ),
    "much of it": ("{% for a in range(99999) %}{{ 'abc' }}{% endfor %}", "makes 299,997 characters of a conversation"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError.*__class__.*unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('id') }}", "SecurityError.*__init__"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "what changes the turns": ("{{ messages.append(1) }}", "SecurityError"),
    "no such name": ("{{ nothing.there }}", "'nothing' is undefined"),
    "no jinja": ("{% for %}", "TemplateSyntaxError in line 1"),
    "a refusal": ("{{ raise_exception('No.\n\x1b[2JNever.') }}", r"No\.\\n\\u001b\[2JNever"),
    "nothing": ("", "does not write what is said"),
    "parts": ("{{ messages[0].content.nothing.text }}", "no attribute 'nothing'"),
    "no end in words": ("{{ messages|map(attribute='content')|join('x' * 100000) }}", "makes"),
}


@pytest.mark.parametrize("harm", [pytest.param(one, marks=[pytest.mark.slow] * one.startswith("one")) for one in HOSTILE])
def test_a_template_that_means_harm_is_one_line(harm):
    text, said = HOSTILE[harm]
    with pytest.raises(TemplateError, match=said) as caught:
        template_problem(f"jinja:{text}", load_tokenizer("bytes"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_after_harm_the_next_template_is_rendered_and_other_rows_too():
    patient = "jinja:{% if messages|length > 4 %}" + HOSTILE["no end"][0] + "{% endif %}" + chatml("{{ message.content }}</s>")
    template = open_template(patient, load_tokenizer("bytes"))
    assert template.render(LONG).text.endswith("A wren.</s>")
    with pytest.raises(TemplateError, match="takes more than"):
        template.render(LONG + LONG)
    assert len(template.render(LONG).spans) == 2


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (chatml("{{ message.content + '<|done|>' }}"), r"ends a turn with <\|done\|>, which the tokenizer reads as 7 tokens"),
        (chatml("{{ message.content }}<|im_end|>").replace("'\\n'", "'<|sep|>'"), r"writes <\|sep\|>, which the tokenizer"),
        (chatml("{{ message.content }}"), "writes nothing after an answer"),
        (chatml("{{ message.content + '<|im_end|>' }}"), ""),
    ],
)
def test_what_does_not_go_with_the_tokenizer_is_said(template, problem, folders):
    found = template_problem(f"jinja:{template}", load_tokenizer(str(folders("smollm2"))))
    assert re.search(problem, found) if problem else found == ""


def test_a_template_that_asks_for_the_date_keeps_that_of_its_run(folders):
    text = (PUBLISHED / "llama_3_2.jinja").read_text()
    row = messages_of(ROWS["one exchange"])
    assert "Today Date: 29 Feb 2024\n" in open_template(f"jinja@2024-02-29:{text}").render(row).text
    assert own_template(folders("llama_3_2"), dated=True).startswith("jinja@20")
    assert own_template(folders("llama_3_2")) == f"jinja:{text}"
    assert own_template(folders("smollm2"), dated=True).startswith("jinja:")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"tokenizer_config.json": '{"chat_template": "one"}'}, "jinja:one"),
        ({"tokenizer_config.json": '{"chat_template": "one"}', "chat_template.jinja": "two\n"}, "jinja:two\n"),
        ({"chat_template.json": '{"chat_template": "three"}'}, "jinja:three"),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "four"}]}
                )
            },
            "jinja:four",
        ),
        ({"tokenizer_config.json": '{"chat_template": null}'}, ""),
        ({}, ""),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "x"}]}'}, "has rag, expected one named"),
        ({"tokenizer_config.json": '{"chat_template": 5}'}, "chat_template is a int, expected a text"),
        ({"tokenizer_config.json": "{"}, "is not JSON"),
        ({"chat_template.jinja": "x" * (2 << 20)}, "has more than 1,048,576 bytes"),
        ({"chat_template.jinja": "\xff"}, "is no text"),
    ],
)
def test_where_a_folder_keeps_its_template(files, found, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    if found == "" or found.startswith("jinja:"):
        assert own_template(tmp_path) == found
        return
    with pytest.raises(ConfigError, match=found):
        own_template(tmp_path)


def test_a_system_text_goes_only_to_templates_that_have_a_place_for_it():
    row = messages_of(ROWS["a system text"])
    with pytest.raises(ConversationError, match=r"turn 0 is a system prompt, but .*remove the turn.*data\.template=model"):
        render(row, get_template("v1"))
    plain = chatml("{{ message.content }}</s>")
    deaf = open_template("jinja:" + plain.replace("messages %}", "messages if message.role != 'system' %}", 1))
    with pytest.raises(ConversationError, match="turn 0 is a system prompt, which this chat template does not take"):
        deaf.render(row)
    refusing = open_template(
        "jinja:{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + plain
    )
    assert not refusing.takes_system
    assert open_template(f"jinja:{plain}").takes_system


def test_a_template_that_reads_turns_in_parts():
    """As those beside the processors of llava-hf."""
    text = (
        "{% for message in messages %}{% if message.role != 'system' %}{{ message.role.upper() + ': ' }}{% endif %}"
        "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    template = open_template(f"jinja:{text}")
    assert template.render(LONG[:1], complete=False).text == "USER: Name a bird. ASSISTANT:"
    assert template.render(IMAGE_ROW).text.count("<image>") == 2
