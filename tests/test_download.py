"""data/download.py against a hub of its own: what it fetches, checks, resumes and refuses."""

import errno
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "download.py"
REPO = "willdepueoai/parameter-golf"
COMMIT = "c0ffee" * 6 + "c0de"
FOLDER = "datasets/fineweb10B_sp1024"
TRAIN_0 = f"{FOLDER}/fineweb_train_000000.bin"
MODEL = "tokenizers/fineweb_1024_bpe.model"


def load_script():
    spec = importlib.util.spec_from_file_location("download", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


download = load_script()


# ---- A hub: the protocol as the library asks it, large files behind a redirect elsewhere ----


def shard(tokens, seed=0):
    ids = [(7 * i + seed) % 1024 for i in range(tokens)]
    return struct.pack(f"<256i{tokens}H", 20240520, 1, tokens, *[0] * 253, *ids)


class Handler(BaseHTTPRequestHandler):
    """One request: a front that redirects to a store, as the hub does, is two servers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written apart

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.serve()

    def do_GET(self):
        self.serve()

    def answer(self, status, headers, body=b"", length=None):
        self.send_response(status)
        for name, value in {"Content-Length": length or len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def serve(self):
        hub, at_store = self.server.hub, self.server is self.server.hub.store
        if self.path.startswith("/api/"):  # the library's own curiosity
            return self.answer(404, {})
        head, _, path = self.path.partition(f"/{COMMIT}/")
        if not path:
            head, _, path = self.path.partition("/main/")
        moves = hub.hashes and path.endswith(".bin") and not at_store
        asked = {"method": self.command, "path": path, "store": at_store, "headers": self.headers}
        hub.log.append(SimpleNamespace(**asked, moved=moves))
        if head not in (f"/datasets/{hub.repo}/resolve", "/store"):
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if hub.token and not at_store and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if path not in hub.files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        data = hub.files[path]
        if not (moves and self.command == "GET") and hub.faults.get((self.command, path)):
            fault = hub.faults[self.command, path].pop(0)
        else:
            fault = functools.partial(Handler.whole, moves=moves)
        return fault(self, path, data)

    def whole(self, path, data, moves=False, ranges=True):
        hub = self.server.hub
        sha256 = hub.sha256.get(path) or hashlib.sha256(data).hexdigest()
        known = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        known["X-HF-Warning"] = "noise; users need not see this"
        if moves:
            where = {"Location": f"{url_of(hub.store)}/store/main/{path}"}
            large = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": len(data)}
            return self.answer(302, {**known, **where, **large})
        start = 0
        if ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return self.answer(416, {})
            known["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206 if start else 200, known, data[start:])


def status(code, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, path, data: handler.answer(code, names)


def cut(handler, path, data):
    """Half of what is asked for, then the connection breaks."""
    start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
    half = data[start : (start + len(data)) // 2]
    handler.answer(206 if start else 200, {}, half, length=len(data) - start)
    handler.close_connection = True


def stall(handler, path, data):
    """Half of the body, then silence."""
    cut(handler, path, data)
    handler.wfile.flush()
    handler.server.hub.over.wait(30)


def short(handler, path, data):
    """Half of the body, said to be all."""
    handler.answer(200, {}, data[: len(data) // 2])


def unmeasured(handler, path, data):
    """No word about the size."""
    handler.send_response(200)
    handler.end_headers()


def spoilt(handler, path, data):
    handler.whole(path, data[:-1] + bytes([data[-1] ^ 1]))


def no_ranges(handler, path, data):
    handler.whole(path, data, ranges=False)


def url_of(server):
    # The store is of another name: the library reads a redirect to the same one as a move.
    name = "localhost" if server is server.hub.store else "127.0.0.1"
    return f"http://{name}:{server.server_port}"


class Hub:
    def __init__(self):
        self.repo, self.prefix, self.token, self.hashes = REPO, "datasets", "", True
        self.files, self.sha256, self.faults, self.log = {}, {}, {}, []
        self.over = threading.Event()
        self.front, self.store = (ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in "ab")
        for server in (self.front, self.store):
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.over.set()
        for server in (self.front, self.store):
            server.shutdown()
            server.server_close()

    def remote(self, path):
        return f"{self.prefix}/{path}".lstrip("/")

    def put(self, path, data):
        self.files[self.remote(path)] = data

    def fail(self, path, *faults, method="GET"):
        self.faults[method, self.remote(path)] = list(faults)

    def publish(self, variant="sp1024", train=3, val=2, tokens=600):
        name = f"fineweb10B_{variant}"
        size = int(variant[2:])
        manifest = json.loads(self.files.get(self.remote("manifest.json"), "{}"))
        model = f"tokenizers/fineweb_{size}_bpe"
        for key, entry in {
            "tokenizers": {
                "name": f"sp_bpe_{size}",
                "kind": "sentencepiece_bpe",
                "vocab_size": size,
                "model_path": f"{model}.model",
                "vocab_path": f"{model}.vocab",
            },
            "datasets": {
                "name": name,
                "tokenizer_name": f"sp_bpe_{size}",
                "path": f"datasets/{name}",
                "vocab_size": size,
                "stats": {
                    "files_train": train,
                    "files_val": val,
                    "tokens_train": train * tokens,
                    "tokens_val": val * tokens,
                },
            },
        }.items():
            manifest.setdefault(key, []).append(entry)
        self.put("manifest.json", json.dumps(manifest).encode())
        self.put(f"{model}.model", b"\0model" * 50)
        self.put(f"{model}.vocab", b"<pad>\t0\n")
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                path = f"datasets/{name}/fineweb_{split}_{i:06d}.bin"
                self.put(path, shard(tokens, len(self.files)))

    def edit(self, change):
        """Let `change` spoil the manifest of the one dataset."""
        manifest = json.loads(self.files[self.remote("manifest.json")])
        change(manifest, manifest["datasets"][0], manifest["tokenizers"][0])
        self.put("manifest.json", json.dumps(manifest).encode())

    def gets(self, suffix=""):
        """The requests for bytes of files of this name's end."""
        bodies = [r for r in self.log if r.method == "GET" and not r.moved]
        return [request for request in bodies if request.path.endswith(suffix)]


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    hub.publish()
    for name in list(os.environ):
        if name.startswith(("MATCHED_FINEWEB", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", False)
    where = url_of(hub.front)  # what HF_ENDPOINT is turned into when the library is imported
    template = where + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(download.constants, "ENDPOINT", where)
    monkeypatch.setattr(download.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub.waits = []
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=hub.waits.append))
    yield hub
    hub.close()


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(out, *args, shards=3):
    return download.main(["--train-shards", str(shards), "--out", str(out), *map(str, args)])


def assert_whole(hub, out, shards=3):
    """What is below `out` is what is published, and nothing else."""
    found, start = files_of(out), hub.remote("")
    del found["manifest.json"]
    wanted = {p.removeprefix(start): d for p, d in hub.files.items() if FOLDER in p or "1024" in p}
    late = [f"{FOLDER}/fineweb_train_{i:06d}.bin" for i in range(shards, 3)]
    assert found == {path: data for path, data in wanted.items() if path not in late}


def refused(capsys, out, *args, shards=3):
    """The one line of error of a run that must fail."""
    capsys.readouterr()
    assert run(out, *args, shards=shards) == 2
    told = capsys.readouterr()
    *notes, line = told.err.splitlines()
    assert told.out == "" and line.startswith("error: ")
    assert all("; waiting " in note for note in notes)
    return line


def child(hub, out, **env):
    """The script as users run it."""
    return subprocess.Popen(
        [sys.executable, SCRIPT, "3", "--out", out],
        env={**os.environ, "HF_ENDPOINT": url_of(hub.front), "HF_HOME": f"{out}_home", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---- What it fetches ----


def test_the_script_from_another_repository_and_folder(hub, tmp_path):
    hub.repo, hub.prefix, hub.token, hub.files = "some-one/data.set", "deep/root", "hf_secret", {}
    hub.publish()
    hub.publish("sp4096")
    other = {"name": "mine_sp300", "tokenizer_name": "mine", "stats": {"files_train": 1}}
    stale = {"name": "fineweb10B_sp1024", "stats": {}}
    here = {"note": 1, "tokenizers": [{"name": "mine"}], "datasets": [stale, other]}
    (tmp_path / "manifest.json").write_text(json.dumps(here))
    process = child(
        hub,
        tmp_path,
        MATCHED_FINEWEB_REPO_ID=hub.repo,
        MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="deep/root",
        HF_TOKEN=hub.token,
    )
    told, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    folder = tmp_path / FOLDER
    assert told.splitlines() == [
        str(folder),
        "  train 1,800 tokens, 3 of 3 files",
        "  val   1,200 tokens, 2 of 2 files",
        f"  next: DATA_PATH={folder} VOCAB_SIZE=1024 TOKENIZER_PATH={tmp_path / MODEL}"
        " python train_gpt.py",
    ]
    assert_whole(hub, tmp_path)
    merged = json.loads((tmp_path / "manifest.json").read_bytes())
    published = json.loads(hub.files["deep/root/manifest.json"])
    assert merged == {
        "note": 1,
        "tokenizers": [{"name": "mine"}, published["tokenizers"][0]],
        "datasets": [other, published["datasets"][0]],
    }
    sent = [("Authorization" in request.headers, request.store) for request in hub.log]
    assert set(sent) == {(True, False), (False, True)}  # never to the store


def test_a_second_run_fetches_no_shard_again(hub, tmp_path, capsys):
    assert run(tmp_path) == 0
    first = files_of(tmp_path)
    assert len(hub.gets(".bin")) == 5
    hub.log.clear()
    assert run(tmp_path) == 0
    assert [request.path for request in hub.gets()] == ["datasets/manifest.json"]
    assert files_of(tmp_path) == first
    assert capsys.readouterr().err == ""


def test_more_shards_later(hub, tmp_path, capsys):
    assert run(tmp_path, shards=0) == 0
    assert_whole(hub, tmp_path, shards=0)
    assert run(tmp_path, shards=1) == 0
    assert_whole(hub, tmp_path, shards=1)
    assert "train 600 tokens, 1 of 3 files" in capsys.readouterr().out
    hub.log.clear()
    assert run(tmp_path, "2", shards=1) == 0  # as the official script takes it
    assert_whole(hub, tmp_path, shards=2)
    assert len(hub.gets(".bin")) == 1


def test_files_come_from_the_commit_of_the_manifest(hub, tmp_path, monkeypatch):
    urls, ask = [], download.hf_hub_url

    def noted(*args, **options):
        urls.append(ask(*args, **options))
        return urls[-1]

    monkeypatch.setattr(download, "hf_hub_url", noted)
    assert run(tmp_path) == 0
    assert ["/main/" in url for url in urls] == [True] + [False] * 7
    assert all(f"/{COMMIT}/" in url for url in urls[1:])


def test_a_manifest_at_the_top_of_the_repository(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "")
    hub.prefix, hub.files = "", {}
    hub.publish()
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)


def test_the_defaults():
    args = download.parse_arguments([])
    assert (args.variant, args.train_shards, args.out) == ("sp1024", 80, SCRIPT.parent)


# ---- What is here already ----


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize("change", ["truncated", "bytes", "magic", "longer"])
def test_a_wrong_local_shard_is_replaced(hub, tmp_path, capsys, change, hashes):
    assert run(tmp_path) == 0
    data = hub.files[f"datasets/{TRAIN_0}"]
    wrong = {
        "truncated": data[:-2],
        "bytes": data[:-1] + b"\xff",
        "magic": b"\0" + data[1:],
        "longer": data + b"\0\0",
    }[change]
    (tmp_path / TRAIN_0).write_bytes(wrong)
    hub.hashes = hashes
    hub.log.clear()
    capsys.readouterr()
    assert run(tmp_path) == 0
    told = capsys.readouterr().err
    if change == "bytes" and not hashes:
        assert (tmp_path / TRAIN_0).read_bytes() == wrong  # nobody can know
        return
    assert told.startswith(f"{tmp_path / TRAIN_0}: ") and told.endswith("; fetching it again\n")
    assert told.count("\n") == 1
    assert (" bytes instead of 2,224;" in told) == (change in ("truncated", "longer"))
    assert_whole(hub, tmp_path)
    assert len(hub.gets(".bin")) == 1


def test_bytes_of_a_killed_run_are_kept_and_others_are_not(hub, tmp_path):
    data = hub.files[f"datasets/{TRAIN_0}"]
    (tmp_path / FOLDER).mkdir(parents=True)
    part = tmp_path / f"{TRAIN_0}.{hashlib.sha256(data).hexdigest()[:8]}.part"
    part.write_bytes(data)  # whole, but without its name
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)
    assert len(hub.gets(".bin")) == 4
    (tmp_path / TRAIN_0).unlink()
    part.write_bytes(b"x" * 1000)  # cannot be told from a beginning before the end is there
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)
    assert [r.headers.get("Range") for r in hub.gets(TRAIN_0)] == ["bytes=1000-", None]


# ---- What goes wrong and passes ----


@pytest.mark.parametrize("fault", [cut, short])
def test_a_broken_transfer_goes_on_where_it_broke(hub, tmp_path, capsys, fault):
    half = len(hub.files[f"datasets/{TRAIN_0}"]) // 2
    hub.fail(TRAIN_0, fault)
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)
    ranges = [request.headers.get("Range") for request in hub.gets(TRAIN_0)]
    assert ranges == [None, f"bytes={half}-"]
    told = capsys.readouterr().err
    assert told.startswith(f"{TRAIN_0}: ") and told.endswith(" s for attempt 2 of 7\n")


