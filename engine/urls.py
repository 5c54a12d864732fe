"""URLs of shards: which are taken, and what is shown of them."""

import re
from pathlib import Path

from sslus.engine.errors import InputError

# Each just transfers bytes. Excluded: pipes, chains ("::"), archives, shells of other machines.
PROTOCOLS = ("file", "memory", "http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss")

HIDDEN = "***"  # in a URL that is written or printed


def is_url(where: str | Path) -> bool:
    """Whether `where` is a URL of a supported protocol rather than a folder.

    Raises InputError for `pipe:`, for chains of protocols and for any protocol not in PROTOCOLS;
    and, without repeating it, for a URL in which `shown` might not find the whole password.
    """
    where = str(where)
    protocol, separator, path = where.partition("://")
    host = re.match(r"[^/?#\s]*", path)[0]  # with user and password, if these are encoded
    behind = path[len(host) :]
    if (
        host.count("@") > 1
        or ("@" in behind and (":" in host or behind[0] != "/"))
        or not host.rpartition("@")[0].isascii()  # aiohttp would repeat it
    ):
        raise InputError(
            "the URL of the shards: where its password ends cannot be told; percent-encode the"
            " password (/ is %2F, ? %3F, # %23, @ %40, a space %20), and an @ in the path"
        )
    if where.startswith("pipe:") or (separator and "|" in where):
        raise InputError(
            f"{shown(where)}: shell commands are never run; give a folder or a URL of shards"
        )
    if not separator:
        return False
    if protocol not in PROTOCOLS or "::" in path:
        raise InputError(f"{shown(where)}: want a folder, or a URL of {', '.join(PROTOCOLS)}")
    if protocol == "file" and not path.startswith("/"):  # elsewhere a resumed run would not find it
        raise InputError(f"{shown(where)}: want file:// with the absolute path, or just the path")
    return True


def shown(text: str | Path) -> str:
    """The text with HIDDEN for what its URLs, which `is_url` takes, may hold of secrets: user and
    password, and query.

    >>> shown("https://me:password@host/shards?signature=1f")
    'https://***@host/shards?***'
    """
    return re.sub(r"(://[^?]*\?).*", rf"\1{HIDDEN}", without_users(str(text)), flags=re.DOTALL)


def without_users(text: str) -> str:
    """The text with HIDDEN for the users and passwords of its URLs, and of what pathlib has made of
    them: https:/token@host. Of HTTP and FTP up to the last @, since a token may hold a slash."""
    text = re.sub(r"(?<=:/)(/?)([^/?@\s]*@)", _hidden_user, text)
    return re.sub(r"((?:http|ftp)s?:/+)[^?\s]*@", rf"\1{HIDDEN}@", text, flags=re.IGNORECASE)


def _hidden_user(match: re.Match) -> str:
    # abfs://CONTAINER@ACCOUNT/PATH holds none.
    of_azure = match.string[: match.start()].endswith(("abfs:/", "abfss:/"))
    return match[0] if of_azure and re.fullmatch(r"[\w$-]+@", match[2]) else f"{match[1]}{HIDDEN}@"
