"""data/download.py against a hub on 127.0.0.1: what it downloads, checks, resumes and refuses."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import data_scripts
import pytest
from conftest import ROOT, shard_bytes
from data_scripts import download, files_of

REPO = "willdepueoai/parameter-golf"
FOLDER = "datasets/fineweb10B_sp1024"
TRAIN_0 = f"{FOLDER}/fineweb_train_000000.bin"
MODEL = "tokenizers/fineweb_1024_bpe.model"


# ---- A hub: the protocol as huggingface_hub speaks it ----


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, headers, body=b"", length=None):
        self.send_response(status)
        for name, value in {"Content-Length": length or len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        hub.requests.append((self.command, path))
        api, files = f"/api/datasets/{hub.repo}", f"/datasets/{hub.repo}/resolve/{hub.commit}/"
        authorized = self.headers.get("Authorization") == f"Bearer {hub.token}" or not hub.token
        if hub.status:
            self.answer(hub.status, {})
        elif not path.startswith((api, files)) or not authorized:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith(files):
            self.serve_file(path.removeprefix(files))
        else:
            found = {"id": hub.repo, "sha": hub.commit}
            if "/tree/" in path:
                found = [hub.describe(name) for name in hub.files]
            if "/paths-info/" in path:
                found = [
                    hub.describe(name) for name in parse_qs(body)["paths"] if name in hub.files
                ]
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    do_HEAD = do_GET = do_POST = serve  # noqa: N815

    def serve_file(self, name):
        hub = self.server.hub
        data, entry = hub.files[name], hub.describe(name)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{etag}"'}
        if self.command == "GET" and hub.faults.get(name):
            return hub.faults[name].pop(0)(self, data, headers)
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206 if start else 200, headers, data[start:])


def break_off(handler, data, headers):
    """Sends half of a file, then closes the connection."""
    handler.answer(200, headers, data[: len(data) // 2], length=len(data))
    handler.close_connection = True


def stall(handler, data, headers):
    """Sends half of a file, then nothing."""
    break_off(handler, data, headers)
    handler.wfile.flush()
    handler.server.hub.stalled.set()
    handler.server.hub.closed.wait(30)


def flip_a_bit(handler, data, headers):
    handler.answer(200, headers, data[:-1] + bytes([data[-1] ^ 1]))


class Hub:
    """A server with one dataset repository, whose manifest is in the folder `prefix`."""

    def __init__(self):
        self.repo, self.prefix, self.token, self.status = REPO, "datasets/", "", 0
        self.files, self.faults, self.requests = {}, {}, []
        self.stalled, self.closed = threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.publish()

    def close(self):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def commit(self):
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def describe(self, path):
        """What the hub's API says of a file; shards are large files, which have a sha256."""
        data = self.files[path]
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": oid}
        if path.endswith(".bin"):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 1}
        return entry

    def put(self, path, data):
        self.files[self.prefix + path] = data

    def publish(self, size=1024):
        """Publishes sp<size>: three training and two validation shards of 600 tokens."""
        tokenizer = {"name": f"sp_bpe_{size}", "model_path": MODEL.replace("1024", str(size))}
        tokenizer["vocab_path"] = tokenizer["model_path"].replace(".model", ".vocab")
        stats = {"files_train": 3, "files_val": 2, "tokens_train": 1800, "tokens_val": 1200}
        dataset = {"name": f"fineweb10B_sp{size}", "tokenizer_name": tokenizer["name"]}
        dataset |= {"vocab_size": size, "stats": stats}
        manifest = {"tokenizers": [tokenizer], "datasets": [dataset]}
        self.put("manifest.json", json.dumps(manifest).encode())
        self.put(tokenizer["model_path"], b"\0model" * 50)
        self.put(tokenizer["vocab_path"], b"<pad>\t0\n")
        for number, name in enumerate(
            ("train_000000", "train_000001", "train_000002", "val_000000", "val_000001")
        ):
            ids = [(7 * t + number) % size for t in range(600)]
            self.put(f"datasets/{dataset['name']}/fineweb_{name}.bin", shard_bytes(ids))

    def edit_manifest(self, change):
        """Lets `change` edit the dataset and the tokenizer of the manifest."""
        manifest = json.loads(self.files[self.prefix + "manifest.json"])
        change(manifest["datasets"][0], manifest["tokenizers"][0])
        self.put("manifest.json", json.dumps(manifest).encode())

    def sent_shards(self):
        """The names of the shards that were sent, in order."""
        return [p.split("/")[-1] for c, p in self.requests if c == "GET" and p.endswith(".bin")]


