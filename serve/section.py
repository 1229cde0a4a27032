"""What every settings model is, and the names that settings are made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""Of a tier, a pool, a worker."""

EnvName = Annotated[str, Field(pattern=r"^([A-Z][A-Z0-9_]{0,127})?$")]
"""Of an environment variable that holds a secret; empty: none."""

LIVE: JsonDict = {"live": True}
"""As the `json_schema_extra` of a field: it may change while replicas go on (`serve.config.live`)."""


class Section(BaseModel):
    """Frozen, and strict about unknown keys: a typo must not become a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
