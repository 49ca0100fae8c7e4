"""Finding pictures in what was typed, pasted or dragged: the ways in which terminals and people write a path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

_SUFFIX = r"\.(?:png|jpe?g|webp|gif|bmp|tiff?|heic|heif|avif)"
_PICTURE_NAME = re.compile(rf".*{_SUFFIX}", re.IGNORECASE | re.DOTALL)
_SUFFIX_END = re.compile(rf"{_SUFFIX}(?=$|[\s\"',;:.!?)\]}}])", re.IGNORECASE)
_ROOTED = re.compile(r"/|~/|\.{1,2}/|file://|[a-z]:[\\/]|\\\\", re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)
_DRIVE = re.compile(r"([A-Za-z]):[\\/]")
_WSL_SHARE = re.compile(r"\\\\wsl(?:\$|\.localhost)\\[^\\]+", re.IGNORECASE)
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_SHELL_WORD = re.compile(r"(?:'[^']*'|\"(?:[^\"\\]|\\.)*\"|\\.|[^\s'\"\\])+")
_SHELL_PIECE = re.compile(r"'([^']*)'|\"((?:[^\"\\]|\\.)*)\"|\\(.)|([^'\"\\]+)")
_PLAIN_WORD = re.compile(r"\S+")
_WORD_START = re.compile(r"(?:^|(?<=\s))[(\[{]*(?=\S)")
_TRAILING = ",;:.!?)]}"
_LONGEST = 4096  # PATH_MAX: nothing longer is a path, and a long paste is not searched for one again and again
_READINGS = 4  # how many suffixes a name with bare spaces may hold


@dataclass(frozen=True, slots=True)
class Found:
    """What a text holds: its words, files that exist, paths to no file, and names that may be files or mere talk."""

    text: str
    paths: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()
    mentioned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Candidate:
    end: int
    written: str
    path: Path


def find_pictures(text: str) -> Found:
    """Split a text into its words and the pictures that it names.

    A path is quoted, escaped, a file URI, a Windows path or plain; its suffix is a picture's, or it is the whole line.
    """
    return _whole_line(text.strip()) or _in_words(text)


def resolve(written: str) -> Path:
    """One path as a person or a terminal writes it: quotes, escapes, `~`, file URIs and Windows drives undone."""
    written = written.strip()
    if _is_file(_expanded(written)):
        return _expanded(written)
    quoted = _QUOTED.fullmatch(written)
    inner = (quoted[1] or quoted[2] or "") if quoted else written
    if _is_windows(inner) or _is_file(_expanded(inner)):
        return _to_path(inner)
    return _to_path(_unshell(written))


def split_paths(argument: str) -> tuple[Path, ...]:
    """The paths of a command's argument: the whole of it where that is a file, else one a word, as a shell splits."""
    whole = resolve(argument)
    if _is_file(whole):
        return (whole,)
    words: list[Path] = []
    position = 0
    while word := _WORD_START.search(argument, position):
        match = _shell_word(argument, word.start())
        words.append(resolve(match.group()))
        position = match.end()
    return tuple(words)


def escape(path: str) -> str:
    """A path as a shell takes it without quotes."""
    return re.sub(r"([\s\"'\\])", r"\\\1", path)


def _whole_line(line: str) -> Found | None:
    """The line as one path, where it is a file or can be nothing else."""
    inner = line.strip("'\"")
    rooted, named = _ROOTED.match(inner), _PICTURE_NAME.fullmatch(inner)
    if "\n" in line or not (rooted or named):
        return None
    path = resolve(line)
    if _is_file(path):
        return Found("", (path,))
    return Found("", missing=(inner,)) if _shell_word(line, 0).end() == len(line) else None


def _in_words(text: str) -> Found:
    words: list[str] = []
    paths: list[Path] = []
    missing: list[str] = []
    mentioned: list[str] = []
    position = 0
    for candidate, start in _candidates(text):
        if not _is_file(candidate.path) and not _is_definite(candidate.written):
            mentioned.append(candidate.written)
            continue
        words.append(text[position:start])
        position = candidate.end
        if _is_file(candidate.path):
            paths.append(candidate.path)
        else:
            missing.append(candidate.written)
    words.append(text[position:])
    return Found(_joined(words), tuple(paths), tuple(missing), tuple(mentioned))