@pytest.fixture
def hub(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MATCHED_FINEWEB", "HF_")):
            monkeypatch.delenv(name)
    hub = Hub()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server.server_port}")
    yield hub
    hub.close()


def command(out, *args, shards=3):
    return ["--train-shards", str(shards), "--out", str(out), *args]


def run(out, *args, shards=3):
    return download.main(command(out, *args, shards=shards))


def error_of(capsys, out, *args, shards=3):
    return data_scripts.error_of(download.main, capsys, *command(out, *args, shards=shards))


def assert_complete(hub, out, shards=3):
    """The files below `out` are the published ones, and there are no others."""
    found = files_of(out)
    names = {path.removeprefix(hub.prefix) for path in hub.files} - {"manifest.json"}
    names -= {f"{FOLDER}/fineweb_train_{i:06d}.bin" for i in range(shards, 3)}
    assert found.keys() - {"manifest.json"} == names
    assert all(found[name] == hub.files[hub.prefix + name] for name in names)


# ---- What it downloads ----


def test_another_repository(hub, tmp_path, monkeypatch, capsys):
    """A private repository with its manifest at the top, and local entries that must stay."""
    hub.repo, hub.prefix, hub.token, hub.files = "some-one/data.set", "", "hf_secret", {}
    hub.publish()
    other = {"name": "mine_sp300", "tokenizer_name": "mine", "stats": {"files_train": 1}}
    old = {"name": "fineweb10B_sp1024", "stats": {}}
    local = {"note": 1, "tokenizers": [{"name": "mine"}], "datasets": [old, other]}
    (tmp_path / "manifest.json").write_text(json.dumps(local))
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", hub.repo)
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert run(tmp_path) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    folder = tmp_path / FOLDER
    assert captured.out.splitlines() == [
        str(folder),
        "  train 1,800 tokens, 3 of 3 files",
        "  val   1,200 tokens, 2 of 2 files",
        f"  next: DATA_PATH={folder} VOCAB_SIZE=1024 TOKENIZER_PATH={tmp_path / MODEL}"
        " python train_gpt.py",
    ]
    assert_complete(hub, tmp_path)
    published = json.loads(hub.files["manifest.json"])
    assert json.loads((tmp_path / "manifest.json").read_bytes()) == {
        "note": 1,
        "tokenizers": [{"name": "mine"}, published["tokenizers"][0]],
        "datasets": [other, published["datasets"][0]],
    }


def test_more_shards_later_and_a_second_call_does_nothing(hub, tmp_path, capsys):
    for shards in (1, 3):
        hub.requests.clear()
        assert run(tmp_path, shards=shards) == 0
        assert_complete(hub, tmp_path, shards)
        assert f"{shards} of 3 files" in capsys.readouterr().out
    assert sorted(hub.sent_shards()) == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")}
    hub.requests.clear()
    assert run(tmp_path, "3", shards=0) == 0  # as the challenge's script takes the number
    assert not hub.sent_shards()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")} == times
    assert capsys.readouterr().err == ""


def test_bytes_from_a_repository_that_has_them(hub, tmp_path, capsys):
    def change(dataset, tokenizer):
        dataset["name"] = "fineweb10B_byte260"
        tokenizer |= {"model_path": None, "vocab_path": None, "path": "tokenizers/bytes.json"}

    error = error_of(capsys, tmp_path, "--variant", "byte260")
    assert "has no byte260, but sp1024; download sp1024 and run data/to_bytes.py" in error
    hub.edit_manifest(change)
    hub.put("tokenizers/bytes.json", b"{}")
    for path in [path for path in hub.files if FOLDER in path]:
        hub.files[path.replace("sp1024", "byte260")] = hub.files.pop(path)
    assert run(tmp_path, "--variant", "byte260") == 0
    assert len(list((tmp_path / "datasets/fineweb10B_byte260").iterdir())) == 5
    assert [path.name for path in (tmp_path / "tokenizers").iterdir()] == ["bytes.json"]
    assert "TOKENIZER_PATH" not in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["sp4096", "sp8192"])
@pytest.mark.parametrize("named", ["", REPO])
def test_a_variant_that_the_challenge_lacks_is_a_participants(
    hub, tmp_path, capsys, monkeypatch, variant, named
):
    """They have their own repository by default, said to be theirs; a repository named wins."""
    theirs = "kevclark/parameter-golf"
    hub.repo, hub.files = named or theirs, {}
    hub.publish(int(variant[2:]))
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", named)
    assert run(tmp_path, "--variant", variant) == 0
    assert len(list((tmp_path / f"datasets/fineweb10B_{variant}").iterdir())) == 5
    printed = capsys.readouterr().out
    note = f"note: the challenge has no {variant}; these are shards of a participant, {theirs}, "
    assert printed.startswith(note) == (not named)
    assert f"TOKENIZER_PATH={tmp_path}/tokenizers/fineweb_{variant[2:]}_bpe.model" in printed


