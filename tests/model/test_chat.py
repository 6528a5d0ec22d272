"""Chat templates: the same text as transformers, and nothing but text comes out of a hostile one."""

import pytest

from lowbit.errors import CheckpointError, RequestError
from lowbit.model.chat import render_chat

CHATML = (
    "{%- for m in messages %}\n  {{- '<|im_start|>' + m.role + '\\n' + m['content'] | trim + '<|im_end|>' }}"
    "\n"
    "{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
LLAMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system = false %}{% endif %}{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (('<<SYS>>' + system + '<</SYS>> ') if loop.first and system else '') + m['content'] "
    "+ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for m in messages %}{% if m.content is none %}"
    "{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m | tojson }}|{% endfor %}"
    "{% generation %}{% set inner = 1 %}answer{% endgeneration %}{{ inner is defined }}"
)
NAMESPACE = (
    "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.text = ns.text ~ m.content[:2] %}{% endfor %}{{ ns.n }}"
    "{{ ns.text }}\n   {% if true %}  x\n{% endif %}\n y"
)
DATE = "{{ strftime_now('%Y')[:2] }}{{ messages | length }}{{ custom | default('none') }}"
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "tools": TOOLS, "namespace": NAMESPACE, "date": DATE}
TALK = [
    {"role": "system", "content": " Be <brief> & 'kind' \"ü\" \n"},
    {"role": "user", "content": "Hi 🦙"},
    {"role": "assistant", "content": "Hello\n\nyou"},
    {"role": "user", "content": "{{ 7 * 7 }} </s>"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def theirs(template, messages, **options):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(name, prompt):
    for messages in (TALK, TALK[1:2], TALK[1:]):
        options = {"tools": [{"type": "function", "name": "f", "é": [1, None]}]} if name == "tools" else {}
        ours = render_chat(TEMPLATES[name], messages, prompt, SPECIAL, **options)
        assert ours == theirs(TEMPLATES[name], messages, add_generation_prompt=prompt, **options)


def test_smollm2_template(shared_data):
    template = shared_data("tokenizers/smollm2.chat_template.jinja").read_text()
    for messages in (TALK, TALK[1:]):
        assert render_chat(template, messages) == theirs(template, messages, add_generation_prompt=True)
    assert render_chat(template, TALK[1:2]).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )


def test_variables_reach_the_template():
    assert render_chat("{{ enable_thinking }}", [], enable_thinking=False) == "False"
    assert render_chat(DATE, [], custom="c").endswith("0c")


def test_refusals_are_request_errors():
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        render_chat(LLAMA2, [TALK[1], TALK[1]], special_tokens=SPECIAL)
    with pytest.raises(RequestError, match=r"fails on these messages|refuses"):
        render_chat("{{ messages[0].content + 1 }}", TALK)
    with pytest.raises(RequestError, match="list of mappings"):
        render_chat(CHATML, "hello")
    with pytest.raises(RequestError, match="list of mappings"):
        render_chat(CHATML, ["hello"])
    with pytest.raises(RequestError, match="holds a object"):
        render_chat(CHATML, [{"role": "user", "content": object()}])
    deep = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RequestError, match="nest deeper than 32"):
        render_chat(CHATML, [{"role": "user", "content": deep}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ '%c' | format(range) }}{{ range(10 ** 9) | list }}",
        "{% include 'other' %}",
        "{{ tojson.__globals__ }}{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
    ],
)
def test_hostile_templates_stay_in_the_sandbox(template):
    try:
        text = render_chat(template, TALK)
    except RequestError:
        return
    assert text == "" or ("module" not in text and "class" not in text)


def test_bad_templates_are_named():
    for template, message in (
        ("{% if %}", "not a valid template"),
        ("{{ x | nofilter }}", "not a valid template"),
        ("x" * (2 << 20), "characters; 1048576 are allowed"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "chat template"),
    ):
        with pytest.raises(CheckpointError, match=message):
            render_chat(template, TALK)


def test_text_subclasses_lose_their_methods():
    class Loud(str):
        def upper(self):
            return "called"

    assert render_chat("{{ messages[0].content.upper() }}", [{"role": "user", "content": Loud("a")}]) == "A"
