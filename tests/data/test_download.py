"""Test data/download.py with real servers on 127.0.0.1, both correct and broken ones.

Small files made here replace the published ones; no test uses the network outside this machine.
"""

import hashlib
import importlib.util
import io
import random
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data" / "download.py"


def load_download() -> ModuleType:
    """Load data/download.py as a module; it is not part of a package."""
    spec = importlib.util.spec_from_file_location("download", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["download"] = module  # dataclasses look it up here
    spec.loader.exec_module(module)
    return module


def make_zip(content: bytes) -> bytes:
    """Make an archive with one uncompressed member, as torch.save would write it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data/0", content)
    return stream.getvalue()


download = load_download()
REAL_FILES = download.FILES
REAL_MODELS = download.MODELS

TOKENIZER = random.Random(0).randbytes(700_001)  # several chunks; the last one is not full
DEV = b"1 ||| fine\n0 ||| dull\n" * 40
COURSE_CHECKPOINT = make_zip(random.Random(1).randbytes(500_000))
HUB_CHECKPOINT = random.Random(2).randbytes(400_000)
MODEL, MODEL_TOKENIZER = (random.Random(seed).randbytes(5_000) for seed in (3, 4))
STORIES = {"stories260K/model.bin": MODEL, "stories260K/tokenizer.bin": MODEL_TOKENIZER}
HUB_STORIES = {"stories260K.bin": MODEL, "tok512.bin": MODEL_TOKENIZER}
ENDLESS = 40_000_000  # bytes; far more than the system's buffers between server and client


class Handler(BaseHTTPRequestHandler):
    """Sends the files of its server and supports ranges; the server's fields select faults."""

    server: "Server"

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer a request."""
        server = self.server
        byte_range = self.headers["Range"]
        server.requests.append((self.path, byte_range))
        body = server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        start = int(byte_range.removeprefix("bytes=").removesuffix("-")) if byte_range else 0
        if byte_range and server.ranges == "refuse":
            return self.send_error(416)
        if byte_range and server.ranges != "ignore":
            first = start - 1 if server.ranges == "shift" else start
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            body = body[first:]
        else:
            self.send_response(200)
        self.send_header("Content-Type", server.content_type)
        if server.sends_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts:
            body = body[: server.cuts.pop(0)]
        for i in range(0, len(body), 100_000):
            try:
                server.sent += self.wfile.write(body[i : i + 100_000])
            except OSError:  # the client closed the connection
                return
        if server.stalls:
            server.closing.wait()


class Server(ThreadingHTTPServer):
    """A server that holds files by path, and records requests and the number of bytes sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {
            "/course/tokenizer.model": TOKENIZER,
            "/course/data/sst-dev.txt": DEV,
            "/cmu/stories42M.pt": COURSE_CHECKPOINT,
            "/hub/stories42M.pt": HUB_CHECKPOINT,
            **{f"/hub/stories260K/{name}": body for name, body in HUB_STORIES.items()},
        }
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        self.sent = 0  # bytes of bodies
        self.ranges = "serve"  # or: ignore, refuse, shift
        self.content_type = "application/octet-stream"
        self.sends_length = True
        self.cuts: list[int] = []  # close each next connection after this many bytes
        self.stalls = False  # True: keep the connection open instead of closing it
        self.closing = threading.Event()


Step = tuple[float, bytes]  # seconds to wait, bytes to send


class Connected(socketserver.BaseRequestHandler):
    """Answers one connection with the next script of its server, and ignores the request."""

    server: "Answers"

    def handle(self) -> None:
        """Send the steps of the script."""
        with suppress(OSError):
            self.request.settimeout(5)
            self.request.recv(4096)
            for wait, content in self.server.steps():
                if self.server.closing.wait(wait) if wait else self.server.closing.is_set():
                    return
                self.request.sendall(content)


class Answers(socketserver.ThreadingTCPServer):
    """A server that ignores the requests and sends exactly the bytes of its scripts."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Connected)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.scripts: list[Callable[[], Iterator[Step]]] = []
        self.closing = threading.Event()

    def steps(self) -> Iterator[Step]:
        """Return the next answer; the last script is used again for all later requests."""
        return (self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0])()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off this machine's proxy, which would be used for 127.0.0.1 too."""
    monkeypatch.setenv("no_proxy", "*")


def serve[S: (Server, Answers)](running: S) -> Iterator[S]:
    """Run a server in a thread during the test, then stop it."""
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.closing.set()
    running.shutdown()
    thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a server for the files to download; `course`, `cmu` and `hub` are its folders."""
    with Server() as running:
        pinned = download.PinnedFile
        dev, tokenizer, hub = (
            hashlib.sha256(body).hexdigest() for body in (DEV, TOKENIZER, HUB_CHECKPOINT)
        )
        course_url, cmu_url, hub_url = (
            f"{running.url}/{name}" for name in ("course", "cmu", "hub")
        )
        files = (
            pinned(dev, len(DEV), "data/sst-dev.txt", course_url),
            pinned(tokenizer, len(TOKENIZER), "tokenizer.model", course_url),
            pinned(None, len(COURSE_CHECKPOINT), "stories42M.pt", cmu_url),
            pinned(hub, len(HUB_CHECKPOINT), "stories42M.pt", hub_url, ".hub.part"),
        )
        models = tuple(
            pinned(hashlib.sha256(body).hexdigest(), len(body), name, hub_url)
            for name, body in STORIES.items()
        )
        monkeypatch.setattr(download, "FILES", files)
        monkeypatch.setattr(download, "MODELS", models)
        yield from serve(running)


class Result(NamedTuple):
    """Exit status, standard output and standard error of a run."""

    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Return the folder to download into; it does not exist yet."""
    return tmp_path / "target"


@pytest.fixture
def run(target: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the program with the target folder as `--to`."""

    def run_main(*argv: str) -> Result:
        status = download.main([*argv, "--to", str(target)])
        return Result(status, *capsys.readouterr())

    return run_main


def error_line(result: Result) -> str:
    """Return the line of the only error; progress bars may precede it."""
    assert result.status == 2
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    assert [line for line in lines if "error:" in line] == lines[-1:]
    assert lines[-1].startswith("download.py: error: ")
    return lines[-1]


def names_below(folder: Path) -> set[str]:
    """Return the relative paths of all files in a folder and its subfolders."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def put(path: Path, content: bytes) -> Path:
    """Write a file, and make its folder if necessary; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def closed_port() -> int:
    """Return a port on which no program listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


# Which files are fetched


def test_fetches_all_files(server: Server, target: Path, run: Run) -> None:
    result = run()
    assert result.status == 0
    assert (target / "tokenizer.model").read_bytes() == TOKENIZER
    assert (target / "data" / "sst-dev.txt").read_bytes() == DEV
    assert (target / "stories42M.pt").read_bytes() == COURSE_CHECKPOINT
    assert names_below(target) == {"tokenizer.model", "data/sst-dev.txt", "stories42M.pt"}
    assert result.out == f"{target}: 3 fetched, 0 already there\n"


def test_progress_is_one_line_per_file(server: Server, run: Run) -> None:
    lines = run().err.rstrip("\n").split("\n")
    last_states = [line.split("\r")[-1] for line in lines]
    assert [state.split()[0] for state in last_states] == [
        "data/sst-dev.txt",
        "tokenizer.model",
        "stories42M.pt",
    ]
    assert all("100%" in state for state in last_states)


def test_second_run_fetches_nothing(server: Server, run: Run) -> None:
    run()
    server.requests.clear()
    result = run()
    assert result == Result(0, result.out, "")
    assert "0 fetched, 3 already there" in result.out
    assert server.requests == []


def test_fetches_only_what_is_named(server: Server, target: Path, run: Run) -> None:
    assert run("data/sst-dev.txt", "data/sst-dev.txt").status == 0
    assert names_below(target) == {"data/sst-dev.txt"}
    assert server.requests == [("/course/data/sst-dev.txt", None)]


def test_unknown_name_error_lists_the_files(server: Server, target: Path, run: Run) -> None:
    line = error_line(run("data/sst-dev.txt", "sst-dev.txt"))
    assert "sst-dev.txt: unknown file, expected one of: data/sst-dev.txt, tokenizer.model" in line
    assert not target.exists()


# Models that are fetched only if they are named


def contents(folder: Path) -> dict[str, bytes]:
    """Return the relative path and the content of each file in a folder and its subfolders."""
    return {name: (folder / name).read_bytes() for name in names_below(folder)}


@pytest.mark.parametrize("name", ["stories260K", "stories260K/"])
def test_a_model_is_fetched_into_its_own_folder(
    server: Server, target: Path, run: Run, name: str
) -> None:
    """From the Hub, where its files have other names."""
    result = run(name)
    assert result.status == 0 and "2 fetched, 0 already there" in result.out
    assert contents(target) == STORIES
    assert [path for path, _ in server.requests] == [
        "/hub/stories260K/stories260K.bin",
        "/hub/stories260K/tok512.bin",
    ]
    assert "0 fetched, 2 already there" in run(name).out


def test_one_file_of_a_model_can_be_named(server: Server, target: Path, run: Run) -> None:
    assert run("stories260K/tokenizer.bin", "stories260K/tokenizer.bin").status == 0
    assert contents(target) == {"stories260K/tokenizer.bin": MODEL_TOKENIZER}


def test_a_folder_of_the_assignment_can_be_named(server: Server, target: Path, run: Run) -> None:
    assert run("data").status == 0
    assert names_below(target) == {"data/sst-dev.txt"}


@pytest.mark.parametrize("name", ["stories", "stories260", "stories260K/model", "/", "", ".."])
def test_a_part_of_a_name_is_unknown(server: Server, target: Path, run: Run, name: str) -> None:
    line = error_line(run(name))
    assert f"{name}: unknown file, expected one of: " in line and "stories260K/model.bin" in line
    assert not target.exists()


def test_a_model_with_wrong_hash_is_deleted(server: Server, target: Path, run: Run) -> None:
    server.files["/hub/stories260K/stories260K.bin"] = b"x" + MODEL[1:]
    assert "/hub/stories260K/stories260K.bin: expected SHA-256" in error_line(run("stories260K"))
    assert names_below(target) == set()


# Interrupted downloads


def test_resume_requests_only_the_missing_bytes(server: Server, target: Path, run: Run) -> None:
    part = put(target / "tokenizer.model.part", TOKENIZER[:300_000])
    result = run("tokenizer.model")
    assert result.status == 0
    assert (target / "tokenizer.model").read_bytes() == TOKENIZER
    assert not part.exists()
    assert server.requests == [("/course/tokenizer.model", "bytes=300000-")]
    assert server.sent == len(TOKENIZER) - 300_000
    states = re.findall(r"(\d+)%", result.err)
    assert (states[0], states[-1]) == ("43", "100")  # of 700,001 bytes


@pytest.mark.parametrize("ranges", ["ignore", "refuse", "shift"])
def test_starts_again_if_the_server_cannot_resume(
    server: Server, target: Path, run: Run, ranges: str
) -> None:
    put(target / "tokenizer.model.part", b"x" * 300_000)  # wrong bytes, which must not stay
    server.ranges = ranges
    assert run("tokenizer.model").status == 0
    assert (target / "tokenizer.model").read_bytes() == TOKENIZER


@pytest.mark.parametrize("extra", [0, 1])
def test_part_file_that_is_too_long_or_wrong_is_deleted(
    server: Server, target: Path, run: Run, extra: int
) -> None:
    put(target / "tokenizer.model.part", b"x" * (len(TOKENIZER) + extra))
    assert run("tokenizer.model").status == 0
    assert (target / "tokenizer.model").read_bytes() == TOKENIZER
    assert server.requests == [("/course/tokenizer.model", None)]


def test_complete_part_file_needs_no_request(server: Server, target: Path, run: Run) -> None:
    inode = put(target / "tokenizer.model.part", TOKENIZER).stat().st_ino
    assert run("tokenizer.model").status == 0
    assert names_below(target) == {"tokenizer.model"}
    assert (target / "tokenizer.model").stat().st_ino == inode  # renamed, not copied
    assert server.requests == []


def test_resumes_within_a_run(server: Server, target: Path, run: Run) -> None:
    server.cuts = [250_000, 250_000]
    assert run("tokenizer.model").status == 0
    assert (target / "tokenizer.model").read_bytes() == TOKENIZER
    byte_ranges = [byte_range for _, byte_range in server.requests]
    assert byte_ranges == [None, "bytes=250000-", "bytes=500000-"]


def test_gives_up_after_five_connections(server: Server, run: Run) -> None:
    server.cuts = [10] * 100
    assert "50 of 700,001 bytes" in error_line(run("tokenizer.model"))
    assert len(server.requests) == 5


def test_second_run_completes_a_truncated_body(server: Server, target: Path, run: Run) -> None:
    server.cuts = [400_000, 0]  # the second connection sends no bytes, so there is no third
    line = error_line(run("tokenizer.model"))
    assert "400,000 of 700,001 bytes" in line and "run again to resume" in line
    assert names_below(target) == {"tokenizer.model.part"}
    server.requests.clear()
    assert run("tokenizer.model").status == 0
    assert (target / "tokenizer.model").read_bytes() == TOKENIZER
    assert server.requests == [("/course/tokenizer.model", "bytes=400000-")]


def test_stalled_connection_times_out_and_keeps_the_received_bytes(
    server: Server, target: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.cuts = [123_456, 0]
    server.stalls = True
    line = error_line(run("tokenizer.model"))
    assert "timed out" in line and "123,456 of 700,001 bytes" in line
    assert (target / "tokenizer.model.part").read_bytes() == TOKENIZER[:123_456]


def test_interruption_message_says_how_to_resume(server: Server, target: Path) -> None:
    """Send the signal of Ctrl-C to a real process in the middle of a body."""
    server.files["/course/tokenizer.model"] = bytes(499_723)  # size of the published file
    server.cuts = [200_000]
    server.stalls = True
    argv = ["tokenizer.model", "--from", f"{server.url}/course", "--to", str(target)]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *argv], stderr=subprocess.PIPE, text=True
    )
    part = target / "tokenizer.model.part"
    deadline = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "download.py: interrupted; run again to resume"
    assert "Traceback" not in err
    assert names_below(target) == {"tokenizer.model.part"}
    assert part.stat().st_size > 0


# Wrong contents


def test_file_with_wrong_hash_is_deleted(server: Server, target: Path, run: Run) -> None:
    wrong = b"x" + TOKENIZER[1:]
    server.files["/course/tokenizer.model"] = wrong
    line = error_line(run("tokenizer.model"))
    assert f"expected SHA-256 {hashlib.sha256(TOKENIZER).hexdigest()}" in line
    assert f"found {hashlib.sha256(wrong).hexdigest()}" in line
    assert names_below(target) == set()


@pytest.mark.parametrize("sends_length", [True, False])
def test_body_that_is_too_long_leaves_no_file(
    server: Server, target: Path, run: Run, sends_length: bool
) -> None:
    server.files["/course/tokenizer.model"] = TOKENIZER + bytes(ENDLESS)
    server.sends_length = sends_length
    line = error_line(run("tokenizer.model"))
    assert "expected 700,001 bytes, found " in line
    assert names_below(target) == set()
    assert server.sent < ENDLESS


@pytest.mark.parametrize("sends_length", [True, False])
def test_html_page_is_refused(server: Server, target: Path, run: Run, sends_length: bool) -> None:
    """Answer with a log-in page and status 200; the bytes of an earlier run must be kept."""
    part = put(target / "tokenizer.model.part", TOKENIZER[:300_000])
    server.files["/course/tokenizer.model"] = b"<html>Please log in</html>"
    server.content_type = "text/html; charset=utf-8"
    server.ranges = "ignore"
    server.sends_length = sends_length
    assert "expected 700,001 bytes, found an HTML page" in error_line(run("tokenizer.model"))
    assert part.read_bytes() == TOKENIZER[:300_000]
    assert names_below(target) == {"tokenizer.model.part"}


def test_existing_wrong_file_is_not_overwritten(server: Server, target: Path, run: Run) -> None:
    existing = put(target / "tokenizer.model", b"mine")
    line = error_line(run())
    assert str(existing) in line and "expected 700,001 bytes, found 4" in line
    assert "move or delete it" in line
    assert existing.read_bytes() == b"mine"
    assert server.requests == []


def test_existing_file_of_the_right_size_is_hashed(server: Server, target: Path, run: Run) -> None:
    put(target / "tokenizer.model", bytes(len(TOKENIZER)))
    assert "SHA-256" in error_line(run("tokenizer.model"))


# Sources that do not answer


def test_missing_file_is_an_error(server: Server, target: Path, run: Run) -> None:
    del server.files["/course/tokenizer.model"]
    line = error_line(run("tokenizer.model"))
    assert f"{server.url}/course/tokenizer.model: HTTP Error 404" in line
    assert names_below(target) == set()


def test_no_network_error_is_one_line_within_seconds(target: Path) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--from", url, "--to", str(target)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert time.monotonic() - start < 8
    assert process.returncode == 2
    # the first file's error ends the run
    assert process.stderr == f"download.py: error: {url}/tokenizer.model: Connection refused\n"


def test_no_network_error_suggests_another_source(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    files = [
        download.PinnedFile(p.sha256, p.size, p.name, url, p.part_suffix) for p in download.FILES
    ]
    monkeypatch.setattr(download, "FILES", files)
    result = run()
    assert result.err == (
        f"download.py: error: {url}/data/sst-dev.txt: Connection refused; "
        "use --from DIR_OR_URL to fetch the files from another place\n"
    )
    assert error_line(result)


# Hostile servers


@pytest.fixture
def answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """Run a second server, for `--from`, whose answers need not be valid HTTP."""
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download, "LIMIT", 0.4)
    with Answers() as running:
        yield from serve(running)


def script(*steps: Step, again: Step | None = None) -> Callable[[], Iterator[Step]]:
    """Make an answer from steps; the step `again`, if given, is repeated without end."""

    def answer() -> Iterator[Step]:
        yield from steps
        while again:
            yield again

    return answer


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 700001\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
DRIP = (0.05, b"x")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (script((0, b"HTTP/1.1 200 OK\r\nX: "), again=DRIP), "timed out"),
        (script((0, b"HTTP/1.1 200 OK\r\n"), again=(0, b"X: y\r\n")), "more than 100 headers"),
        (script((0, OK), again=DRIP), "too slow"),
        (script((0, CHUNKED + b"1\r\nx\r\n0\r\n"), again=(0, b"X: y\r\n")), "timed out"),
        (script((0, OK.replace(b"700001", b"9" * 5000))), "the connection was closed"),
    ],
    ids=["slow header", "endless headers", "slow body", "endless trailers", "huge length"],
)
def test_hostile_answers_end_within_seconds(
    answers: Answers, target: Path, run: Run, answer: Callable[[], Iterator[Step]], reason: str
) -> None:
    answers.scripts = [answer]
    start = time.monotonic()
    line = error_line(run("tokenizer.model", "--from", answers.url))
    assert time.monotonic() - start < 5
    assert f"{answers.url}/tokenizer.model: " in line and reason in line


