"""Which samples, and what of them counts."""

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from mrd_ray.config import template as templates
from mrd_ray.config.base import COMMON, Frozen, Name, NamesFile

_Path = Annotated[Name, NamesFile()]
Paths = _Path | Annotated[tuple[_Path, ...], Field(min_length=1)]
_PLAIN_TEXT = re.compile(r"\.txt(\.(gz|zst|bz2|xz))?$", re.IGNORECASE)


def is_plain_text(path: Paths) -> bool:
    """Whether the path names .txt files, compressed or not, by its ending."""
    return all(_PLAIN_TEXT.search(one) for one in ([path] if isinstance(path, str) else path))


class DataSettings(Frozen):
    """The forget set, and which part of each sample is scored. docs/your-data.md shows every format."""

    path: Paths = Field(
        description="A file, a folder, a pattern such as 'part-*.jsonl', or a list of these (local or fsspec URIs), or "
        "the id of a Hugging Face dataset. Files: .jsonl, .json, .ndjson, .csv, .tsv, .txt, .parquet or .arrow, "
        "also compressed (.gz, .zst, .bz2, .xz).",
        json_schema_extra=COMMON,
    )
    name: str | None = Field(None, description="Configuration of a hub dataset, for example forget10 of locuslab/TOFU.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub dataset.")
    split: str = Field(
        "train",
        description="Split of a hub dataset, a folder or a JSON object of lists; also a slice: 'train[:50%]'.",
    )
    encoding: str | None = Field(
        None,
        description="Encoding of text files, for example cp1252. Unset: detected among UTF-8 and UTF-16 (in CSV also "
        "cp1252).",
    )
    separator: str | None = Field(
        None, min_length=1, max_length=1, description="Separator of .csv and .tsv files. Unset: detected."
    )
    quotes: bool = Field(True, description="Whether double quotes may enclose fields of .csv and .tsv files.")
    text: str | None = Field(None, description="Column with whole texts.", json_schema_extra=COMMON)
    prompt: str | None = Field(
        None,
        description="Column with the prompts, or a template of columns as in data.template. Needs data.response.",
        json_schema_extra=COMMON,
    )
    response: str | None = Field(
        None,
        description="Column with the responses. Nested columns are written with dots: answers.text.",
        json_schema_extra=COMMON,
    )
    messages: str | None = Field(
        None,
        description="Column with conversations: lists of {role, content} or {from, value}. The tokenizer's chat "
        "template renders them.",
        json_schema_extra=COMMON,
    )
    id: str | None = Field(
        "auto",
        description="Column with a unique id per sample. auto: the column sample_id or id if there is one, else as "
        "null. null: a digest of the columns that make the sample.",
    )
    id_with_row: bool = Field(False, description="Make repeated ids unique by their row: doc-7#3.")
    template: str = Field(
        "Question: {prompt}\nAnswer: {response}",
        description="How to build a sample: a format string with {prompt}, {response} or any column in braces; the "
        "same in Jinja ('{{ instruction }}{% if input %} ...'); 'alpaca'; or 'chat' for the tokenizer's chat template "
        "(if that asks for today's date, it always gets 26 Jul 2024). \\n is a line break.",
    )
    score_on: Literal["all", "response"] = Field(
        "all",
        description="Which tokens count: all after the first, or only the response (in conversations, every assistant "
        "turn).",
        json_schema_extra=COMMON,
    )
    numbers_as_text: bool = Field(
        False, description="Read numbers in prompts and responses as text, by their digits: 1987."
    )
    response_index: NonNegativeInt | None = Field(
        None, description="If a response is a list: the index of the entry to take, from 0."
    )
    response_join: str | None = Field(
        None, description="If a response is a list: take all entries, joined by this text."
    )
    list_separator: str | None = Field(
        None,
        min_length=1,
        description="If a list is expected and the value is a text: where to split it, for example at '; '.",
    )
    max_tokens: PositiveInt | None = Field(
        None, description="Longest sample, in tokens. Unset: the model's context length."
    )
    truncate: bool = Field(
        False, description="Cut longer samples to data.max_tokens. If false, they get an error instead of a score."
    )
    window_tokens: int = Field(256, ge=2, description="A .txt file is cut into samples of this many tokens.")
    where: dict[str, bool | int | str] = Field(
        {}, description="Use only rows whose columns have these values: '{safe: false}'."
    )
    max_samples: PositiveInt | None = Field(
        None,
        description="Use only this many rows: the first ones, or with data.sample_seed a random draw.",
        json_schema_extra=COMMON,
    )
    sample_seed: NonNegativeInt | None = Field(
        None, lt=2**63, description="Seed for a random draw of data.max_samples rows. Unset: the first rows."
    )

    @field_validator("template")
    @classmethod
    def _template_holds_a_sample(cls, template: str) -> str:
        template = templates.unescaped(template)
        try:
            if template != "chat":
                templates.check(template)
        except ValueError as problem:
            raise ValueError(f"data.template: {problem}; or set it to 'chat'") from None
        return template

    @field_validator("prompt")
    @classmethod
    def _prompt_is_a_column_or_template(cls, prompt: str | None) -> str | None:
        try:
            if prompt is not None and "{" in prompt:
                prompt = templates.unescaped(prompt)
                templates.parse(prompt)
        except ValueError as problem:
            raise ValueError(f"data.prompt: {problem}") from None
        return prompt

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, encoding: str | None) -> str | None:
        try:
            if encoding is not None:
                "".encode(encoding)  # which codecs that are not of text refuse
        except LookupError:
            raise ValueError(f"data.encoding: {encoding!r} is no encoding; give e.g. utf-8, utf-16 or cp1252") from None
        return encoding

    @model_validator(mode="after")
    def _columns_agree(self) -> "DataSettings":
        kinds = {"data.text": self.text, "data.prompt": self.prompt, "data.messages": self.messages}
        if len(given := [name for name, column in kinds.items() if column is not None]) > 1:
            raise ValueError(f"{' and '.join(given)}: set only one of them")
        if self.prompt is not None and self.response is None:
            raise ValueError("data.prompt and data.response go together; set both or neither")
        if self.response is not None and self.prompt is None:
            if self.text is not None or self.messages is not None:
                raise ValueError("data.response goes with data.prompt, not with data.text or data.messages")
            if self.template == "chat" or not templates.parse(self.template).own_columns:
                raise ValueError(
                    "data.prompt and data.response go together; set both, or a data.template that names columns"
                )
        if self.text is not None and self.score_on == "response":
            raise ValueError("data.score_on: response needs data.prompt and data.response; data.text has no response")
        if self.response_index is not None and self.response_join is not None:
            raise ValueError("data.response_index takes one of a list, data.response_join all; set one of them")
        _refuse_seed_without_number("data", self.sample_seed, self.max_samples)
        return self


