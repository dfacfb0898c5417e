"""What generation_config.json asks for is followed, known to do nothing, said, or refused by name."""

import json

import pytest
from converting import save_hf
from small_tokenizer import small_tokenizer
from transformers import GenerationConfig

from convert.generation import _ACTS, HARMLESS, IDS, SAMPLING, read_generation
from infer.load import find_model
from model.errors import PunaError


def written(folder, **said):
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder / "generation_config.json"


def test_every_key_of_transformers_is_known():
    """What it writes by default is no reason to refuse or to say anything."""
    assert GenerationConfig().to_dict().keys() <= HARMLESS.keys() | _ACTS.keys() | {*IDS, *SAMPLING}


def test_what_transformers_writes_by_default_is_read(tmp_path, capsys):
    GenerationConfig().save_pretrained(tmp_path)
    read_generation(tmp_path / "generation_config.json")
    defaults = GenerationConfig._get_default_generation_params()
    assert read_generation(written(tmp_path, **defaults)) == defaults
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [7]),
        ("bad_words_ids", [[1, 2]]),
        ("typical_p", 0.9),
        ("min_new_tokens", 5),
        ("stop_strings", ["\n"]),
        ("guidance_scale", 1.5),
        ("forced_bos_token_id", 3),
        ("penalty_alpha", 0.6),
        ("encoder_no_repeat_ngram_size", 2),
        ("encoder_repetition_penalty", 1.8),
    ],
)
def test_what_changes_a_text_and_is_not_done_is_refused(tmp_path, key, value):
    with pytest.raises(PunaError, match=f"generation_config.json: {key} = .* is not supported"):
        read_generation(written(tmp_path, **{key: value}))


def test_what_nobody_knows_is_said_once(tmp_path, capsys):
    file = written(tmp_path, my_note="x", chat_format="chatml", max_new_tokens=512, temperature=0.7)
    for _ in range(2):
        read_generation(file)
    assert capsys.readouterr().err == f"{file}: unknown keys, not used: chat_format, my_note\n"


@pytest.mark.parametrize(
    ("config", "generation", "ends", "said"),
    [
        (452, None, (452,), None),
        (452, 452, (452,), None),
        (452, [452, 453], (452, 453), None),
        (453, 452, (452,), "texts end at token 452, as transformers ends them; another end: config.json 453"),
        ([452, 453], 452, (452,), "another end: config.json 452, 453"),
        (452, 453, (453,), "another end: config.json 452; the tokenizer 452"),
        (453, None, (453,), "another end: the tokenizer 452"),
    ],
)
def test_of_three_ends_transformers_choice_is_taken_and_said(tmp_path, capsys, config, generation, ends, said):
    save_hf(tmp_path, vocab_size=512, num_key_value_heads=4, eos_token_id=config)
    small_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        written(tmp_path, eos_token_id=generation)
    source = find_model(tmp_path)
    assert source.tokenizer.eos_id == 452 and source.eos_ids == ends
    lines = [line for line in capsys.readouterr().err.splitlines() if "texts end" in line]
    assert len(lines) == (said is not None) and (said is None or said in lines[0])