@pytest.mark.parametrize("size", [b"-5", b"ffffffffffffffff"])
def test_wrong_chunk_sizes_do_not_fill_the_disk(
    answers: Answers, target: Path, run: Run, size: bytes
) -> None:
    answers.scripts = [script((0, CHUNKED + size + b"\r\n"), again=(0, bytes(100_000)))]
    error_line(run("tokenizer.model", "--from", answers.url))
    assert not target.exists() or names_below(target) <= {"tokenizer.model.part"}


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1:99999/", "http://[::1", "file:///etc/hostname", f"http://{'a' * 70}"],
)
def test_redirect_to_invalid_address_error_names_the_address(
    answers: Answers, target: Path, run: Run, location: str
) -> None:
    answers.scripts = [script((0, f"HTTP/1.1 302 Found\r\nLocation: {location}\r\n\r\n".encode()))]
    line = error_line(run("tokenizer.model", "--from", answers.url))
    assert f"{answers.url}/tokenizer.model: " in line and names_below(target) == set()


def test_compressed_archive_is_not_a_checkpoint(target: Path) -> None:
    """Reject a compressed archive: a small file that unpacks to gigabytes is slow to check."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1_000_000))
    path = put(target / "stories42M.pt", stream.getvalue())
    pinned = download.PinnedFile(None, path.stat().st_size, "stories42M.pt")
    assert (
        "uncompressed zip archive, found one that unpacks to 1,000,000 bytes"
        in download.mismatch(path, pinned)
    )


@pytest.mark.parametrize("argv", [["--bogus"], ["--from"], ["--from", "http://127.0.0.1:99999"]])
def test_wrong_arguments_give_one_line(target: Path, run: Run, argv: list[str]) -> None:
    assert run(*argv).err.count("\n") == 1
    error_line(run(*argv))


# --from


@pytest.fixture(params=["folder", "url"])
def course_copy(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Iterator[str]:
    """Return a copy of the course's repository: a folder, or an address that ends in a slash."""
    if request.param == "url":
        yield f"{server.url}/course/"
        return
    put(tmp_path / "a folder" / "tokenizer.model", TOKENIZER)
    put(tmp_path / "a folder" / "data" / "sst-dev.txt", DEV)
    yield str(tmp_path / "a folder")
    assert server.requests == []