def test_a_link_that_breaks_often_but_moves_on_is_enough(hub, tmp_path):
    """More breaks than attempts, each after some more bytes."""
    for _ in range(download.ATTEMPTS + 2):
        hub.fail(TRAIN_0, cut)
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)


def test_a_very_long_wait_is_left_to_the_user(hub, tmp_path, capsys):
    hub.fail(TRAIN_0, status(429, **{"Retry-After": "86400"}), method="GET")
    assert "the hub asks to wait 86400 s; run again after that" in refused(capsys, tmp_path)
    assert not hub.waits


@pytest.mark.parametrize("endpoint", ["hub.local", "ftp://hub.local", "http://"])
def test_an_endpoint_that_is_none(hub, tmp_path, capsys, monkeypatch, endpoint):
    monkeypatch.setattr(download.constants, "ENDPOINT", endpoint)
    assert f"HF_ENDPOINT={endpoint}: must be http" in refused(capsys, tmp_path)


def test_the_bar_ends_at_its_total(hub, tmp_path, monkeypatch):
    bars = []

    def progress(what, total, done=0):
        bars.append(download.tqdm(desc=what, total=total, initial=done, file=io.StringIO()))
        return bars[-1]

    data = hub.files[f"datasets/{TRAIN_0}"]
    (tmp_path / FOLDER).mkdir(parents=True)
    name = f"{TRAIN_0}.{hashlib.sha256(data).hexdigest()[:8]}.part"
    (tmp_path / name).write_bytes(data[:1000])
    monkeypatch.setattr(download, "progress", progress)
    hub.fail(TRAIN_0, cut, no_ranges)
    hub.fail(f"{FOLDER}/fineweb_train_000001.bin", spoilt)
    hub.fail(f"{FOLDER}/fineweb_train_000002.bin", cut)
    assert run(tmp_path) == 0
    sizes = [len(data) for path, data in hub.files.items() if "manifest" not in path]
    assert [(bar.total, bar.n) for bar in bars] == [(sum(sizes), sum(sizes))] * 2


