"""Fetch the missing files of the assignment; each is checked before it is put in place.

    uv run python data/download.py                    fetch all files of the assignment
    uv run python data/download.py data/sst-dev.txt   fetch one file
    uv run python data/download.py stories260K        fetch a small model that writes real stories
    uv run python data/download.py --from DIR_OR_URL  fetch from another place with the same layout

A file is written to a part file (`<name>.part` or `<name>.hub.part`) and renamed to `<name>` when
its size and SHA-256 match the values pinned below. (The SHA-256 of the course's checkpoint is not
published: its size and CRC-32 have to suffice.) An interrupted download is resumed from the part
file. Progress is printed on standard error. An error ends the program with one line on standard
error and exit status 2.
"""

import argparse
import hashlib
import io
import os
import re
import signal
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from threading import current_thread, main_thread
from typing import NoReturn
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = "stories42M.pt"
COURSE_COMMIT = "2951cddba218b7ddfe69295b77ad51a05107d384"
COURSE_URL = f"https://raw.githubusercontent.com/neubig/minllama-assignment/{COURSE_COMMIT}"
HUB_COMMIT = "58e1696980dcbdf80b2dfe876819104a174f5e78"
HUB_URL = "https://huggingface.co/karpathy/tinyllamas/resolve"

TIMEOUT = 10.0  # seconds to wait for a connection, and for each next byte
LIMIT = 3 * TIMEOUT  # seconds for one step (connect, or read a chunk), even if bytes keep coming
MIN_SPEED = 1000  # bytes per second after the first LIMIT seconds; a slower download is stopped
MAX_CONNECTIONS = 5  # per file and run
CHUNK_SIZE = 1 << 18  # bytes


@dataclass(frozen=True)
class PinnedFile:
    """One version of a file, and where it is published."""

    sha256: str | None  # None if it is not published
    size: int  # bytes
    name: str  # relative to the repository root, and to DIR_OR_URL
    base_url: str = COURSE_URL
    part_suffix: str = ".part"  # of an unfinished file; differs between the versions of a file


# One file per line: SHA-256, size in bytes, name
COURSE_FILES = """\
9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347 499723 tokenizer.model
34f7c763a3bb025940029bd970594e985bf69b7ed6e693a8f5cccbef0cee55b0 289851 sanity_check.data
7aeac81f2a387f2ce7fab98ed8f40ef85cc9c8ad11bcbb63b122e95665cb1f35 936994 data/sst-train.txt
11963c76cd073e68006da0390620aadf5a4b8f775e2f900e92a50b3002e39b9b 121643 data/sst-dev.txt
bdcc8352d37bdc82113e4a4dd887b824144201539d5a1e49be566232d306a4ba 242474 data/sst-test.txt
831e6914e25d9b9eb56ff9095b3f035bdaf1b9568d385a70ef481c82af0382b3 49 data/sst-label-mapping.json
278e200499d1d68a1a9d80e3947a2203cc97130632d8a53f2b9c11de9cb6c699 1629241 data/cfimdb-train.txt
b38f0c095c4624e85927116728140e96d0221969b34146f65eae5b5bb24752b8 239671 data/cfimdb-dev.txt
8ad2f6da7bfb0e8fc36cf89eda47c574cc9c35d6347e665f31bc904d9ecfe0a7 465946 data/cfimdb-test.txt
afeac43f5a5fe8758469078418519df4c8503c2e30e2fcf6c61464fce3d44a36 16 data/cfimdb-label-mapping.json
"""
FILES = (
    *(
        PinnedFile(sha256, int(size), name)
        for sha256, size, name in map(str.split, COURSE_FILES.splitlines())
    ),
    # The checkpoint comes last, so that a missing network is noticed at a small file. Its two
    # versions are in order of preference. No SHA-256 is published for the first one, the course's:
    # its exact size and the CRC-32 that torch.save stores with each member of the zip archive have
    # to suffice.
    PinnedFile(None, 232_324_715, CHECKPOINT, "https://www.cs.cmu.edu/~vijayv"),
    PinnedFile(
        "fbe124df8794c2e033432c22b59cff64485455b4644046c52a456d0bbd8859fe",
        166_787_298,
        CHECKPOINT,
        f"{HUB_URL}/{HUB_COMMIT}",
        ".hub.part",
    ),
)
# Small models, which are fetched only if they are named; from a branch of the Hub, so the SHA-256
# decides. stories15M.pt is put beside the course's tokenizer.model, which is also its own.
MODEL_FILES = """\
b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696 1056540 stories260K/model.bin
037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312 6227 stories260K/tokenizer.bin
3da00c0fef684f3f83b457736837c46ab55e92a26662b61d6104de2d271c708d 60789090 stories15M.pt
"""
HUB_NAMES = {  # where the name on the Hub is another one
    "stories260K/model.bin": "stories260K/stories260K.bin",
    "stories260K/tokenizer.bin": "stories260K/tok512.bin",
}
MODELS = tuple(
    PinnedFile(sha256, int(size), name, f"{HUB_URL}/main")
    for sha256, size, name in map(str.split, MODEL_FILES.splitlines())
)


