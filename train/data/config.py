"""The [data] section: where examples come from, how they are written as tokens, and how tokens become rows."""

from dataclasses import dataclass, field
from typing import Literal

from model.errors import PunaError
from train.schema import PathText

Format = Literal["auto", "text", "instruction", "conversations", "messages", "prompt_completion", "preference"]


@dataclass(frozen=True)
class DataSource:
    """One of several places to read: what is not given here is as [data] has it.

    Attributes:
        path: a file, a folder or a Hub data set: see data.path.
        weight: the share of rows drawn from here, relative to the other sources. Without any weight the sources are one
            data set, each row of which is seen once an epoch.
        format: of this source; that of [data] by default.
        template: of this source; that of [data] by default.
        response_template: of this source; that of [data] by default.
        columns: of this source; those of [data] by default.
    """

    path: PathText
    weight: float | None = None
    format: Format | None = None
    template: PathText | None = None
    response_template: str | None = None
    columns: dict[str, str] | None = None


@dataclass(frozen=True)
class DataConfig:
    """[data]: where examples come from, how they are written as tokens, and how tokens become rows.

    Attributes:
        path: a json, jsonl, csv, parquet, arrow or txt file (each line of a txt file is a document), a folder of these,
            a Hub data set "org/name[@revision]", or a list of such paths or of tables. Of a folder or data set one
            split is read, train, or the one behind a colon: "folder:test". [datasets]
        format: what a record is; "auto" tells it from the first record's keys. `system`, `history`, `tools`, and in
            messages `tool_calls`, `weight` and content in parts, mean what they mean elsewhere (train.data.messages),
            or are refused. "preference" is pairs of answers, chosen and rejected: the default under
            [preference].
        columns: our key -> the record's, as in {text = "article"}.
        template: a conversation template's name, "chat_template" for the checkpoint's own, a .jinja file, or a text
            with {column} placeholders. "auto" takes alpaca for instruction records, vicuna_v1.1 for conversations, the
            checkpoint's own for messages and plain for prompt_completion; of preferences, the last two likewise.
        response_template: the last part of a template with placeholders that is not trained on (DialogSum:
            "### Output:\\n"). [TRL]
        max_length: tokens in a row. Longer texts are split over several rows; for conversations see on_overlong. Both
            answers of a preference lie in one row, each with its prompt. [TRL]
        on_overlong: what becomes of a conversation longer than max_length: it is left out ("drop", counted), loses its
            end ("truncate", counted; left out where nothing trained would stay), or is refused by its line ("error").
            Of a preference each half is cut to half of max_length.
        packing: several examples a row, apart from each other. [TRL]
        packing_strategy: "bfd" is best-fit decreasing; "wrapped" joins everything and cuts it every max_length tokens,
            attending across documents, and leaves out the last incomplete row. [TRL; arXiv:2404.10830]
        eval_path: held-out examples, as path.
        validation_split: the fraction of documents (records) held out instead; they are chosen before rows are packed.
            [Keras]
        seed: chooses the documents of validation_split.
        cache_dir: where tokenized rows are kept; $XDG_CACHE_HOME/puna by default.
    """

    path: PathText | tuple[PathText | DataSource, ...] = ""
    format: Format = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    template: PathText = "auto"
    response_template: str = ""
    max_length: int = 1024
    on_overlong: Literal["drop", "truncate", "error"] = "drop"
    packing: bool = False
    packing_strategy: Literal["bfd", "wrapped"] = "bfd"
    eval_path: PathText | None = None
    validation_split: float = 0.0
    seed: int = 0
    cache_dir: PathText | None = None


def check(config: DataConfig) -> None:
    """Check that a run could use these values.

    Raises:
        PunaError: naming the first one that it could not.
    """
    if not config.path:
        raise PunaError("data.path is missing: give a file, a folder or a Hub data set")
    if config.max_length < 2:
        raise PunaError(f"data.max_length is {config.max_length}; it must be 2 or more")
    if not 0 <= config.validation_split < 1:
        raise PunaError(f"data.validation_split is {config.validation_split}; it must be at least 0 and below 1")
    if config.validation_split and config.eval_path:
        raise PunaError("data.eval_path and data.validation_split are both given: keep one")
    if config.packing_strategy == "wrapped" and not config.packing:
        raise PunaError('data.packing_strategy is "wrapped" without packing: set data.packing = true')
    is_wrapped = config.packing and config.packing_strategy == "wrapped"
    if is_wrapped and any(source.format == "preference" for source in sources(config)):
        raise PunaError('data.packing_strategy "wrapped" would cut preferences apart: choose "bfd"')
    weights = [source.weight for source in sources(config)]
    if any(weight is not None and weight <= 0 for weight in weights):
        raise PunaError("data.path: every weight must be above 0")
    if len({weight is None for weight in weights}) > 1:
        raise PunaError("data.path: give every source a weight, or none")


def sources(config: DataConfig) -> tuple[DataSource, ...]:
    """What `config.path` names, each complete with the settings of [data]."""
    listed = (config.path,) if isinstance(config.path, str) else config.path
    return tuple(complete(config, DataSource(each) if isinstance(each, str) else each) for each in listed)


def complete(config: DataConfig, source: DataSource) -> DataSource:
    """`source` with what it leaves out taken from `config`."""
    return DataSource(
        path=source.path,
        weight=source.weight,
        format=source.format or config.format,
        template=source.template or config.template,
        response_template=config.response_template if source.response_template is None else source.response_template,
        columns=config.columns if source.columns is None else source.columns,
    )