def test_a_server_that_cannot_resume_starts_over(hub, tmp_path):
    hub.fail(TRAIN_0, cut, no_ranges)
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)
    assert len(hub.gets(TRAIN_0)) == 2


def test_bytes_without_a_hash_are_not_resumed(hub, tmp_path):
    hub.hashes = False
    hub.fail(TRAIN_0, cut)
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)
    assert [r.headers.get("Range") for r in hub.gets(TRAIN_0)] == [None, None]


def test_a_silent_server_is_given_up_in_time(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.fail(TRAIN_0, stall)
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)
    assert [bool(r.headers.get("Range")) for r in hub.gets(TRAIN_0)] == [False, True]
    assert "timed out" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"Retry_After": "123"}, 123, 123),
        ({"RateLimit": '"resolvers";r=0;t=45'}, 45, 45),
        ({"RateLimit": '"resolvers";r=9;t=45'}, 1, 3),
        ({"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1, 3),
    ],
)
def test_too_many_requests(hub, tmp_path, capsys, method, headers, low, high):
    path = "manifest.json" if method == "HEAD" else TRAIN_0
    hub.fail(path, status(429, **headers), method=method)
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)
    [wait] = hub.waits
    assert low <= wait <= high
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{path}: the hub answers 429; waiting {wait:.0f} s for attempt 2 of 7" in told


