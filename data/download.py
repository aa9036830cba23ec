"""Fetch the assignment's files: what is missing, checked, and in place only when it is right.

    uv run python data/download.py                    everything
    uv run python data/download.py data/sst-dev.txt   one file
    uv run python data/download.py --from DIR_OR_URL  from another place with the same layout

A file is written to `<name>.part` and takes its name once its size and SHA-256 are those pinned
below; a download that broke off resumes there. Progress goes to standard error; an error ends the
program with one line there and exit status 2.
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
HUB_URL = f"https://huggingface.co/karpathy/tinyllamas/resolve/{HUB_COMMIT}"

TIMEOUT = 10.0  # seconds without a connection, or without a byte
LIMIT = 3 * TIMEOUT  # seconds for one step, however slowly bytes drip in
SLOWEST = 1000  # bytes a second, after the first LIMIT seconds; slower is as good as broken
TRIES = 5  # connections that one file may take in a run
CHUNK = 1 << 18  # bytes


@dataclass(frozen=True)
class Pinned:
    """One content that a file may have, and where it is published."""

    sha256: str | None  # None where none is published
    size: int  # bytes
    name: str  # below the repository root, and below DIR_OR_URL
    base_url: str = COURSE_URL
    part: str = ".part"  # ends the name while unfinished; no two contents of a file share one


# SHA-256, bytes, name
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
        Pinned(sha256, int(size), name)
        for sha256, size, name in map(str.split, COURSE_FILES.splitlines())
    ),
    # The checkpoint is last, so that a missing network shows at a small file; its contents stand
    # in order of preference. The course's own has no published SHA-256: its exact size and the
    # CRC-32 that torch.save stores with every member of its zip archive have to do.
    Pinned(None, 232_324_715, CHECKPOINT, "https://www.cs.cmu.edu/~vijayv"),
    Pinned(
        "fbe124df8794c2e033432c22b59cff64485455b4644046c52a456d0bbd8859fe",
        166_787_298,
        CHECKPOINT,
        HUB_URL,
        ".hub.part",
    ),
)


class SourceError(Exception):
    """An address does not give what is expected of it."""


class NotThereError(SourceError):
    """An address has no such file."""


def reason_of(error: BaseException) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, HTTPError):
        return str(error)
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def mismatch(path: Path, pinned: Pinned) -> str:
    """How a file differs from what is pinned; "" when it is right."""
    size = path.stat().st_size
    if size != pinned.size:
        return f"expected {pinned.size:,} bytes, found {size:,}"
    if pinned.sha256 is None:
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
                if unpacked > size:  # torch.save does not compress
                    return f"expected a zip archive of stored members, found {unpacked:,} bytes"
                damaged = archive.testzip()
        except Exception as error:  # zipfile raises a dozen kinds on a damaged archive
            damaged = reason_of(error)
        return f"expected a sound zip archive, found it damaged: {damaged}" if damaged else ""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if sha256 == pinned.sha256 else f"expected SHA-256 {pinned.sha256}, found {sha256}"


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError if a step takes more than LIMIT seconds.

    A socket's own timeout begins anew with each byte, and a header of one byte at a time never
    ends. Without the alarm signal (Windows, other threads) there is no limit but that.
    """
    if not hasattr(signal, "SIGALRM") or current_thread() is not main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError("timed out")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def open_url(url: str, offset: int = 0) -> tuple[HTTPResponse, int, int | None]:
    """Open an address at an offset, or at 0 where the server cannot resume.

    Returns the body, where in the file it starts, and the size of the whole file if that is told.
    Raises NotThereError if there is no such file, OSError or HTTPException if it cannot be had, and
    SourceError if the address, or one that it leads to, cannot be.
    """
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    try:
        with time_limit():
            response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except (ValueError, OverflowError) as error:
        raise SourceError(f"{url}: is or leads to an impossible address: {error}") from error
    except URLError as error:
        code = error.code if isinstance(error, HTTPError) else None
        if code == 416 and offset:  # the file there is shorter than what is here
            return open_url(url)
        if code in (404, 410) or isinstance(error.reason, FileNotFoundError):
            raise NotThereError(f"{url}: {reason_of(error)}") from error
        raise
    if offset and response.status == 206:
        sent = re.fullmatch(
            r"bytes (\d{1,18})-\d+/(\d{1,18})", response.headers["Content-Range"] or ""
        )
        if sent and int(sent[1]) == offset:
            return response, offset, int(sent[2])
        response.close()
        return open_url(url)
    length = response.headers["Content-Length"] or ""
    return response, 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None


def receive(url: str, pinned: Pinned, part: Path) -> str:
    """Add what an address gives to the unfinished file; returns why that ended.

    Raises SourceError if another file is there or none, OSError if `part` cannot be written.
    """
    try:
        stream, start, size = open_url(url, size_of(part))
    except (OSError, HTTPException) as error:
        return reason_of(error)
    with stream:
        # A log-in or error page must not replace what came before; most announce another size.
        is_html = stream.headers.get_content_type() == "text/html"
        if size != pinned.size and (size is not None or is_html):
            found = "an HTML page" if is_html else f"{size:,}"
            raise SourceError(f"{url}: expected {pinned.size:,} bytes, found {found}")
        left = pinned.size - start + 1  # the one too many shows an endless body
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
            begin, came = time.monotonic(), 0
            while left > 0:  # a broken chunk may be longer than what was asked for
                if came < SLOWEST * (time.monotonic() - begin - LIMIT):
                    return "too slow"
                try:
                    with time_limit():
                        chunk = stream.read1(min(CHUNK, left))
                except (OSError, HTTPException) as error:
                    return reason_of(error)
                if not chunk:
                    break
                file.write(chunk)
                bar.update(len(chunk))
                left -= len(chunk)
                came += len(chunk)
    return "the connection was closed"


