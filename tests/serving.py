"""A tiny chat model on disk, and `infer serve` on it in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import threading

import jax
import pytest
from small_tokenizer import small_tokenizer

from convert import save_model
from convert.peft import save_adapter
from model import LlamaConfig, init_params
from model.lora import LoraArray, add
from model.tokenizer import load_tokenizer

# ChatML with functions, as NousResearch's Hermes models have it.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '</tools> Answer with <tool_call>{}</tool_call><|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["puna", "yunga"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}


def chat_model(folder, context=512):
    """A random model with a tokenizer and a template in `folder`/model, and an adapter in `folder`/poet."""
    (folder / "tokenizer").mkdir()
    tokenizer = load_tokenizer(small_tokenizer(folder / "tokenizer", TOOLS))
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.25,
        eos_token_id=(tokenizer.eos_id,),
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    save_model(folder / "model", config, params, tokenizer=tokenizer)
    _, adapted = add(params, config, jax.random.key(1), rank=4, alpha=8)

    def trained(leaf):
        if not isinstance(leaf, LoraArray):
            return leaf
        return leaf.replace(b=jax.random.normal(jax.random.key(2), leaf.b.shape) * 0.3)

    adapted = jax.tree.map(trained, adapted, is_leaf=lambda leaf: isinstance(leaf, LoraArray))
    save_adapter(folder / "poet", adapted)
    return folder / "model"


class Server:
    """`infer serve` on a free port; `with` waits until it is ready, and in the end that it has drained.

    It compiles as tests do, without LLVM's optimizations.

    Args:
        entry: what Python runs.
        environment: variables beside those of this process.
        folder: where it starts; this process's own by default.
    """

    def __init__(self, *arguments, entry=("-m", "infer"), environment=None, folder=None):
        command = [sys.executable, *map(str, entry), "serve", *map(str, arguments), "--port", "0"]
        variables = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | (environment or {})
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables, cwd=folder)
        self.log, self.url = [], ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)

    def _read(self):
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.match(r"Ready: (\S+)", line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def __enter__(self):
        self._reader.start()
        if not (self._ready.wait(500) and self.url):
            self.process.kill()
            self._end()
            pytest.fail("".join(self.log))
        return self

    def terminate(self):
        """SIGTERM, as systems that stop a service send it."""
        self.process.send_signal(signal.SIGTERM)

    def __exit__(self, *_):
        self.terminate()
        assert self._end() == 0, "".join(self.log)

    def _end(self):
        code = self.process.wait(120)
        self._reader.join()
        self.process.stderr.close()
        return code
