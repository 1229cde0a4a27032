"""What every settings model is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and strict about unknown keys: a typo must not become a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
