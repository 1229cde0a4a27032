"""Where the key is from that seals secrets."""

import stat

import pytest

from deployments.vaults import KEY_FILE, open_vault
from serve.config import Settings, Webhooks
from serve.jobs.vault import Vault


NAME = "TEST_WEBHOOK_KEY"


def settings(folder, **rules) -> Settings:
    return Settings(data_dir=str(folder / "data"), webhooks=Webhooks(**rules))


def test_the_file_is_made_once_for_its_owner_alone(tmp_path):
    sealed = open_vault(settings(tmp_path)).seal("whsec_")
    assert open_vault(settings(tmp_path)).open(sealed) == "whsec_"
    (file,) = (tmp_path / "data").iterdir()
    assert file.name == KEY_FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_who_is_second_takes_the_key_of_the_first(tmp_path, monkeypatch):
    first, second = Vault.new_key(), Vault.new_key()
    path = tmp_path / "data" / KEY_FILE

    def beaten() -> str:
        path.write_text(first)
        return second

    monkeypatch.setattr(Vault, "new_key", beaten)
    sealed = open_vault(settings(tmp_path)).seal("whsec_")
    assert Vault(first).open(sealed) == "whsec_"
    assert list(path.parent.iterdir()) == [path]


def test_the_variable_goes_before_the_file(tmp_path, monkeypatch):
    key = Vault.new_key()
    monkeypatch.setenv(NAME, key)
    sealed = open_vault(settings(tmp_path, key_env=NAME)).seal("whsec_")
    assert Vault(key).open(sealed) == "whsec_"
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("value", "why"), [(None, "is not set"), ("", "is not set"), ("x", "no key")]
)
def test_a_variable_without_a_key_is_named(tmp_path, monkeypatch, value, why):
    if value is None:
        monkeypatch.delenv(NAME, raising=False)
    else:
        monkeypatch.setenv(NAME, value)
    with pytest.raises(RuntimeError, match=f"{NAME}.*{why}"):
        open_vault(settings(tmp_path, key_env=NAME))