def fetch(url: str, pinned: Pinned, target: Path) -> None:
    """Bring a file from an address to its target, resuming what an earlier run left.

    Raises SourceError if the address does not give this content, OSError if it cannot be written.
    """
    part = target.with_name(target.name + pinned.part)
    if size_of(part) >= pinned.size and mismatch(part, pinned):
        part.unlink()  # nothing to resume
    for _ in range(TRIES):
        before = size_of(part)
        reason = receive(url, pinned, part) if before < pinned.size else ""
        if not before < size_of(part) < pinned.size:  # no progress, or the end
            break
    size = size_of(part)
    if size < pinned.size:
        came = f"; {size:,} of {pinned.size:,} bytes are here, run again to resume" if size else ""
        raise SourceError(f"{url}: {reason}{came}")
    wrong = mismatch(part, pinned)
    if wrong:
        part.unlink()
        raise SourceError(f"{url}: {wrong}{' or more' if size > pinned.size else ''}")
    with open(part, "ab") as file:
        os.fsync(file.fileno())  # else a power cut could leave the name without the content
    os.replace(part, target)


def is_in_place(target: Path, contents: Sequence[Pinned]) -> bool:
    """Whether a file is there and right; raises ValueError if it is there and wrong."""
    if not target.exists():
        return False
    mismatches = [mismatch(target, pinned) for pinned in contents]
    if all(mismatches):
        raise ValueError(
            f"{target}: not the file to fetch: {', or '.join(mismatches)}; "
            "move or delete it and run again"
        )
    return True


def fetch_first(source: str | None, contents: Sequence[Pinned], target: Path) -> None:
    """Bring the first content of a file that can be had to its target; raises as `fetch` does."""
    if source and len(contents) > 1:  # one place for all of them: the size tells which is there
        size = None
        with suppress(OSError, HTTPException):  # `fetch` meets these again and reports them
            stream, _, size = open_url(f"{source}/{contents[0].name}")
            stream.close()
        contents = [pinned for pinned in contents if pinned.size == size] or contents[:1]
    *preferred, last = [
        (f"{source or pinned.base_url}/{pinned.name}", pinned) for pinned in contents
    ]
    for choice in preferred:
        try:
            return fetch(*choice, target)
        except SourceError as error:
            print(f"download.py: {error}; trying {last[0]}", file=sys.stderr)
    fetch(*last, target)


def run(names: Sequence[str], source: str | None, root: Path) -> None:
    """Fetch what is missing below a folder; raises ValueError, SourceError or OSError."""
    contents_of: dict[str, list[Pinned]] = {}
    for pinned in FILES:
        contents_of.setdefault(pinned.name, []).append(pinned)
    for name in names:
        if name not in contents_of:
            raise ValueError(f"{name}: not one of the files: {', '.join(contents_of)}")
    if source and re.match("https?://", source, re.IGNORECASE):
        source = source.rstrip("/")
    elif source is not None:
        if not (source and Path(source).is_dir()):
            raise ValueError(f"--from {source}: neither a folder nor an http(s) address")
        source = Path(source).resolve().as_uri()  # so that there is one way to read
    if root.exists() and not root.is_dir():
        raise ValueError(f"--to {root}: not a folder")

    wanted = list(dict.fromkeys(names or contents_of))
    missing = [name for name in wanted if not is_in_place(root / name, contents_of[name])]
    fetched = 0
    for name in missing:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch_first(source, contents_of[name], root / name)
            for pinned in contents_of[name]:  # what another content may have left unfinished
                (root / (name + pinned.part)).unlink(missing_ok=True)
            fetched += 1
        except NotThereError:
            # the course's repository, whose layout this is, does not hold the checkpoint either
            if not source or names or name != CHECKPOINT:
                raise
            get = f"uv run python data/download.py {CHECKPOINT}"
            print(f"download.py: {source} has no {CHECKPOINT}; get it by: {get}", file=sys.stderr)
    print(f"{root}: {fetched} fetched, {len(wanted) - len(missing)} already there")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions, for `main` to report in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def get_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="download.py", description="Fetch what is missing of the assignment's files."
    )
    text = "a file to fetch, such as data/sst-dev.txt (default: all)"
    parser.add_argument("names", nargs="*", metavar="FILE", help=text)
    text = "a folder or an http(s) address with the same layout (default: the published ones)"
    parser.add_argument("--from", dest="source", metavar="DIR_OR_URL", help=text)
    text = "the folder to put them in (default: the repository root)"
    parser.add_argument("--to", type=Path, default=REPOSITORY_ROOT, metavar="DIR", help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that cannot be shown must not end the run
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
            message += "; --from DIR_OR_URL takes the files from another place"
        elif isinstance(error, OSError) and error.strerror:
            message = f"{error.filename or args.to}: {error.strerror}"
        print(f"download.py: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
