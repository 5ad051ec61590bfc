"""A hub with a certificate of an authority that is not a public one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.synthetic import models as synthetic
from tests.support.certificates import local_tls
from tests.support.hub import LocalHub, sha256
from tests.support.service import error, until, up

DOWNLOAD, ESTIMATE = "/api/v1/models/download", "/api/v1/models/estimate"
REPOSITORY, FILE = "Acme/Fetched-GGUF", "fetched-F16.gguf"


@pytest.fixture(scope="module")
def authority_and_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, LocalHub]]:
    folder = tmp_path_factory.mktemp("hub")
    authority, tls = local_tls(folder)
    with LocalHub(tls).running() as hub:
        hub.add(REPOSITORY, FILE, synthetic.tiny_llama(folder / FILE))
        yield authority, hub


def test_a_hub_of_an_own_authority(authority_and_hub: tuple[Path, LocalHub], tmp_path: Path) -> None:
    authority, hub = authority_and_hub
    with up(tmp_path, HF_ENDPOINT=hub.endpoint, LOADSTONE_HUB_HOSTS=hub.cdn, SSL_CERT_FILE=str(authority)) as service:
        estimate = service.post(ESTIMATE, {"model": REPOSITORY})
        assert estimate.status == 200, estimate.text
        job_id = service.post(DOWNLOAD, {"model": REPOSITORY}).json()["job_id"]
        status = f"{DOWNLOAD}/status/{job_id}"
        until(lambda: service.send("GET", status).json()["status"] == "completed", "the download is completed")
        assert sha256(service.models_dir / REPOSITORY / FILE) == sha256(hub.repositories[REPOSITORY][FILE])


def test_a_hub_of_an_unknown_authority(authority_and_hub: tuple[Path, LocalHub], tmp_path: Path) -> None:
    _, hub = authority_and_hub
    asked = len(hub.requests)
    with up(tmp_path, HF_ENDPOINT=hub.endpoint, LOADSTONE_HUB_HOSTS=hub.cdn) as service:
        refused = error(service.post(DOWNLOAD, {"model": REPOSITORY}), 502, "download_failed", "hub_unavailable")
        assert "The certificate of 'localhost' cannot be verified" in refused["message"]
        missing = error(service.post(ESTIMATE, {"model": REPOSITORY}), 404, "model_not_found", param="model")
        assert "The certificate of 'localhost' cannot be verified" in missing["detail"]["hub"]
    assert len(hub.requests) == asked