def add_file(course_copy: str, server: Server, name: str, content: bytes) -> None:
    """Add a file to the copy of the course's repository."""
    if course_copy.startswith("http"):
        server.files[f"/course/{name}"] = content
    else:
        put(Path(course_copy) / name, content)


def test_from_source_without_checkpoint_is_not_an_error(
    course_copy: str, server: Server, target: Path, run: Run
) -> None:
    result = run("--from", course_copy)
    assert result.status == 0
    assert result.out == f"{target}: 2 fetched, 0 already there, 1 missing\n"
    assert (target / "tokenizer.model").read_bytes() == TOKENIZER
    assert (target / "data" / "sst-dev.txt").read_bytes() == DEV
    assert names_below(target) == {"tokenizer.model", "data/sst-dev.txt"}
    last = result.err.splitlines()[-1]
    assert "has no stories42M.pt" in last and last.endswith("data/download.py stories42M.pt")
    again = run("--from", course_copy)
    assert again.status == 0 and again.err.splitlines() == [last]


def test_from_source_without_the_named_checkpoint_is_an_error(
    course_copy: str, target: Path, run: Run
) -> None:
    assert "stories42M.pt: " in error_line(run("--from", course_copy, "stories42M.pt"))
    assert names_below(target) == set()


def test_from_source_without_another_file_is_an_error(
    server: Server, tmp_path: Path, target: Path, run: Run
) -> None:
    folder = put(tmp_path / "source" / "tokenizer.model", TOKENIZER).parent
    line = error_line(run("--from", str(folder)))
    assert f"{folder}/data/sst-dev.txt: No such file" in line
    del server.files["/course/data/sst-dev.txt"]
    assert "data/sst-dev.txt: HTTP Error 404" in error_line(run("--from", f"{server.url}/course"))