class SourceError(Exception):
    """An address cannot be read, or does not have the expected file."""


class NotFoundError(SourceError):
    """An address has no file."""


def reason_of(error: BaseException) -> str:
    """Return in a few words what went wrong."""
    if isinstance(error, HTTPError):
        return str(error)
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def mismatch(path: Path, pinned: PinnedFile) -> str:
    """Describe how a file differs from its pinned version; return "" if it matches."""
    size = path.stat().st_size
    if size != pinned.size:
        return f"expected {pinned.size:,} bytes, found {size:,}"
    if pinned.sha256 is None:
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
                if unpacked > size:  # torch.save does not compress
                    return (
                        "expected an uncompressed zip archive, "
                        f"found one that unpacks to {unpacked:,} bytes"
                    )
                damaged = archive.testzip()
        except Exception as error:  # a damaged archive can raise about a dozen types of errors
            damaged = reason_of(error)
        return f"expected an intact zip archive, found a damaged one: {damaged}" if damaged else ""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if sha256 == pinned.sha256 else f"expected SHA-256 {pinned.sha256}, found {sha256}"


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError if a step takes more than LIMIT seconds.

    A socket's own timeout starts again at every byte, so it never ends a header that arrives one
    byte at a time. Without the alarm signal (on Windows, or in another thread than the main one)
    only the socket's timeout applies.
    """
    if not hasattr(signal, "SIGALRM") or current_thread() is not main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError("timed out")

    previous_handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)


def open_url(url: str, offset: int = 0) -> tuple[HTTPResponse, int, int | None]:
    """Open an address at a byte offset, or at 0 if the server cannot resume.

    Returns the response, the offset at which its body starts in the file, and the size of the whole
    file (None if the server does not send it). Raises NotFoundError if the address has no file,
    SourceError if the address, or one that it redirects to, is not valid, and OSError or
    HTTPException if the connection fails.
    """
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    try:
        with time_limit():
            response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except (ValueError, OverflowError) as error:
        raise SourceError(
            f"{url}: this address, or one that it redirects to, is not valid: {error}"
        ) from error
    except URLError as error:
        code = error.code if isinstance(error, HTTPError) else None
        if code == 416 and offset:  # the file there is not longer than our part file
            return open_url(url)
        if code in (404, 410) or isinstance(error.reason, FileNotFoundError):
            raise NotFoundError(f"{url}: {reason_of(error)}") from error
        raise
    if offset and response.status == 206:
        content_range = re.fullmatch(
            r"bytes (\d{1,18})-\d+/(\d{1,18})", response.headers["Content-Range"] or ""
        )
        if content_range and int(content_range[1]) == offset:
            return response, offset, int(content_range[2])
        response.close()
        return open_url(url)
    length = response.headers["Content-Length"] or ""
    return response, 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None


def find_url(pinned: PinnedFile, source: str | None) -> str:
    """Return a file's address; a --from source may also have a model of the Hub in llama2c/."""
    hub_name = HUB_NAMES.get(pinned.name, pinned.name)
    if source is None:
        return f"{pinned.base_url}/{hub_name}"
    if hub_name != pinned.name:
        url = f"{source}/llama2c/{Path(hub_name).name}"
        with suppress(SourceError, OSError, HTTPException):
            open_url(url)[0].close()
            return url
    return f"{source}/{pinned.name}"


