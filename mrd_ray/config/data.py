"""Which samples, and what of them counts."""

import string
from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from mrd_ray.config.base import Frozen, Name


class DataConfig(Frozen):
    """The forget set, and what of each sample is scored."""

    path: Name = Field(
        description="A .jsonl, .json, .csv, .parquet or .txt file (local path or fsspec URI), "
        "or the id of a Hugging Face dataset."
    )
    name: str | None = Field(None, description="Configuration of a hub dataset, e.g. forget10 of locuslab/TOFU.")
    split: str = Field("train", description="Split of a hub dataset.")
    text: str | None = Field(None, description="Column that holds whole texts.")
    prompt: str | None = Field(None, description="Column that holds prompts; goes with data.response.")
    response: str | None = Field(None, description="Column that holds responses; goes with data.prompt.")
    id: str | None = Field(
        None,
        description="Column with a unique id per sample. Unset: a column named sample_id or id where there is one, "
        "else a digest of the columns that make the sample.",
    )
    template: str = Field(
        "Question: {prompt}\nAnswer: {response}",
        description="How prompt and response are joined: a format string with {prompt} and {response}, "
        "or 'chat' for the tokenizer's chat template (where that asks for today's date, it is 26 Jul 2024, always).",
    )
    score_on: Literal["all", "response"] = Field(
        "all", description="Which tokens count: every one after the first, or the response alone."
    )
    max_tokens: PositiveInt | None = Field(
        None, description="Longest sample in tokens; unset, the model's context length."
    )
    truncate: bool = Field(
        False, description="Cut longer samples to data.max_tokens. Otherwise they are reported as errors."
    )
    window_tokens: int = Field(256, ge=2, description="A .txt file is cut into samples of this many tokens.")
    where: dict[str, bool | int | str] = Field(
        {}, description="Use only rows whose columns have these values: '{safe: false}'."
    )
    max_samples: PositiveInt | None = Field(None, description="Use only the first so many rows.")

    @field_validator("template")
    @classmethod
    def _template_has_both_fields(cls, template: str) -> str:
        if template == "chat":
            return template
        try:
            pieces = [piece for piece in string.Formatter().parse(template) if piece[1] is not None]
        except ValueError as problem:
            raise ValueError(f"data.template is not a format string: {problem}") from None
        fields = [name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                  for _, name, spec, conversion in pieces if name is not None]  # fmt: skip
        if sorted(fields) != ["prompt", "response"]:
            raise ValueError(
                "data.template must hold {prompt} and {response} once each and no other field "
                f"(write {{{{ and }}}} for literal braces), or be 'chat'; its fields are {fields}"
            )
        return template

    @model_validator(mode="after")
    def _columns_agree(self) -> "DataConfig":
        if (self.prompt is None) != (self.response is None):
            raise ValueError("data.prompt and data.response go together; set both or neither")
        if self.text is not None and self.prompt is not None:
            raise ValueError("set data.text, or data.prompt with data.response, not both")
        if self.text is not None and self.score_on == "response":
            raise ValueError("data.score_on: response needs data.prompt and data.response; data.text has no response")
        return self


class RetainConfig(Frozen):
    """The samples whose knowledge is to stay. Read as `data` says (columns, template, limits), but for `where`."""

    path: Name | None = Field(None, description="A file or hub dataset, as data.path. Unset: none.")
    name: str | None = Field(None, description="Configuration of a hub dataset, e.g. retain90 of locuslab/TOFU.")
    split: str = Field("train", description="Split of a hub dataset.")
    text: str | None = Field(None, description="Column of whole texts, where data has prompts and responses.")
    max_samples: PositiveInt | None = Field(None, description="Use only the first so many rows.")
