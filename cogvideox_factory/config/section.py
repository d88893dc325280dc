"""What every section of the settings shares: strict, frozen, unknown keys forbidden, docstrings as help."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
FrameRate = Annotated[float, Field(ge=0.01, le=1000)]


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