@pytest.mark.parametrize("layout", ["ours", "llama2c"])
def test_from_source_may_have_a_model_in_either_layout(
    course_copy: str, server: Server, target: Path, run: Run, layout: str
) -> None:
    files = STORIES
    if layout == "llama2c":
        files = {f"llama2c/{name}": body for name, body in HUB_STORIES.items()}
    for name, body in files.items():
        add_file(course_copy, server, name, body)
    assert run("stories260K", "--from", course_copy).status == 0
    assert contents(target) == STORIES
    assert not any(path.startswith("/hub") for path, _ in server.requests)


def test_from_source_without_the_named_model_is_an_error(
    course_copy: str, target: Path, run: Run
) -> None:
    assert "stories260K/model.bin: " in error_line(run("stories260K", "--from", course_copy))
    assert names_below(target) == set()


@pytest.mark.parametrize("content", [COURSE_CHECKPOINT, HUB_CHECKPOINT], ids=["course", "hub"])
def test_from_accepts_both_checkpoints(
    course_copy: str, server: Server, target: Path, run: Run, content: bytes
) -> None:
    add_file(course_copy, server, "stories42M.pt", content)
    result = run("--from", course_copy)
    assert result.status == 0 and "3 fetched" in result.out
    assert (target / "stories42M.pt").read_bytes() == content
    assert "0 fetched, 3 already there" in run("--from", course_copy).out


