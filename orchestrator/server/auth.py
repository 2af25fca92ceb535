"""Bearer tokens: who may open a session. PyJWT comes with the extra `auth` and is imported only where auth is on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orchestrator.errors import SettingsError
from orchestrator.server.head import Refusal
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from jwt.api_jwk import PyJWK

ALGORITHM_OF_KEY: Final = {"RSA": "RS256", "EC": "ES256"}
MIN_SECRET_BYTES: Final = 32
"""RFC 7518 section 3.2: an HS256 key has at least the size of the hash."""

log = logging.getLogger(__name__)

_CHALLENGE = (("WWW-Authenticate", "Bearer"),)


@dataclass(frozen=True, slots=True)
class Grant:
    """The token is good until `expires_at` (Unix seconds); None where auth is off."""

    expires_at: float | None = None


_Check = Callable[[str], dict[str, Any]]


class Authenticator:
    """Checks tokens against `AUTH_JWT_SECRET` or `AUTH_JWKS_FILE`; without either, everybody is let in."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError when PyJWT is missing or the key material is unusable."""
        self._check: _Check | None = None
        if settings.auth_jwt_secret or settings.auth_jwks_file:
            self._check = _build_check(settings)

    @property
    def required(self) -> bool:
        """Whether a token is needed."""
        return self._check is not None

    def admit(self, token: str | None, session_id: str) -> Grant | Refusal:
        """Whether the bearer of `token` may use `session_id`: a refusal is 401 or 403."""
        if self._check is None:
            return Grant()
        if token is None:
            return Refusal(401, "a bearer token is required", _CHALLENGE)
        import jwt

        try:
            claims = self._check(token)
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            return Refusal(401, "the bearer token is not valid", _CHALLENGE)
        if "session_id" in claims and claims["session_id"] != session_id:
            return Refusal(403, "the bearer token is for another session")
        return Grant(float(claims["exp"]))


def _build_check(settings: Settings) -> _Check:
    variable = "AUTH_JWT_SECRET" if settings.auth_jwt_secret else "AUTH_JWKS_FILE"
    missing = SettingsError(f"{variable} needs the extra 'auth': pip install 'statemanager-orchestrator[auth]'")
    try:
        import jwt
    except ImportError:
        raise missing from None
    if settings.auth_jwks_file and not jwt.algorithms.has_crypto:
        raise missing
    options: Any = {"require": ["exp"], "verify_aud": bool(settings.auth_audience)}
    audience = settings.auth_audience or None
    if settings.auth_jwt_secret:
        secret = settings.auth_jwt_secret
        if len(secret.encode()) < MIN_SECRET_BYTES:
            log.warning("AUTH_JWT_SECRET has fewer than %d bytes: easy to guess", MIN_SECRET_BYTES)

        def check_secret(token: str) -> dict[str, Any]:
            return jwt.decode(token, secret, algorithms=["HS256"], audience=audience, options=options)

        return check_secret
    keys = _load_keys(settings.auth_jwks_file)

    def check_signature(token: str) -> dict[str, Any]:
        key = _pick_key(keys, jwt.get_unverified_header(token).get("kid"))
        algorithm = ALGORITHM_OF_KEY[key.key_type or ""]
        return jwt.decode(token, key.key, algorithms=[algorithm], audience=audience, options=options)

    return check_signature


def _load_keys(path: str) -> list[PyJWK]:
    import jwt

    accepted = "a readable JWKS file with RSA or EC P-256 keys"
    try:
        keys = jwt.PyJWKSet.from_dict(json.loads(Path(path).read_text(encoding="utf-8"))).keys
    except OSError as error:
        raise SettingsError(f"AUTH_JWKS_FILE={path!r} is not accepted: {accepted} ({error.strerror})") from None
    except (ValueError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise SettingsError(f"AUTH_JWKS_FILE={path!r} is not accepted: {accepted} ({error})") from None
    usable = [key for key in keys if key.key_type in ALGORITHM_OF_KEY and key.public_key_use in (None, "sig")]
    if not usable:
        raise SettingsError(f"AUTH_JWKS_FILE={path!r} is not accepted: {accepted}")
    return usable


def _pick_key(keys: list[PyJWK], kid: object) -> PyJWK:
    if kid is None and len(keys) == 1:
        return keys[0]
    for key in keys:
        if kid is not None and key.key_id == kid:
            return key
    raise KeyError("no key has this kid")