def _candidates(text: str) -> list[tuple[_Candidate, int]]:
    """What may be a picture, with where it starts; none overlaps another."""
    found: list[tuple[_Candidate, int]] = []
    position = 0
    for match in _WORD_START.finditer(text):
        start = match.end()
        candidate = None if start < position else _spaced(text, start) or _word(text, start)
        if candidate is not None:
            found.append((candidate, start))
            position = candidate.end
    return found


def _spaced(text: str, start: int) -> _Candidate | None:
    """A rooted path with bare spaces in it, where some reading of it up to a picture's suffix is a file."""
    if not _ROOTED.match(text, start):
        return None
    line_end = text.find("\n", start, start + _LONGEST)
    ends = _SUFFIX_END.finditer(text, start, start + _LONGEST if line_end < 0 else line_end)
    for match in islice(ends, _READINGS):
        path = resolve(text[start : match.end()])
        if _is_file(path):
            return _Candidate(match.end(), text[start : match.end()], path)
    return None


def _word(text: str, start: int) -> _Candidate | None:
    """One word, quoted or not, that ends in a picture's suffix."""
    match = _shell_word(text, start)
    written = match.group() if match.group()[-1] in "'\"" else match.group().rstrip(_TRAILING)
    inner = written.strip("'\"")
    if not _PICTURE_NAME.fullmatch(inner):
        return None
    return _Candidate(start + len(written), inner, resolve(written))


def _shell_word(text: str, start: int) -> re.Match[str]:
    """The word there: as a shell reads it, or up to the next space where that is no reading (a lone quote, Windows)."""
    end = start + _LONGEST
    quoted = _QUOTED.match(text, start, end)
    if quoted is not None and _is_windows(quoted[1] or quoted[2] or ""):
        return quoted
    shell = None if _is_windows(text[start : start + 3]) else _SHELL_WORD.match(text, start, end)
    if shell is not None and _is_shell_word(shell):
        return shell
    plain = _PLAIN_WORD.match(text, start)
    assert plain is not None
    return plain


def _is_shell_word(word: re.Match[str]) -> bool:
    """Whether a shell's reading is the right one: in `what's` and `don't` the quotes are none."""
    if word.group()[0] in "'\"":
        return True
    rest = word.string[word.end() : word.end() + 1]
    quotes = set(word.group()) & set("'\"")
    return (not rest or rest.isspace()) and (not quotes or _ROOTED.match(word.group()) is not None)


def _is_definite(written: str) -> bool:
    """Whether a picture's name can only be meant as a path; a bare `cat.png` may be talk."""
    return bool(_ROOTED.match(written) or _WEB.match(written))


def _is_windows(written: str) -> bool:
    return bool(_DRIVE.match(written)) or written.startswith("\\\\")


def _to_path(written: str) -> Path:
    """A path without quotes and escapes: file URI, WSL share, Windows drive, or as it stands."""
    if written.lower().startswith("file://"):
        written = unquote(urlsplit(written).path)
        written = written[1:] if _DRIVE.match(written, 1) else written
    share = _WSL_SHARE.match(written)
    if share:
        return Path(written[share.end() :].replace("\\", "/"))
    drive = _DRIVE.match(written)
    if drive:
        return Path("/mnt", drive[1].lower(), written[drive.end() :].replace("\\", "/"))
    return _expanded(written)


def _expanded(written: str) -> Path:
    try:
        return Path(written).expanduser()
    except RuntimeError:
        return Path(written)


def _unshell(word: str) -> str:
    """Quotes and escapes undone as a shell does."""
    pieces = _SHELL_PIECE.findall(word)
    return "".join(
        single + re.sub(r'\\(["\\$`])', r"\1", double) + escaped + bare for single, double, escaped, bare in pieces
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _joined(words: list[str]) -> str:
    """The words around the pictures, one space where a picture stood."""
    kept = (word.strip(" \t") for word in words)
    return " ".join(word for word in kept if word)