@pytest.mark.parametrize("content", [b"neither", HUB_CHECKPOINT[:-1] + b"x"], ids=["size", "hash"])
def test_from_rejects_other_checkpoints(
    course_copy: str, server: Server, target: Path, run: Run, content: bytes
) -> None:
    add_file(course_copy, server, "stories42M.pt", content)
    assert "stories42M.pt: expected " in error_line(run("--from", course_copy, "stories42M.pt"))
    assert names_below(target) == set()


@pytest.mark.parametrize("source", ["nowhere", "ftp://127.0.0.1/", ""])
def test_from_must_be_a_folder_or_an_address(
    server: Server, target: Path, run: Run, source: str
) -> None:
    assert "neither a folder nor an http(s) address" in error_line(run("--from", source))
    assert not target.exists()


# The two checkpoints


@pytest.mark.parametrize("failure", ["gone", "broken", "other size"])
def test_hub_is_used_if_the_course_checkpoint_fails(
    server: Server, target: Path, run: Run, failure: str
) -> None:
    if failure == "gone":
        del server.files["/cmu/stories42M.pt"]
    elif failure == "broken":
        server.cuts = [200_000, 0]
    else:
        server.files["/cmu/stories42M.pt"] += b"x"
    result = run("stories42M.pt")
    assert result.status == 0
    assert (target / "stories42M.pt").read_bytes() == HUB_CHECKPOINT
    assert names_below(target) == {"stories42M.pt"}
    notices = [line for line in result.err.splitlines() if line.startswith("download.py: ")]
    assert len(notices) == 1
    assert f"{server.url}/cmu/stories42M.pt: " in notices[0]
    assert notices[0].endswith(f"; trying {server.url}/hub/stories42M.pt")
    assert "0 fetched, 1 already there" in run("stories42M.pt").out


