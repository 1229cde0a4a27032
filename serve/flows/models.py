"""The models this service answers for: settings, tokenizer, revision and where to send work."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from serve.config import Model, ModelKind, Settings
from serve.embedding.files import revision
from serve.embedding.tokenizer import Tokenizer
from serve.errors import NotFound
from serve.ports import Embedder


@dataclass(frozen=True, slots=True)
class Served:
    """One model as the ingress sees it. `tokens_max` is the lower of its own and the API's."""

    model: Model
    tokenizer: Tokenizer
    revision: str
    embedder: Embedder
    tokens_max: int


class Models:
    """Every served model by id. Knows nothing of engines: those live in the embedders."""

    def __init__(self, served: Mapping[str, Served]) -> None:
        self._served = dict(served)

    @classmethod
    def open(cls, settings: Settings, embedders: Mapping[str, Embedder]) -> "Models":
        """Read every tokenizer; `embedders` is by pool name."""
        return cls(
            {
                model.id: Served(
                    model,
                    Tokenizer.open(model),
                    revision(model),
                    embedders[pool.name],
                    min(model.tokens_max, settings.limits.input_tokens_max),
                )
                for pool in settings.pools
                for model in pool.models
            }
        )

    def __iter__(self) -> Iterator[Served]:
        """Served models in the order of the settings."""
        return iter(self._served.values())

    def find(
        self, model_id: str, *, param: str = "model", kind: ModelKind | None = "embedding"
    ) -> Served:
        """The model of that id and kind (None: any). Raises NotFound with OpenAI's code."""
        served = self._served.get(model_id)
        if served is None:
            raise NotFound(
                f"The model {model_id[:128]!r} does not exist.", param=param, code="model_not_found"
            )
        if kind not in (None, served.model.kind):
            raise NotFound(
                f"The model {model_id!r} is of kind {served.model.kind}; a model of kind {kind} is needed.",
                param=param,
                code="model_not_found",
            )
        return served

    def first(self, kind: ModelKind = "embedding", *, param: str = "model") -> Served:
        """The model used where none is named: the first of its kind in the settings.

        Raises NotFound where there is none; one that embeds there always is.
        """
        for served in self:
            if served.model.kind == kind:
                return served
        raise NotFound(f"This service has no {kind}.", param=param, code="model_not_found")