def test_server_errors_pass_and_the_waits_double(hub, tmp_path):
    hub.fail(MODEL, status(500), status(502), status(503))
    hub.fail(TRAIN_0, status(504), method="HEAD")
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)
    for wait, middle in zip(hub.waits, [2, 2, 4, 8], strict=True):
        assert middle / 2 <= wait <= middle * 1.5
    assert len(set(hub.waits)) == 4  # jitter


def test_one_wrong_transfer_is_forgotten(hub, tmp_path, capsys):
    hub.fail(TRAIN_0, spoilt)
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)
    assert "its sha256 is not the repository's; waiting" in capsys.readouterr().err
    assert hub.gets(TRAIN_0)[-1].headers.get("Range") is None


# ---- What goes wrong and stays wrong ----


def test_a_hub_that_stays_down(hub, tmp_path, capsys):
    hub.fail(TRAIN_0, *[status(503)] * 9)
    line = refused(capsys, tmp_path)
    assert line == f"error: {TRAIN_0}: the hub answers 503; run again later"
    assert len(hub.gets(TRAIN_0)) == download.ATTEMPTS == len(hub.waits) + 1
    assert not (tmp_path / TRAIN_0).exists()
    assert not (tmp_path / "manifest.json").exists()


def test_no_network(hub, tmp_path, capsys):
    hub.front.shutdown()
    hub.front.server_close()
    line = refused(capsys, tmp_path)
    assert "the connection to " in line and "check the network and HF_ENDPOINT" in line
    assert len(hub.waits) == download.ATTEMPTS - 1