def test_part_files_of_the_two_checkpoints_do_not_mix(
    server: Server, target: Path, run: Run
) -> None:
    cmu = server.files.pop("/cmu/stories42M.pt")
    server.cuts = [150_000, 0]
    assert "150,000 of 400,000 bytes" in error_line(run("stories42M.pt"))
    server.files["/cmu/stories42M.pt"] = cmu
    server.requests.clear()
    assert run("stories42M.pt").status == 0
    assert server.requests == [("/cmu/stories42M.pt", None)]
    assert (target / "stories42M.pt").read_bytes() == COURSE_CHECKPOINT
    assert names_below(target) == {"stories42M.pt"}


@pytest.mark.parametrize("position", [250_000, COURSE_CHECKPOINT.index(b"PK\1\2")])
def test_checkpoint_without_hash_is_checked_by_crc(
    server: Server, target: Path, run: Run, position: int
) -> None:
    """Change one bit, in the archive's member or in its directory."""
    damaged = bytearray(COURSE_CHECKPOINT)
    damaged[position] ^= 1
    server.files["/course/stories42M.pt"] = bytes(damaged)
    line = error_line(run("--from", f"{server.url}/course", "stories42M.pt"))
    assert "expected an intact zip archive" in line
    assert names_below(target) == set()
    existing = put(target / "stories42M.pt", bytes(damaged))
    assert "move or delete it" in error_line(run("stories42M.pt"))
    assert existing.read_bytes() == damaged


