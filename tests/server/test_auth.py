"""Bearer tokens: whose are taken, and what a wrong key file says."""

from __future__ import annotations

import base64
import hmac
import json
import sys
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from orchestrator.errors import SettingsError
from orchestrator.server.auth import Authenticator, Grant
from orchestrator.server.head import Refusal
from orchestrator.settings import load_settings

SECRET = "a secret that is long enough for HS256"
SESSION = "test_001"


def authenticator(**environ: str) -> Authenticator:
    return Authenticator(load_settings(environ))


def token(key: Any = SECRET, algorithm: str = "HS256", headers: dict[str, str] | None = None, **claims: Any) -> str:
    claims = {"exp": time.time() + 3600, **claims}
    return jwt.encode({k: v for k, v in claims.items() if v is not None}, key, algorithm, headers)


def status(check: Authenticator, credential: str | None) -> int:
    verdict = check.admit(credential, SESSION)
    return verdict.status if isinstance(verdict, Refusal) else 101


def unsigned(header: dict[str, str], claims: dict[str, Any]) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims)]
    return ".".join([*parts, ""])


def test_without_auth_everybody_is_let_in():
    check = authenticator()
    assert check.required is False
    assert check.admit(None, SESSION) == Grant(None)
    assert check.admit("anything", SESSION) == Grant(None)


def test_a_good_token_grants_until_it_expires():
    expires = time.time() + 60
    verdict = authenticator(AUTH_JWT_SECRET=SECRET).admit(token(exp=expires), SESSION)
    assert isinstance(verdict, Grant)
    assert verdict.expires_at == pytest.approx(expires, abs=1.0)


@pytest.mark.parametrize(
    ("credential", "expected"),
    [
        (None, 401),
        ("", 401),
        ("no token", 401),
        ("a.b.c", 401),
        (token(exp=time.time() - 1), 401),
        (token(exp=None), 401),
        (token(nbf=time.time() + 3000), 401),
        (token("another secret that is long enough!!!!"), 401),
        (token(SECRET * 2, algorithm="HS384"), 401),
        (unsigned({"alg": "none"}, {"exp": time.time() + 60}), 401),
        (unsigned({"alg": "HS256"}, {"exp": time.time() + 60}), 401),
        (token(session_id="another"), 403),
        (token(session_id=SESSION), 101),
        (token(aud="whoever"), 101),
    ],
)
def test_tokens_against_a_shared_secret(credential, expected):
    assert status(authenticator(AUTH_JWT_SECRET=SECRET), credential) == expected


@pytest.mark.parametrize(("audience", "expected"), [("agents", 101), (["x", "agents"], 101), ("x", 401), (None, 401)])
def test_the_audience_where_one_is_set(audience, expected):
    check = authenticator(AUTH_JWT_SECRET=SECRET, AUTH_AUDIENCE="agents")
    assert status(check, token(aud=audience)) == expected


needs_cryptography = pytest.mark.skipif(not jwt.algorithms.has_crypto, reason="PyJWT without cryptography")


def new_rsa_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, 2048)


def new_ec_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def jwk(key: Any, kid: str) -> dict[str, Any]:
    from cryptography.hazmat.primitives.asymmetric import ec

    maker = jwt.algorithms.ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else jwt.algorithms.RSAAlgorithm
    return {**json.loads(maker.to_jwk(key.public_key())), "kid": kid}


@needs_cryptography
def test_tokens_against_a_key_file(tmp_path: Path):
    rsa_key, ec_key = new_rsa_key(), new_ec_key()
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [jwk(rsa_key, "r"), jwk(ec_key, "e")]}))
    check = authenticator(AUTH_JWKS_FILE=str(file))
    assert status(check, token(rsa_key, "RS256", {"kid": "r"})) == 101
    assert status(check, token(ec_key, "ES256", {"kid": "e"})) == 101
    assert status(check, token(rsa_key, "RS256", {"kid": "e"})) == 401
    assert status(check, token(rsa_key, "RS256", {"kid": "unknown"})) == 401
    assert status(check, token(rsa_key, "RS256")) == 401
    assert status(check, token(rsa_key, "RS512", {"kid": "r"})) == 401
    assert status(check, unsigned({"alg": "none", "kid": "r"}, {"exp": time.time() + 60})) == 401
    # The classic mix-up: the public key, which anybody may have, used as a shared secret.
    public = json.dumps(jwk(rsa_key, "r")).encode()
    body = unsigned({"alg": "HS256", "kid": "r"}, {"exp": time.time() + 60}).rstrip(".")
    signature = base64.urlsafe_b64encode(hmac.digest(public, body.encode(), "sha256")).rstrip(b"=").decode()
    assert status(check, f"{body}.{signature}") == 401


@needs_cryptography
def test_a_single_key_needs_no_key_id(tmp_path: Path):
    key = new_ec_key()
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [jwk(key, "only")]}))
    assert status(authenticator(AUTH_JWKS_FILE=str(file)), token(key, "ES256")) == 101


@needs_cryptography
@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "{}", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "AA"}]}', '{"keys": [3]}']
)
def test_a_key_file_that_is_not_accepted_is_one_line(tmp_path: Path, content):
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError) as refused:
        authenticator(AUTH_JWKS_FILE=str(file))
    assert str(refused.value).startswith(f"AUTH_JWKS_FILE={str(file)!r} is not accepted")
    assert "\n" not in str(refused.value)


def test_auth_without_the_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(SettingsError, match="AUTH_JWT_SECRET needs the extra 'auth'"):
        authenticator(AUTH_JWT_SECRET=SECRET)


def test_a_key_file_without_cryptography_is_one_line(monkeypatch):
    monkeypatch.setattr(jwt.algorithms, "has_crypto", False)
    with pytest.raises(SettingsError, match="AUTH_JWKS_FILE needs the extra 'auth'"):
        authenticator(AUTH_JWKS_FILE="keys.json")