def test_an_old_library(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "get_session", lambda: SimpleNamespace(stream=False))
    assert "huggingface_hub is older than 1.0; pip install" in refused(capsys, tmp_path)


def test_offline_mode(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(capsys, tmp_path)
    assert not hub.log


@pytest.mark.parametrize("code", [401, 403])
def test_no_entry(hub, tmp_path, capsys, code):
    hub.fail("manifest.json", status(code), method="HEAD")
    line = refused(capsys, tmp_path)
    assert "the repository is missing or private; check MATCHED_FINEWEB_REPO_ID" in line
    assert "HF_TOKEN" in line
    assert len(hub.log) == 1 and not hub.waits


def test_a_missing_repository(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "no/such")
    line = refused(capsys, tmp_path)
    assert line.startswith("error: no/such: datasets/manifest.json: the repository is missing")
    assert len(hub.log) == 1


def test_a_bad_repository_name(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "a/b/c")
    assert refused(capsys, tmp_path).startswith("error: MATCHED_FINEWEB_REPO_ID: Repo id must be")


@pytest.mark.parametrize("path", ["manifest.json", TRAIN_0, MODEL])
def test_a_missing_file(hub, tmp_path, capsys, path):
    del hub.files[f"datasets/{path}"]
    line = refused(capsys, tmp_path)
    assert line.startswith(f"error: {REPO}: datasets/{path}: the repository has no such file; ")
    assert "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX" in line
    assert not hub.waits and not hub.gets(".bin")


def test_a_hub_that_gives_no_size(hub, tmp_path, capsys):
    hub.fail(TRAIN_0, unmeasured, method="HEAD")
    line = refused(capsys, tmp_path)
    assert line.endswith("fineweb_train_000000.bin: the hub gives no size; check HF_ENDPOINT")


def test_a_wrong_hash_never_stands(hub, tmp_path, capsys):
    path = f"datasets/{TRAIN_0}"
    hub.sha256[path] = "0" * 64
    line = refused(capsys, tmp_path)
    assert line == f"error: {TRAIN_0}: its sha256 is not the repository's; run again later"
    assert len(hub.gets(TRAIN_0)) == download.ATTEMPTS
    assert not list(tmp_path.rglob("*train_000000*"))
    assert len(list(tmp_path.rglob("fineweb_val_*.bin"))) == 2  # what was right stays


def test_a_published_file_that_is_no_shard(hub, tmp_path, capsys):
    hub.put(TRAIN_0, b"\0" + hub.files[f"datasets/{TRAIN_0}"][1:])
    line = refused(capsys, tmp_path)
    assert f"{TRAIN_0}: published, but no token shard; set MATCHED_FINEWEB_REPO_ID" in line
    assert len(hub.gets(TRAIN_0)) == 1
    assert not list(tmp_path.rglob("*train_000000*"))


def test_transfers_that_always_break(hub, tmp_path, capsys):
    hub.fail(MODEL, *[cut] * 9)
    line = refused(capsys, tmp_path)
    assert line.startswith(f"error: {MODEL}: the connection to ")
    assert len(hub.gets(MODEL)) == download.ATTEMPTS
    assert not (tmp_path / MODEL).exists()


def test_tokens_that_do_not_add_up(hub, tmp_path, capsys):
    hub.edit(lambda manifest, dataset, tokenizer: dataset["stats"].update(tokens_train=1799))
    assert run(tmp_path, shards=2) == 0  # no sum to compare
    capsys.readouterr()
    assert run(tmp_path) == 2
    told = capsys.readouterr().err
    found = f"{tmp_path / FOLDER}: 1800 train tokens, but 1799 in the manifest"
    assert told == f"error: {found}; {download.OTHER}\n"


# ---- Manifest ----


def test_too_many_shards(hub, tmp_path, capsys):
    line = refused(capsys, tmp_path, shards=4)
    assert line.startswith("error: --train-shards: 4: fineweb10B_sp1024 has 3 training shards")
    assert not list(tmp_path.iterdir())


def test_a_variant_that_is_not_there(hub, tmp_path, capsys):
    hub.publish("sp4096")
    line = refused(capsys, tmp_path, "--variant", "sp77")
    assert line.startswith(f"error: --variant: {REPO} has no sp77, but sp1024, sp4096; set MATCHED")


def test_bytes_are_not_published(hub, tmp_path, capsys):
    line = refused(capsys, tmp_path, "--variant", "byte260")
    assert f"{REPO} has no byte260, but sp1024; fetch sp1024" in line
    assert "data/to_bytes.py, or set MATCHED_FINEWEB_REPO_ID to a repository that has it" in line


def test_bytes_of_a_repository_that_has_them(hub, tmp_path, capsys):
    def change(manifest, dataset, tokenizer):
        dataset["name"] = "fineweb10B_byte260"
        for key in ("model_path", "vocab_path"):
            tokenizer[key] = None
        tokenizer["path"] = "tokenizers/fineweb_pure_byte_260.json"

    hub.edit(change)
    hub.put("tokenizers/fineweb_pure_byte_260.json", b"{}")
    for path in [path for path in hub.files if FOLDER in path]:
        hub.files[path.replace("sp1024", "byte260")] = hub.files.pop(path)
    assert run(tmp_path, "--variant", "byte260") == 0
    assert len(list((tmp_path / "datasets/fineweb10B_byte260").iterdir())) == 5
    assert [path.name for path in (tmp_path / "tokenizers").iterdir()] == [
        "fineweb_pure_byte_260.json"
    ]
    assert "TOKENIZER_PATH" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "path",
    [
        "../evil.model",
        "/tmp/evil.model",
        "tokenizers/../../evil.model",
        "tokenizers/a/../../../evil.model",
        "tokenizers/..",
        "tokenizers\\..\\evil.model",
        "download.py",
        "tokenizers/a\n.model",
        "tokenizers//evil.model",
    ],
)
def test_unsafe_paths(hub, tmp_path, capsys, path):
    hub.edit(lambda manifest, dataset, tokenizer: tokenizer.update(model_path=path))
    hub.put(path, b"evil")
    out = tmp_path / "deep" / "out"
    line = refused(capsys, out)
    assert "the manifest names an unsafe path" in line
    assert not files_of(tmp_path)
    assert len(hub.gets()) == 1


