"""config.yaml: a Ray Serve deploy file whose `args` are our settings."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from serve.config import Settings


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def application(raw: dict[str, Any]) -> dict[str, Any]:
    (only,) = raw["applications"]
    return only


def test_ray_takes_the_file(raw):
    schema = ServeDeploySchema.model_validate(raw)
    assert [app.import_path for app in schema.applications] == ["deployments.app:build"]


def test_it_has_only_keys_that_ray_knows(raw, application):
    """Ray's own schema is lenient: a typo there would be ignored."""
    assert set(raw) <= set(ServeDeploySchema.model_fields)
    app_schema = ServeDeploySchema.model_fields["applications"].annotation.__args__[0]
    assert set(application) <= set(app_schema.model_fields)


def test_it_listens_on_loopback_only(raw):
    assert raw["http_options"]["host"] == "127.0.0.1"
    assert raw["http_options"]["port"] == 8000


def test_args_are_settings(application):
    assert Settings.model_validate(application["args"]).models


def test_the_tiers_of_the_file_are_those_of_an_empty_one(application):
    """Who starts without the file, or with half of it, gets the same product."""
    settings = Settings.model_validate(application["args"])
    assert settings.admission == Settings().admission
    assert settings.ledger == Settings().ledger


def test_an_unknown_key_in_args_is_refused(application):
    with pytest.raises(ValidationError, match="nonsense"):
        Settings.model_validate({**application["args"], "nonsense": 1})


def test_it_holds_no_secret(application):
    text = yaml.safe_dump(application).lower()
    assert not [word for word in ("password", "secret", "token_value") if word in text]
