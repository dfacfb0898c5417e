"""The examples as the model sees them: what is trained on in colour, what is masked dim, tokens apart."""

from rich.console import Console
from rich.text import Text

from model.tokenizer import Tokenizer
from train.data import IGNORE_INDEX, PackedDataset, Sampler, load_dataset
from train.sections import Config
from train.start import prepare, tokenizer_of

TRAINED, MASKED = (
    ("bold green", "bold cyan"),
    ("dim", "dim italic"),
)  # two shades each, so that tokens can be told apart


def preview(config: Config, examples: int) -> None:
    """Prints the first rows of the run's first batches, and the counts of all its data, to stdout.

    Args:
        config: the run's.
        examples: how many rows to print.

    Raises:
        PunaError: the data, its settings or the tokenizer are wrong.
    """
    prepare(config)
    tokenizer = tokenizer_of(config)
    datasets = load_dataset(config.data, tokenizer)
    sampler = Sampler(datasets, 1, config.run.seed)
    console = Console(highlight=False)
    for step in range(min(examples, sampler.num_rows)):
        batch = sampler.batch(step)
        row = int(batch["rows"][0])
        filled = int((batch["segments"][0] != 0).sum())
        tokens, labels = batch["tokens"][0, :filled].tolist(), batch["labels"][0, :filled].tolist()
        trained = sum(label != IGNORE_INDEX for label in labels)
        console.rule(f"row {row}: {filled} tokens, {trained} trained, {filled - trained} masked", align="left")
        console.print("from " + ", ".join(sampler.where(row)), markup=False, style="dim", soft_wrap=True)
        console.print(colour(tokens, labels, tokenizer), soft_wrap=True)
    console.rule("all", align="left")
    for dataset in (*datasets.train, *filter(None, [datasets.evaluation])):
        console.print(describe(dataset), markup=False, soft_wrap=True)


def colour(tokens: list[int], labels: list[int], tokenizer: Tokenizer) -> Text:
    """The text of one row in colour. Special tokens show by name, bytes that are part of a character by their number.

    Args:
        tokens: the row's, without padding.
        labels: of the same length; a token is trained on where the one before it has it as its label.
        tokenizer: whose tokens they are.
    """
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    text = Text()
    for i, token in enumerate(tokens):
        shades = TRAINED if i and labels[i - 1] != IGNORE_INDEX else MASKED
        spelled = tokenizer.token_bytes(token)
        try:
            piece = names.get(token) or spelled.decode()
        except UnicodeDecodeError:
            piece = "".join(f"<{byte:02X}>" for byte in spelled)
        text.append(piece, shades[i % 2])
    return text


def describe(dataset: PackedDataset) -> str:
    """The counts of one data set, with the files that it was read from."""
    return f"{', '.join(dataset.paths)}: {dataset.counts}"