MANIFEST_FAULTS = {
    "not_json": b"{",
    "list": b"[1]",
    "not_utf8": b'{"datasets": "\xff"}',
    "no_names": b'{"datasets": [{}], "tokenizers": []}',
    "deep": b"[" * 200_000,
}


@pytest.mark.parametrize("name", MANIFEST_FAULTS)
def test_a_damaged_manifest(hub, tmp_path, capsys, name):
    hub.put("manifest.json", MANIFEST_FAULTS[name])
    line = refused(capsys, tmp_path)
    assert line == f"error: {REPO}: manifest.json is damaged; choose another repository"


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest, dataset, tokenizer: dataset.pop("stats"),
        lambda manifest, dataset, tokenizer: dataset.update(stats=[]),
        lambda manifest, dataset, tokenizer: dataset["stats"].update(files_val=0),
        lambda manifest, dataset, tokenizer: dataset["stats"].update(files_val=10**9),
        lambda manifest, dataset, tokenizer: dataset["stats"].update(files_train="3"),
        lambda manifest, dataset, tokenizer: dataset["stats"].update(files_train=2.5),
        lambda manifest, dataset, tokenizer: dataset.update(tokenizer_name="other"),
        lambda manifest, dataset, tokenizer: dataset.update(tokenizer_name=[]),
        lambda manifest, dataset, tokenizer: tokenizer.update(model_path=5),
    ],
)
def test_a_damaged_entry(hub, tmp_path, capsys, change):
    hub.edit(change)
    line = refused(capsys, tmp_path)
    assert line == f"error: {REPO}: the manifest's entry of fineweb10B_sp1024 is damaged"
    assert not hub.gets(".bin")


