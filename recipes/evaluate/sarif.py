"""The verdicts as SARIF 2.1.0, a format that CI services read: a rule per threshold, a result per verdict.

The fields are defined in https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recipes.evaluate.identity import Identity
from recipes.evaluate.thresholds import Verdict
from recipes.reporting.records import plain

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
FAILED = 3
"""Exit status of an audit in which a threshold fails."""


def sarif(identity: Identity, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the log: one run, whose results refer to ``audit.json``."""
    driver = {
        "name": "fisher-reg audit",
        "version": str(identity.provenance["environment"]["fisher-reg"]),
        "rules": [_rule(verdict) for verdict in verdicts],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [
            {
                "executionSuccessful": True,  # of the audit itself; the results say whether thresholds fail
                "exitCode": 0 if all(verdict.passed for verdict in verdicts) else FAILED,
                "commandLine": identity.provenance["command"],
                "endTimeUtc": identity.date.replace("+00:00", "Z"),
            }
        ],
        "artifacts": [{"location": {"uri": "audit.json"}, "mimeType": "application/json"}],
        "results": [_result(place, verdict) for place, verdict in enumerate(verdicts)],
        "properties": {"weights_sha256": identity.weights_sha256, "images_sha256": identity.images_sha256},
    }
    log: dict[str, Any] = plain({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]})
    return log


def _rule(verdict: Verdict) -> dict[str, Any]:
    return {
        "id": verdict.threshold.key,
        "shortDescription": {"text": f"{verdict.number.title}: {verdict.threshold}"},
        "defaultConfiguration": {"level": "error"},
        "properties": {"guarantee": verdict.number.guarantee, "unit": verdict.number.unit},
    }


def _result(place: int, verdict: Verdict) -> dict[str, Any]:
    return {
        "ruleId": verdict.threshold.key,
        "ruleIndex": place,
        "kind": "pass" if verdict.passed else "fail",
        "level": "none" if verdict.passed else "error",
        "message": {"text": verdict.reason},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": "audit.json", "index": 0}}}],
        "partialFingerprints": {"threshold/v1": verdict.threshold.key},
        "properties": {
            "value": verdict.number.value,
            "compared": verdict.compared,
            "limit": verdict.threshold.limit,
            "images": verdict.number.count,
        },
    }
