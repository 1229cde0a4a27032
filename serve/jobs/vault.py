"""Seals what the Store keeps but must not show: secrets of webhooks. A copy of the database alone
signs nothing.
"""

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from serve.errors import Internal


class Vault:
    """Holds the key; one per process."""

    def __init__(self, keys: str) -> None:
        """`keys`: one, or several separated by commas: the first one seals, all of them open.

        A key is the base64 of 32 bytes. Raises ValueError for anything else.
        """
        try:
            self._fernet = MultiFernet([Fernet(key.strip()) for key in keys.split(",")])
        except ValueError:
            raise ValueError("a key is the base64 of 32 bytes") from None

    @staticmethod
    def new_key() -> str:
        """A fresh key."""
        return Fernet.generate_key().decode()

    def seal(self, text: str) -> str:
        """The text so that only a holder of the key can read it; each time another one."""
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str:
        """What was sealed. Raises Internal when no key of ours sealed it."""
        try:
            return self._fernet.decrypt(sealed).decode()
        except InvalidToken:
            raise Internal("A secret was sealed with a key that this process lacks.") from None
