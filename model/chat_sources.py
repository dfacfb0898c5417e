"""The named conversation templates of chat.py in jinja, as a checkpoint carries its template in chat_template.jinja.

Other systems render them, to the same ids. Here the first line names the template that was trained, which then takes
its place, with what it masks and stops at.
"""

import json
import re

ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
ALPACA_INPUT = ", paired with an input that provides further context"

VICUNA = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)

# The example that FastChat v0.1.10 (Apache-2.0) puts before every conversation at inference, byte for byte.
ONE_SHOT = (
    "Human: What are the key differences between renewable and non-renewable energy sources?###"
    "Assistant: Renewable energy sources are those that can be replenished naturally in a relatively short amount of "
    "time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
    "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between "
    "renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n###"
)


def named_in(source: str) -> str | None:
    """The name of the template that `source` is, unchanged; None for any other template."""
    match = re.match(r"\{# puna: ([\w.-]+) #\}", source)
    return match[1] if match and SOURCES.get(match[1]) == source.strip() else None


def _text(text: str) -> str:
    """A text as jinja spells it in an expression."""
    return json.dumps(text)


_ASKED = "(m.content ~ ('\\n' ~ m.input if m.input else ''))"
_ANSWER = "{{ m.content ~ eos_token }}"


def _with_system(body: str) -> str:
    """`body` with the first system message in `system`, and the others in `turns`."""
    first = "{% set is_system = messages[0].role == 'system' %}"
    system = "{% set system = messages[0].content if is_system else none %}"
    return f"{first}{system}{{% set turns = messages[1:] if is_system else messages %}}{body}"


def _without_system(body: str, name: str) -> str:
    refused = f"{{{{ raise_exception('template {name} has no place for a system message') }}}}"
    return _with_system(f"{{% if is_system %}}{refused}{{% endif %}}{body}")


def _turns(user: str, answer: str = _ANSWER) -> str:
    """A loop that writes every message of the user and every answer."""
    return f"{{% for m in turns %}}{{% if m.role == 'user' %}}{user}{{% else %}}{answer}{{% endif %}}{{% endfor %}}"


def _first(text: str) -> str:
    """An expression written before the first message alone."""
    return f"{{% if loop.first %}}{{{{ {text} }}}}{{% endif %}}"


def _alpaca() -> str:
    default, given = map(_text, ALPACA.split("{}")), _text(ALPACA_INPUT)
    before, after = default
    header = f"(system or ({before} ~ ({given} if m.input else '') ~ {after})) ~ '\\n\\n'"
    middle = "('\\n\\n### Input:\\n' ~ m.input if m.input else '')"
    user = f"{_first(header)}{{{{ '### Instruction:\\n' ~ m.content ~ {middle} ~ '\\n\\n### Response:' }}}}"
    return "{{ bos_token }}" + _with_system(_turns(user))


def _chinese_alpaca() -> str:
    header = _first(f"(system or {_text(ALPACA.format(''))}) ~ '\\n\\n'")
    user = f"{header}{{{{ '### Instruction:\\n' ~ {_ASKED} ~ '\\n\\n### Response: ' }}}}"
    return "{{ bos_token }}" + _with_system(_turns(user))


def _chinese_alpaca_inference() -> str:
    user = f"{{{{ '### Instruction:\\n\\n' ~ {_ASKED} ~ '\\n\\n### Response:\\n\\n' }}}}"
    return "{{ bos_token }}" + _without_system(_turns(user), "chinese-alpaca-inference")


def _vicuna() -> str:
    user = f"{{{{ 'USER: ' ~ {_ASKED} ~ ' ' ~ ('ASSISTANT:' if not loop.last or add_generation_prompt else '') }}}}"
    header = f"{{{{ bos_token ~ (system or {_text(VICUNA.format('user'))}) ~ ' ' }}}}"
    return _with_system(header + _turns(user, "{{ ' ' ~ m.content ~ eos_token }}"))


def _vicuna_v0() -> str:
    header = f"(system or {_text(VICUNA.format('human'))})"
    asking = _turns(f"{{{{ 'Human: ' ~ {_ASKED} ~ '###Assistant:' }}}}", "{{ ' ' ~ m.content ~ '###' }}")
    training = _turns(f"{{{{ '### Human: ' ~ {_ASKED} ~ '\\n' }}}}", "{{ '### Assistant: ' ~ m.content ~ '\\n' }}")
    prompt = f"{{{{ bos_token ~ {header} ~ '###' ~ {_text(ONE_SHOT)} }}}}{asking}"
    text = f"{{{{ bos_token ~ {header} ~ '\\n\\n' }}}}{training}"
    return _with_system(f"{{% if add_generation_prompt %}}{prompt}{{% else %}}{text}{{% endif %}}")


def _wizardlm() -> str:
    end = "('\\n' if loop.last and add_generation_prompt else '')"
    user = f"{{{{ m.content ~ '\\n\\n### Response:' ~ {end} }}}}"
    return "{{ eos_token }}" + _without_system(_turns(user), "wizardlm")


def _plain(name: str) -> str:
    return "{{ bos_token }}" + _without_system(_turns(f"{{{{ {_ASKED} }}}}"), name)


def _llama2() -> str:
    header = "('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' if loop.first and system is not none else '')"
    user = f"{{{{ bos_token ~ '[INST] ' ~ ({header} ~ {_ASKED}) | trim ~ ' [/INST]' }}}}"
    return _with_system(_turns(user, "{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}"))


def _llama3() -> str:
    head = "'<|start_header_id|>' ~ {} ~ '<|end_header_id|>\\n\\n'"
    each = f"{{{{ {head.format('m.role')} ~ {_ASKED} | trim ~ '<|eot_id|>' }}}}"
    last = "{% if add_generation_prompt %}{{ " + head.format("'assistant'") + " }}{% endif %}"
    return f"{{{{ '<|begin_of_text|>' }}}}{{% for m in messages %}}{each}{{% endfor %}}{last}"


def _chatml() -> str:
    each = f"{{{{ '<|im_start|>' ~ m.role ~ '\\n' ~ {_ASKED} ~ '<|im_end|>\\n' }}}}"
    last = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    return f"{{% for m in messages %}}{each}{{% endfor %}}{last}"


SOURCES = {
    name: f"{{# puna: {name} #}}{source}"
    for name, source in (
        ("alpaca", _alpaca()),
        ("vicuna_v1.1", _vicuna()),
        ("vicuna_v0", _vicuna_v0()),
        ("wizardlm", _wizardlm()),
        ("llama2", _llama2()),
        ("llama3", _llama3()),
        ("chatml", _chatml()),
        ("chinese-alpaca", _chinese_alpaca()),
        ("chinese-alpaca-inference", _chinese_alpaca_inference()),
        ("plain", _plain("plain")),
        ("qlora", _plain("qlora")),
    )
}