def receive(url: str, pinned: PinnedFile, part: Path) -> str:
    """Receive the rest of a file into its part file; return why the transfer ended.

    Raises SourceError if the address has another file or none, OSError if `part` cannot be written.
    """
    try:
        stream, start, size = open_url(url, size_of(part))
    except (OSError, HTTPException) as error:
        return reason_of(error)
    with stream:
        # A log-in or error page must not replace the bytes of an earlier run. Most servers send its
        # size, and it differs from the size of the file.
        is_html = stream.headers.get_content_type() == "text/html"
        if size != pinned.size and (size is not None or is_html):
            found = "an HTML page" if is_html else f"{size:,}"
            raise SourceError(f"{url}: expected {pinned.size:,} bytes, found {found}")
        left = pinned.size - start + 1  # + 1: one extra byte shows that the body is too long
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(
                desc=f"{pinned.name:<30}",  # as wide as the longest name
                initial=start,
                total=pinned.size,
                unit="B",
                unit_scale=True,
            ) as bar,
        ):
            begin, received = time.monotonic(), 0
            while left > 0:  # may become negative: a broken chunk can be longer than requested
                elapsed = time.monotonic() - begin
                least = MIN_SPEED * (elapsed - LIMIT)  # bytes
                if received < least:
                    return f"too slow, less than {MIN_SPEED:,} bytes per second"
                try:
                    with time_limit():
                        chunk = stream.read1(min(CHUNK_SIZE, left))
                except (OSError, HTTPException) as error:
                    return reason_of(error)
                if not chunk:
                    break
                file.write(chunk)
                bar.update(len(chunk))
                left -= len(chunk)
                received += len(chunk)
    return "the connection was closed"


def fetch(url: str, pinned: PinnedFile, target: Path) -> None:
    """Fetch a file from an address to its target; resume the part file of an earlier run.

    Raises SourceError if the address does not have this version, OSError if the file cannot be
    written.
    """
    part = target.with_name(target.name + pinned.part_suffix)
    if size_of(part) >= pinned.size and mismatch(part, pinned):
        part.unlink()  # too long or wrong, so it cannot be resumed
    for _ in range(MAX_CONNECTIONS):
        before = size_of(part)
        reason = receive(url, pinned, part) if before < pinned.size else ""
        size = size_of(part)
        if size <= before or size >= pinned.size:  # no progress, or complete
            break
    if size < pinned.size:
        resume_hint = (
            f"; received {size:,} of {pinned.size:,} bytes, run again to resume" if size else ""
        )
        raise SourceError(f"{url}: {reason}{resume_hint}")
    difference = mismatch(part, pinned)
    if difference:
        part.unlink()
        raise SourceError(f"{url}: {difference}{' or more' if size > pinned.size else ''}")
    with open(part, "ab") as file:
        # Otherwise a power cut after the renaming could leave the file without its content.
        os.fsync(file.fileno())
    os.replace(part, target)


def is_in_place(target: Path, versions: Sequence[PinnedFile]) -> bool:
    """Return whether a file exists; raise ValueError if it exists but matches no version."""
    if not target.exists():
        return False
    mismatches = [mismatch(target, pinned) for pinned in versions]
    if all(mismatches):
        raise ValueError(
            f"{target}: this is not the published file: {', or '.join(mismatches)}; "
            "move or delete it and run again"
        )
    return True


def fetch_first(source: str | None, versions: Sequence[PinnedFile], target: Path) -> None:
    """Fetch the first version of a file that is available; raise the errors of `fetch`."""
    # A --from source has only one file under this name; its size tells which version it is.
    if source and len(versions) > 1:
        size = None
        with suppress(OSError, HTTPException):  # `fetch` gets the same error and reports it
            stream, _, size = open_url(find_url(versions[0], source))
            stream.close()
        versions = [pinned for pinned in versions if pinned.size == size] or versions[:1]
    *preferred, (last_url, last_version) = [
        (find_url(pinned, source), pinned) for pinned in versions
    ]
    for url, version in preferred:
        try:
            return fetch(url, version, target)
        except SourceError as error:
            print(f"download.py: {error}; trying {last_url}", file=sys.stderr)
    fetch(last_url, last_version, target)