# Target folders


def test_target_that_is_not_a_folder(server: Server, target: Path, run: Run) -> None:
    target.write_text("mine")
    assert f"{target}: not a folder" in error_line(run())
    assert target.read_text() == "mine"
    assert server.requests == []


def test_target_that_cannot_be_written(server: Server, target: Path, run: Run) -> None:
    put(target / "data", b"a file where a folder should be")
    assert f"{target / 'data'}: " in error_line(run("data/sst-dev.txt"))
    assert server.requests == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_not_blamed_on_the_source(server: Server, target: Path, run: Run) -> None:
    target.mkdir()
    (target / "stories42M.pt.part").symlink_to("/dev/full")
    assert error_line(run("stories42M.pt")).endswith(f"{target}: No space left on device")
    assert server.requests == [("/cmu/stories42M.pt", None)]


def test_default_target_is_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_download().get_args([]).to == ROOT.resolve()


def test_help_works_in_another_folder(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert all(word in process.stdout for word in ("FILE", "--from DIR_OR_URL", "--to DIR"))
    listed = {tuple(line.split()[:2]) for line in process.stdout.splitlines()}
    assert listed >= {(pinned.name, f"{pinned.size:,}") for pinned in REAL_FILES + REAL_MODELS}


# The table of published files


def test_table_lists_every_file() -> None:
    names = [
        f"data/{data}-{split}.txt"
        for data in ("sst", "cfimdb")
        for split in ("train", "dev", "test")
    ]
    names += ["data/sst-label-mapping.json", "data/cfimdb-label-mapping.json"]
    names += ["tokenizer.model", "sanity_check.data", "stories42M.pt", "stories42M.pt"]
    assert sorted(pinned.name for pinned in REAL_FILES) == sorted(names)
    assert len({pinned.name + pinned.part_suffix for pinned in REAL_FILES}) == len(REAL_FILES)
    models = ["stories260K/model.bin", "stories260K/tokenizer.bin", "stories15M.pt"]
    assert [pinned.name for pinned in REAL_MODELS] == models
    assert download.HUB_NAMES.keys() < {*models}
    for pinned in REAL_FILES + REAL_MODELS:
        assert pinned.base_url.startswith("https://")
        assert pinned.sha256 is None or re.fullmatch("[0-9a-f]{64}", pinned.sha256)


@pytest.mark.parametrize("name", dict.fromkeys(pinned.name for pinned in REAL_FILES + REAL_MODELS))
def test_downloaded_file_matches_the_table(name: str) -> None:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not downloaded: uv run python data/download.py {name}")
    versions = [pinned for pinned in REAL_FILES + REAL_MODELS if pinned.name == name]
    assert download.is_in_place(path, versions)


def test_fetched_files_are_not_committed() -> None:
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("not a Git repository")
    names = [pinned.name for pinned in REAL_FILES + REAL_MODELS]
    command = ["git", "-c", f"safe.directory={ROOT}", "check-ignore", "--no-index", *names]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.splitlines() == names