def _refuse_seed_without_number(section: str, seed: int | None, number: int | None) -> None:
    if seed is not None and number is None:
        raise ValueError(f"{section}.sample_seed draws {section}.max_samples rows; set that too")


class RetainSettings(Frozen):
    """The samples that the model is to keep. They are read with the columns, template and limits of `data`."""

    path: Paths | None = Field(
        None, description="Files or a hub dataset, as in data.path. Unset: no retain set.", json_schema_extra=COMMON
    )
    name: str | None = Field(None, description="Configuration of a hub dataset, for example retain90 of locuslab/TOFU.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub dataset.")
    split: str = Field("train", description="Split, as in data.split.")
    text: str | None = Field(None, description="Column with whole texts, if data has prompts and responses.")
    messages: str | None = Field(None, description="Column with conversations, if data has none.")
    max_samples: PositiveInt | None = Field(
        None,
        description="Use only this many rows: the first ones, or with retain.sample_seed a random draw.",
        json_schema_extra=COMMON,
    )
    sample_seed: NonNegativeInt | None = Field(
        None, lt=2**63, description="Seed for a random draw of retain.max_samples rows. Unset: the first rows."
    )

    @model_validator(mode="after")
    def _seed_has_a_number(self) -> "RetainSettings":
        _refuse_seed_without_number("retain", self.sample_seed, self.max_samples)
        return self