def run(names: Sequence[str], source: str | None, root: Path) -> None:
    """Fetch the files, or files of folders, that are named and missing in the folder `root`.

    No names mean all files of the assignment.

    Raises ValueError if an argument or an existing file is wrong, SourceError if a file cannot be
    fetched, and OSError if it cannot be written.
    """
    versions_of: dict[str, list[PinnedFile]] = {}
    for pinned in (*FILES, *MODELS):
        versions_of.setdefault(pinned.name, []).append(pinned)
    requested = [] if names else [pinned.name for pinned in FILES]
    for name in names:
        found = [known for known in versions_of if f"{known}/".startswith(f"{name.rstrip('/')}/")]
        if not found:
            raise ValueError(f"{name}: unknown file, expected one of: {', '.join(versions_of)}")
        requested += found
    if source and re.match("https?://", source, re.IGNORECASE):
        source = source.rstrip("/")
    elif source is not None:
        if not (source and Path(source).is_dir()):
            raise ValueError(f"--from {source}: neither a folder nor an http(s) address")
        source = Path(source).resolve().as_uri()  # so that folders are read like addresses
    if root.exists() and not root.is_dir():
        raise ValueError(f"--to {root}: not a folder")

    requested = list(dict.fromkeys(requested))
    missing = [name for name in requested if not is_in_place(root / name, versions_of[name])]
    fetched = still_missing = 0
    for name in missing:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch_first(source, versions_of[name], root / name)
            for pinned in versions_of[name]:  # an earlier run may have begun another version
                (root / (name + pinned.part_suffix)).unlink(missing_ok=True)
            fetched += 1
        except NotFoundError:
            # A copy of the course's repository has no checkpoint, so this is not an error.
            if not source or names or name != CHECKPOINT:
                raise
            still_missing += 1
            command = f"uv run python data/download.py {CHECKPOINT}"
            print(
                f"download.py: {source} has no {CHECKPOINT}; to fetch it, run: {command}",
                file=sys.stderr,
            )
    result = f"{root}: {fetched} fetched, {len(requested) - len(missing)} already there"
    print(f"{result}, {still_missing} missing" if still_missing else result)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises its errors, so that `main` reports them in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def get_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; raise ValueError if it is wrong."""
    course_files, models = (
        "".join(f"  {p.name:<30}{p.size:>12,}  {p.base_url.split('/')[2]}\n" for p in files)
        for files in (FILES, MODELS)
    )
    parser = OneLineParser(
        prog="download.py",
        description="Fetch the missing files of the assignment, or a small model.",
        epilog=f"the assignment's files, in bytes:\n{course_files}\nonly if named:\n{models}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "a file or folder, such as data/sst-dev.txt or stories260K (default: the assignment's)"
    parser.add_argument("names", nargs="*", metavar="FILE", help=text)
    text = (
        "fetch from this folder or http(s) address, which has the same layout "
        "(default: the addresses where the files are published)"
    )
    parser.add_argument("--from", dest="source", metavar="DIR_OR_URL", help=text)
    text = "put the files into this folder (default: the repository root)"
    parser.add_argument("--to", type=Path, default=REPOSITORY_ROOT, metavar="DIR", help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A folder's name that standard output cannot encode is printed with escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    args = argparse.Namespace(source=None, to=None)
    try:
        args = get_args(argv)
        run(args.names, args.source, args.to)
    except KeyboardInterrupt:
        print("download.py: interrupted; run again to resume", file=sys.stderr)
        return 130
    except (SourceError, ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, SourceError) and not args.source:
            message += "; use --from DIR_OR_URL to fetch the files from another place"
        elif isinstance(error, OSError) and error.strerror:
            message = f"{error.filename or args.to}: {error.strerror}"
        print(f"download.py: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