# ---- What is on disk already, what fails and then succeeds ----


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (TRAIN_0, lambda data: data[:-2], "2,222 bytes instead of 2,224"),
        (TRAIN_0, lambda data: data[:-1] + bytes([data[-1] ^ 1]), "its hash is not"),
        (MODEL, lambda data: data[:-1] + b"x", "its hash is not"),
    ],
)
def test_a_damaged_local_file_is_downloaded_again(hub, tmp_path, capsys, name, damage, reason):
    assert run(tmp_path) == 0
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    hub.requests.clear()
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert_complete(hub, tmp_path)
    assert len(hub.sent_shards()) == name.endswith(".bin")
    note = capsys.readouterr().err
    assert note.startswith(f"{path}: {reason}") and note.endswith("; downloading it again\n")


def test_a_connection_that_breaks_once(hub, tmp_path):
    hub.faults[f"datasets/{TRAIN_0}"] = [break_off]
    assert run(tmp_path) == 0
    assert_complete(hub, tmp_path)


def test_a_file_with_a_wrong_hash_is_refused_and_downloaded_by_the_next_call(hub, tmp_path, capsys):
    hub.faults[f"datasets/{TRAIN_0}"] = [flip_a_bit]
    error = error_of(capsys, tmp_path)
    assert f"datasets/{TRAIN_0}: its hash is not the repository's; run again" in error
    assert not (tmp_path / TRAIN_0).exists()
    assert not (tmp_path / "manifest.json").exists()
    hub.requests.clear()
    assert run(tmp_path) == 0
    assert_complete(hub, tmp_path)
    assert hub.sent_shards() == ["fineweb_train_000000.bin"]