def test_a_local_manifest_that_cannot_be_merged(hub, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{")
    line = refused(capsys, tmp_path)
    assert line.startswith(f"error: {tmp_path / 'manifest.json'}: no manifest")
    assert not hub.log


# ---- The machine ----


def test_a_small_disk(hub, tmp_path, capsys, monkeypatch):
    sizes = [len(data) for path, data in hub.files.items() if "manifest" not in path]
    free = SimpleNamespace(free=sum(sizes) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    line = refused(capsys, tmp_path)
    assert "0.00 GB to fetch, 0.00 GB free; make room" in line and "--train-shards" in line
    assert not files_of(tmp_path)
    free.free += 1
    assert run(tmp_path) == 0
    free.free = 0  # nothing is left to fetch
    assert run(tmp_path) == 0


def test_bytes_that_are_here_need_no_room(hub, tmp_path, monkeypatch):
    assert run(tmp_path) == 0
    data = (tmp_path / TRAIN_0).read_bytes()
    (tmp_path / TRAIN_0).unlink()
    part = tmp_path / f"{TRAIN_0}.{hashlib.sha256(data).hexdigest()[:8]}.part"
    part.write_bytes(data[:1000])
    free = SimpleNamespace(free=len(data) - 1001)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert run(tmp_path) == 2
    free.free += 1
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)


def test_a_full_disk(hub, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "transfer", full)
    assert refused(capsys, tmp_path).endswith("left on device; make room, then run again to resume")


def test_a_place_that_is_no_folder(hub, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(capsys, tmp_path / "file")


def test_one_download_at_a_time(hub, tmp_path, capsys):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    assert "another download is at work here; wait for it" in refused(capsys, tmp_path)
    os.close(handle)
    assert run(tmp_path) == 0


def test_interrupted(hub, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "transfer", stop)
    assert run(tmp_path) == 130
    assert capsys.readouterr().err == "error: interrupted; run again to resume\n"


def stop_midway(hub, out, number):
    """Run the script, send it the signal in the middle of a shard, return status and errors."""

    def sizes():
        return [part.stat().st_size for part in out.rglob("*train_000000*.part")] or [0]

    before, deadline = sizes(), time.monotonic() + 60
    hub.fail(TRAIN_0, stall)
    process = child(hub, out)
    while sizes() in (before, [0]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors


def test_a_killed_download_is_resumed(hub, tmp_path):
    data = shard(300_000)
    hub.put(TRAIN_0, data)
    hub.edit(lambda manifest, dataset, tokenizer: dataset["stats"].pop("tokens_train"))
    for number, told in (
        (signal.SIGKILL, (-signal.SIGKILL, "")),
        (signal.SIGTERM, (130, "error: interrupted; run again to resume\n")),
    ):
        assert stop_midway(hub, tmp_path, number) == told
        assert not (tmp_path / TRAIN_0).exists()
        [part] = tmp_path.rglob("*.part")
        assert data.startswith(part.read_bytes())
    hub.log.clear()
    start = part.stat().st_size
    assert run(tmp_path) == 0
    assert_whole(hub, tmp_path)
    assert [r.headers["Range"] for r in hub.gets(TRAIN_0)] == [f"bytes={start}-"]
    assert not hub.gets("val_000000.bin")  # it had its name


# ---- Command line ----


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--train-shards", "-1"], "error: --train-shards: -1 is not in 0 to 1000000"),
        (["--train-shards", "x"], "error: --train-shards: invalid integer value: 'x'"),
        (["--shards", "1"], "error: unrecognized arguments: --shards"),
    ],
)
def test_bad_arguments(hub, capsys, args, line):
    assert download.main(args) == 2
    assert capsys.readouterr().err.startswith(line)
    assert not hub.log


def test_help_shows_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        download.main(["--help"])
    assert stop.value.code == 0
    assert "python data/download.py --variant sp4096 --train-shards 10" in capsys.readouterr().out
