"""Certificates in virtual time: always one that everybody trusts, replaced before it expires."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store
from dynamo_operator.admission.certificates import (
    AUTHORITY_LIFE,
    SERVING_LIFE,
    Key,
    Material,
    due,
    from_files,
    names_of,
    renewed,
    to_files,
)
from hypothesis import given
from hypothesis import strategies as st

NAMES = ("hook.dynamo-system.svc", "10.89.0.1")
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


class Dice:
    """Randomness that repeats; keys are drawn once, because drawing them takes time."""

    keys: tuple[Key, ...] = tuple(ec.generate_private_key(ec.SECP256R1()) for _ in range(4))

    def __init__(self) -> None:
        self.drawn = 0

    def key(self) -> Key:
        self.drawn += 1
        return self.keys[self.drawn % len(self.keys)]

    def serial(self) -> int:
        self.drawn += 1
        return self.drawn


def trusts(bundle: bytes, serving: bytes, now: datetime) -> bool:
    """Whether a client that knows `bundle` accepts the certificate, as the API server would."""
    store = Store(x509.load_pem_x509_certificates(bundle))
    verifier = PolicyBuilder().store(store).time(now).build_server_verifier(x509.DNSName(NAMES[0]))
    try:
        verifier.verify(x509.load_pem_x509_certificate(serving), [])
    except x509.verification.VerificationError:
        return False
    return True


def test_the_first_certificate() -> None:
    material = renewed(None, NAMES, BEGIN, Dice())
    assert trusts(material.bundle, material.serving.certificate, BEGIN)
    assert names_of(material.serving.parsed) == set(NAMES)
    assert renewed(material, NAMES, BEGIN + DAY, Dice()) is material


def test_ten_years_without_a_request_that_fails() -> None:
    """Replicas and API server learn of what is new up to an hour late."""
    dice = Dice()
    material = renewed(None, NAMES, BEGIN, dice)
    learnt = material  # what the slowest client trusts and the slowest replica serves
    authorities: set[bytes] = set()
    servings: set[bytes] = set()
    now = BEGIN
    while now < BEGIN + timedelta(days=3650):
        now += timedelta(hours=12)
        material = renewed(material, NAMES, now, dice)
        for bundle in (material.bundle, learnt.bundle):
            for serving in (material.serving, learnt.serving):
                assert trusts(bundle, serving.certificate, now)
        learnt = material
        authorities |= {a.certificate for a in material.authorities}
        servings.add(material.serving.certificate)
        assert len(material.authorities) <= 2
        assert material.serving.parsed.not_valid_after_utc - now > 29 * DAY
    assert len(authorities) == 6
    assert len(servings) == pytest.approx(3650 / 60, abs=5)


def test_a_new_authority_signs_only_after_a_day() -> None:
    dice = Dice()
    material = renewed(None, NAMES, BEGIN, dice)
    now = BEGIN + AUTHORITY_LIFE * 2 / 3
    published = renewed(material, NAMES, now, dice)
    assert len(published.authorities) == 2
    old, new = (a.parsed.subject for a in published.authorities)
    assert published.serving.parsed.issuer == old
    assert renewed(published, NAMES, now + 0.9 * DAY, dice) == published
    signed = renewed(published, NAMES, now + 1.1 * DAY, dice)
    assert signed.serving.parsed.issuer == new
    assert signed.authorities == published.authorities


def test_a_missing_name_gives_a_new_certificate_of_the_same_authority() -> None:
    material = renewed(None, NAMES, BEGIN, Dice())
    more = renewed(material, (*NAMES, "localhost"), BEGIN, Dice())
    assert more.authorities == material.authorities
    assert names_of(more.serving.parsed) == {*NAMES, "localhost"}


def test_due_after_two_thirds() -> None:
    certificate = renewed(None, NAMES, BEGIN, Dice()).serving.parsed
    assert not due(certificate, BEGIN + SERVING_LIFE * 0.66)
    assert due(certificate, BEGIN + SERVING_LIFE * 0.67)


def test_files_keep_everything() -> None:
    dice = Dice()
    material = renewed(None, NAMES, BEGIN, dice)
    material = renewed(material, NAMES, BEGIN + AUTHORITY_LIFE * 0.7, dice)
    assert len(material.authorities) == 2
    assert from_files(to_files(material)) == material


@given(st.dictionaries(st.sampled_from(["tls.crt", "tls.key", "ca.crt", "ca.key"]), st.binary()))
def test_spoilt_files_give_nothing(spoilt: dict[str, bytes]) -> None:
    good = to_files(SPOILABLE)
    read = from_files({**good, **spoilt})
    assert (read == SPOILABLE) if not spoilt else (read is None)


SPOILABLE: Material = renewed(None, NAMES, BEGIN, Dice())


def test_a_key_of_another_certificate_is_noticed() -> None:
    dice = Dice()
    other = renewed(None, NAMES, BEGIN, dice)
    swapped = dataclasses.replace(
        SPOILABLE, serving=dataclasses.replace(SPOILABLE.serving, key=other.authorities[0].key)
    )
    keys = {SPOILABLE.serving.key, other.authorities[0].key}
    assert (from_files(to_files(swapped)) is None) == (len(keys) == 2)