@pytest.mark.parametrize(
    ("sent", "has_stderr"),
    [
        pytest.param(signal.SIGKILL, True, marks=pytest.mark.slow),
        (signal.SIGTERM, True),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_download_is_resumed(hub, tmp_path, sent, has_stderr):
    """The signal comes in the middle of one file when the others are complete."""
    hub.faults[f"datasets/{TRAIN_0}"] = [stall]
    script = [sys.executable, ROOT / "data" / "download.py", *command(tmp_path)]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    if not has_stderr:
        process.stderr.close()
    deadline = time.monotonic() + 60
    while not (hub.stalled.is_set() and len(list(tmp_path.rglob("*.bin"))) == 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    error = process.communicate(timeout=20)[1]
    if sent == signal.SIGTERM:
        line = "error: interrupted; run again to resume\n" if has_stderr else ""
        assert (process.returncode, error) == (130, line)
    assert not (tmp_path / FOLDER).exists()
    hub.requests.clear()
    assert run(tmp_path) == 0
    assert_complete(hub, tmp_path)
    assert hub.sent_shards() == ["fineweb_train_000000.bin"]


# ---- Network and repository ----


def test_no_network(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    error = error_of(capsys, tmp_path)
    assert error.startswith(f"error: {REPO}: ")
    assert "check the network and HF_ENDPOINT, " in error
    assert "HF_HOME" in error and "then run again to resume" in error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "hub.local"),
        ("HF_ENDPOINT", "http://a:b:c"),
        ("HF_ENDPOINT", ""),
        ("ALL_PROXY", "socks4://127.0.0.1:9"),
        ("HTTPS_PROXY", "::nonsense"),
        ("http_proxy", "http://127.0.0.1:99999"),
        ("SSL_CERT_FILE", "/none"),
        ("SSL_CERT_FILE", "/dev/null"),
        ("SSL_CERT_FILE", "/"),
        ("SSL_CERT_DIR", "/none:/dev/null"),
        ("HF_TOKEN", "one\ntwo"),
        ("HF_TOKEN", "tök"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "abc"),
        ("HF_HUB_ETAG_TIMEOUT", "-3"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", ""),
    ],
)
def test_a_network_setting_that_cannot_be_used_is_named(
    hub, tmp_path, capsys, monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    error = error_of(capsys, tmp_path)
    assert error.startswith(f"error: {name}: its value cannot be used; set it to ")
    assert not value or value not in error  # it may be a secret
    assert not hub.requests


# What the HTTP client of huggingface_hub does not read.
@pytest.mark.parametrize(
    "variables",
    [
        {"REQUESTS_CA_BUNDLE": "/none", "CURL_CA_BUNDLE": "/none"},
        {"ALL_PROXY": "socks4://127.0.0.1:9", "NO_PROXY": "localhost, *"},
        {"HTTP_PROXY": "::nonsense", "http_proxy": "http://127.0.0.1:9"},
        {"SSL_CERT_DIR": "/none:/"},
        {"SOME_PROXY": "::nonsense"},
        {"HTTPS_PROXY": "", "SSL_CERT_FILE": "", "SSL_CERT_DIR": "", "HF_TOKEN": " "},
    ],
)
def test_a_network_setting_without_effect_is_accepted(hub, tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(tmp_path) == 0
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("data", ["hf_é".encode(), b"hf_\xff"])
def test_a_token_file_that_cannot_be_used(hub, tmp_path, capsys, monkeypatch, data):
    (tmp_path / "token").write_bytes(data)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "; check the token in HF_TOKEN, or in the file of" in error_of(capsys, tmp_path)


def test_certificates_that_the_client_does_not_know(hub, tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise ssl.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", fail)
    assert "; set SSL_CERT_FILE to your network's certificates" in error_of(capsys, tmp_path)


@pytest.mark.parametrize(
    ("status", "repo", "parts"),
    [
        (401, REPO, ["HTTP status 401", "check MATCHED_FINEWEB_REPO_ID", "HF_TOKEN"]),
        (501, REPO, ["HTTP status 501", "run again"]),
        (0, "no/such", ["HTTP status 404", "check MATCHED_FINEWEB_REPO_ID"]),
        (0, "a/b/c", ["check MATCHED_FINEWEB_REPO_ID"]),
    ],
)
def test_a_hub_that_refuses(hub, tmp_path, capsys, monkeypatch, status, repo, parts):
    hub.status = status
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", repo)
    error = error_of(capsys, tmp_path)
    assert all(part in error for part in [repo, *parts]), error


@pytest.mark.parametrize("path", ["manifest.json", TRAIN_0, MODEL])
def test_a_missing_file(hub, tmp_path, capsys, path):
    del hub.files[f"datasets/{path}"]
    error = error_of(capsys, tmp_path)
    assert error.startswith(f"error: {REPO}: datasets/{path}: no such file; check MATCHED")
    assert not hub.sent_shards()


def test_a_published_file_that_is_not_a_shard(hub, tmp_path, capsys):
    hub.put(TRAIN_0, b"\0" + hub.files[f"datasets/{TRAIN_0}"][1:])
    error = error_of(capsys, tmp_path)
    assert f"datasets/{TRAIN_0}: published, but not a token shard; set MATCHED" in error
    assert not (tmp_path / TRAIN_0).exists()


def test_token_counts_must_be_those_of_the_manifest(hub, tmp_path, capsys):
    hub.edit_manifest(lambda dataset, tokenizer: dataset["stats"].update(tokens_train=9))
    assert run(tmp_path, shards=2) == 0  # not all shards, so there is no sum to compare
    assert "1800 train tokens, but 9 in the manifest; set MATCHED" in error_of(capsys, tmp_path)


def test_files_that_cannot_be_used_and_shards_of_others(hub, tmp_path, capsys):
    """What the operating system says of --out, and a copy of a shard in the folder."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "loop"):
        error = error_of(capsys, tmp_path / name)
        assert str(tmp_path / name) in error and "; " in error
    for name in (TRAIN_0, MODEL):
        path = tmp_path / "used" / name
        path.mkdir(parents=True)
        assert f"--out: {path}: is a folder" in error_of(capsys, tmp_path / "used")
        path.rmdir()
    (tmp_path / "used" / "tokenizers").rmdir()
    (tmp_path / "used" / "tokenizers").touch()
    assert "tokenizers: Not a directory; choose" in error_of(capsys, tmp_path / "used")
    (tmp_path / "eio" / TRAIN_0).parent.mkdir(parents=True)
    (tmp_path / "eio" / "manifest.json").symlink_to("/proc/self/mem")  # cannot be read
    assert "manifest.json: Input/output error; check its" in error_of(capsys, tmp_path / "eio")
    assert not hub.sent_shards()
    folder = tmp_path / "out" / FOLDER
    copy = folder / "fineweb_val_000000 (1).bin"
    assert run(tmp_path / "out") == 0
    copy.write_bytes((folder / "fineweb_val_000000.bin").read_bytes())
    assert f"{copy}: not a published file; move it away" in error_of(capsys, tmp_path / "out")


def test_a_folder_of_the_repository_is_no_pattern(hub, tmp_path, monkeypatch):
    hub.prefix, hub.files = "data[1]/", {}
    hub.publish()
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "data[1]")
    assert run(tmp_path) == 0
    assert_complete(hub, tmp_path)


# ---- Manifest ----


def test_options_that_the_manifest_does_not_have(hub, tmp_path, capsys):
    error = error_of(capsys, tmp_path, shards=4)
    assert error.startswith("error: --train-shards: 4: fineweb10B_sp1024 has 3 training shards")
    error = error_of(capsys, tmp_path, "--variant", "sp77")
    assert error.startswith(f"error: --variant: {REPO} has no sp77, but sp1024; set MATCHED")
    assert not hub.sent_shards()


UNSAFE = "../evil /evil tokenizers/../../evil tokenizers/.. tokenizers\\..\\evil download.py x/*"


@pytest.mark.parametrize("path", [*UNSAFE.split(), "tokenizers/a\n.model"])
def test_no_path_of_the_manifest_leads_out_of_the_folder(hub, tmp_path, capsys, path):
    hub.edit_manifest(lambda dataset, tokenizer: tokenizer.update(model_path=path))
    hub.put(path, b"evil")
    assert "unsafe path" in error_of(capsys, tmp_path / "deep" / "out")
    assert b"evil" not in files_of(tmp_path).values()
    assert not hub.sent_shards()


def test_no_name_of_the_manifest_leads_out_of_the_folder(hub, tmp_path, capsys):
    name = "fineweb10B_../../../evil"
    hub.edit_manifest(lambda dataset, tokenizer: dataset.update(name=name))
    assert "unsafe path" in error_of(capsys, tmp_path / "out", "--variant", "../../../evil")


@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff", b'{"datasets": [{}]}', b"[" * 200_000])
def test_a_damaged_manifest(hub, tmp_path, capsys, data):
    hub.put("manifest.json", data)
    error = error_of(capsys, tmp_path)
    assert error.startswith(f"error: {REPO}: datasets/manifest.json: damaged; set MATCHED")


@pytest.mark.parametrize(
    "change",
    [
        lambda dataset, tokenizer: dataset.pop("stats"),
        lambda dataset, tokenizer: dataset["stats"].update(files_val=0),
        lambda dataset, tokenizer: dataset["stats"].update(files_val=10**9),
        lambda dataset, tokenizer: dataset["stats"].update(files_train="3"),
        lambda dataset, tokenizer: dataset["stats"].update(files_train=2.5),
        lambda dataset, tokenizer: dataset.update(tokenizer_name=[]),
        lambda dataset, tokenizer: tokenizer.update(model_path=5),
    ],
)
def test_a_damaged_manifest_entry(hub, tmp_path, capsys, change):
    hub.edit_manifest(change)
    error = error_of(capsys, tmp_path)
    assert error.startswith(f"error: {REPO}: the manifest's entry of fineweb10B_sp1024 is damaged")
    assert not hub.sent_shards()


def test_a_local_manifest_that_cannot_be_merged(hub, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{")
    assert f"{tmp_path / 'manifest.json'}: not a manifest" in error_of(capsys, tmp_path)
    assert not hub.requests


# ---- The machine and the command line ----


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_full_disk(hub, tmp_path, capsys, monkeypatch):
    needed = sum(len(data) for path, data in hub.files.items() if "manifest" not in path)
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    error = error_of(capsys, tmp_path)
    assert "0.00 GB to download, 0.00 GB free; make room, or lower --train-shards" in error
    assert not hub.sent_shards()
    free.free = needed
    assert run(tmp_path) == 0
    free.free = 0  # nothing is missing
    assert run(tmp_path) == 0


def test_one_download_at_a_time(hub, tmp_path, capsys):
    lock = tmp_path / "datasets" / ".download" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another download is running here; wait for it" in error_of(capsys, tmp_path)
    assert run(tmp_path) == 0


def test_command_line(capsys):
    error = data_scripts.error_of(download.main, capsys, "--train-shards", "-1")
    assert error.startswith("error: --train-shards: -1 is not in 0 to 1000000")
    args = download.parse_arguments([])
    assert (args.variant, args.train_shards, args.out) == ("sp1024", 80, ROOT / "data")
    with pytest.raises(SystemExit) as stop:
        download.main(["--help"])
    assert stop.value.code == 0
    assert "Example:\n    python data/download.py " in capsys.readouterr().out
